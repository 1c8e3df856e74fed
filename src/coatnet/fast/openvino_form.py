"""The folded network in OpenVINO, in 8 bits through NNCF. Both are optional: `pip install 'coatnet[openvino]'`.

The converted network and what OpenVINO compiles from it are kept in a private folder of the user's, by the hash of
the weights, so that a second process neither converts nor compiles.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import openvino  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor, nn

from coatnet.config import Precision
from coatnet.files import private_cache
from coatnet.model.network import CoAtNet


class Compiled:
    """The network for batches of any size: images (B, C, H, W) float32 -> logits (B, K) float32."""

    def __init__(self, folded: CoAtNet, precision: Precision, calibration: Sequence[Tensor]) -> None:
        self.folded, self.calibration = folded, calibration
        self.precision: Precision = precision
        self.cache = private_cache("openvino")
        self.key = _digest(folded, precision, calibration)
        self.compiled = lru_cache(4)(self._compile)
        if precision == "int8":
            import_module("nncf")  # that it is missing is to be known now

    def __call__(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.compiled(*images.shape)([images.contiguous().numpy()])[0].copy())

    def _compile(self, *shape: int) -> Any:
        path = self.cache / f"{self.key}_{shape[2]}x{shape[3]}.xml"
        if not path.is_file():
            model = convert(self.folded, shape[1:])
            _save(quantize(model, self.calibration) if self.precision == "int8" else model, path)
        model = openvino.Core().read_model(path)
        model.reshape(shape)
        return compile_for_cpu(model, self.precision, cache=self.cache)


def convert(network: nn.Module, image_shape: tuple[int, ...]) -> openvino.Model:
    """Convert a network for images (C, H, W), any number at once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, about sizes that are fixed here
        return openvino.convert_model(network, example_input=torch.zeros(2, *image_shape), input=[-1, *image_shape])


def quantize(model: openvino.Model, calibration: Sequence[Tensor]) -> openvino.Model:
    """Give a model 8 bits wherever NNCF holds it to be harmless."""
    import nncf  # pyright: ignore[reportMissingImports]

    images = [image[None].numpy() for batch in calibration for image in batch]
    return nncf.quantize(
        model, nncf.Dataset(images), preset=nncf.QuantizationPreset.MIXED, model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(images),
    )  # fmt: skip


def compile_for_cpu(model: openvino.Model, precision: Precision, *, cache: Path | None = None) -> Any:
    """Compile for as many threads as torch has; beside 8 bits the rest is computed in bf16, as OpenVINO prefers."""
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32" if precision == "fp32" else "bf16",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    if cache:
        settings["CACHE_DIR"] = str(cache)
    return openvino.Core().compile_model(model, "CPU", settings)


def _save(model: openvino.Model, path: Path) -> None:
    """Write a model whole: the file that is looked for comes last."""
    with TemporaryDirectory(dir=path.parent) as aside:
        made = Path(aside) / path.name
        openvino.save_model(model, made, compress_to_fp16=False)
        made.with_suffix(".bin").replace(path.with_suffix(".bin"))
        made.replace(path)


def _digest(folded: CoAtNet, precision: Precision, calibration: Sequence[Tensor]) -> str:
    """Return what names the converted network: a hash of everything that it is made from."""
    digest = hashlib.sha256(f"{openvino.__version__} {precision} {folded.config}".encode())
    for tensor in (*folded.state_dict().values(), *calibration):
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]
