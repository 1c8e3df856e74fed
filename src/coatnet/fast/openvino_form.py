"""The folded network in OpenVINO, in 8 bits through NNCF. Both are optional: `pip install 'coatnet[openvino]'`.

The converted network and what OpenVINO compiles from it are kept in a folder by the hash of the weights, so that a
second process neither converts nor compiles.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import openvino  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor, nn

from coatnet import __version__
from coatnet.config import Precision
from coatnet.model.network import CoAtNet

KEPT_NETWORKS = 16  # in the cache


class Compiled:
    """The network for batches of any size: images (B, C, H, W) float32 -> logits (B, K) float32.

    `cache` holds what was converted and compiled for the next process; None keeps nothing.
    """

    def __init__(
        self, folded: CoAtNet, precision: Precision, calibration: Sequence[Tensor], cache: Path | None
    ) -> None:
        self.folded, self.calibration = folded, calibration
        self.precision: Precision = precision
        if precision == "int8":
            import_module("nncf")  # that it is missing is to be known now
        self.folder = _folder_in(cache, _digest(folded, precision, calibration)) if cache else None
        self.compiled = lru_cache(4)(self._compile)

    def __call__(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.compiled(*images.shape)([images.contiguous().numpy()])[0].copy())

    def _compile(self, *shape: int) -> Any:
        model = self._converted(shape)
        model.reshape(shape)
        return compile_for_cpu(model, self.precision, cache=self.folder)

    def _converted(self, shape: tuple[int, ...]) -> openvino.Model:
        path = self.folder / f"{shape[2]}x{shape[3]}" / "model.xml" if self.folder else None
        if path is not None and path.is_file():
            return openvino.Core().read_model(path)
        model = convert(self.folded, shape[1:])
        model = quantize(model, self.calibration) if self.precision == "int8" else model
        if path is not None:
            _save(model, path)
        return model


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


def _folder_in(cache: Path, name: str) -> Path:
    """Return the folder of one network; those that were used longest ago make room."""
    folder = cache / name
    folder.mkdir(mode=0o700, exist_ok=True)
    os.utime(folder)
    for old in sorted(cache.iterdir(), key=lambda each: each.stat().st_mtime)[:-KEPT_NETWORKS]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _save(model: openvino.Model, path: Path) -> None:
    """Write a model's files, which appear as one; where another process was first, its stay."""
    with TemporaryDirectory(dir=path.parent.parent) as aside:
        made = Path(aside) / "made"
        made.mkdir()
        openvino.save_model(model, made / path.name, compress_to_fp16=False)
        with suppress(OSError):
            made.rename(path.parent)


def _digest(folded: CoAtNet, precision: Precision, calibration: Sequence[Tensor]) -> str:
    """Return what names the converted network: a hash of everything that it is made from."""
    makers = (__version__, torch.__version__, openvino.__version__, *([version("nncf")] if precision == "int8" else []))
    digest = hashlib.sha256(f"{makers} {precision} {folded.config}".encode())
    for tensor in (*folded.state_dict().values(), *calibration):
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]
