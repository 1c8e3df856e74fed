"""Who computes: our own kernels, OpenVINO, CUDA graphs, torch.compile or the plain network; the fastest at hand."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from coatnet import native
from coatnet.config import Precision
from coatnet.errors import ConfigError
from coatnet.fast.calibration import Ranges, measure_ranges
from coatnet.fast.compiling import compile_for_sizes, many_forms
from coatnet.fast.cuda_form import Graphed
from coatnet.fast.folding import fold
from coatnet.fast.packing import Packing
from coatnet.fast.plan import HeadPlan, Plan, images_at_once, why_not
from coatnet.files import private_cache
from coatnet.model.network import CoAtNet

LOG = logging.getLogger("coatnet")
KEPT_SIZES = 4  # batches and image sizes that an engine stays ready for


class OptimizedModel(ABC):
    """The fast form of a network: images (B, C, H, W) float32 in any memory format -> logits (B, K) float32.

    `engine` says who computes, `precision` in what; `notes` says why no faster engine does.
    """

    engine: str

    def __init__(self, folded: CoAtNet, precision: Precision) -> None:
        self.folded = folded
        self.device = folded.classifier.weight.device
        self.precision: Precision = precision
        self.notes: list[str] = []

    def __call__(self, images: Tensor) -> Tensor:
        """Classify images. Raises: ConfigError if they are not (B, C, H, W) of floats, of C channels."""
        self.folded.check_images(images)
        images = images.to(self.device, torch.float32)
        if images.shape[0] == 0:
            return images.new_zeros(0, self.folded.config.num_classes)
        return self._logits(images)

    @abstractmethod
    def _logits(self, images: Tensor) -> Tensor:
        """Classify one or more checked images; the answer may be changed in place and learnt from."""


class _Native(OptimizedModel):
    """Our own kernels. Safe to call from several threads, which then take turns."""

    engine = "native"

    def __init__(self, folded: CoAtNet, precision: Precision, ranges: Ranges) -> None:
        super().__init__(folded, precision)
        packing = Packing(network=folded, precision=precision, ranges=ranges)
        self.at_once = lru_cache(KEPT_SIZES)(
            lambda *size: images_at_once(replace(folded.config, image_size=size), precision)[-1]
        )
        self.plan = lru_cache(KEPT_SIZES)(lambda *shape: Plan(packing, *shape))
        self.head = lru_cache(KEPT_SIZES)(lambda count: HeadPlan(packing, count))
        self.turn = threading.Lock()

    def _logits(self, images: Tensor) -> Tensor:
        # Beside one image's work each operation of torch is felt here.
        (count, _, height, width), threads = images.shape, torch.get_num_threads()
        means = torch.empty(count, self.folded.num_features, dtype=torch.float32, device="cpu")
        logits = torch.empty(count, self.folded.config.num_classes, dtype=torch.float32, device="cpu")
        most = self.at_once(height, width)
        with self.turn:
            chunks = [(images, means)] if count <= most else zip(images.split(most), means.split(most), strict=True)
            for chunk, its_means in chunks:
                self.plan(len(chunk), height, width).run(chunk, its_means, threads)
            self.head(count).run(means, logits, threads)
        return logits


class _OpenVINO(OptimizedModel):
    """OpenVINO on the folded network. What it compiled is kept in a private folder of the user's."""

    engine = "openvino"

    def __init__(
        self, folded: CoAtNet, precision: Precision, calibration: Sequence[Tensor], cache: Path | None
    ) -> None:
        super().__init__(folded, precision)
        from coatnet.fast.openvino_form import Compiled

        self.compiled = Compiled(folded, precision, calibration, cache)
        self.turn = threading.Lock()

    def _logits(self, images: Tensor) -> Tensor:
        with self.turn:
            return torch.cat([self.compiled(chunk) for chunk in images.split(16)])


class _Torch(OptimizedModel):
    """The folded network in torch, compiled or as it is."""

    def __init__(self, folded: CoAtNet, precision: Precision, *, compiled: bool) -> None:
        super().__init__(folded, precision)
        self.engine = "compiled" if compiled else "plain"
        self.dtype = _dtype(precision)
        network = folded.to(dtype=self.dtype, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.network = compile_for_sizes(network) if compiled else network

    def _logits(self, images: Tensor) -> Tensor:
        with torch.inference_mode(), many_forms():
            logits = self.network(images.to(self.dtype, memory_format=torch.channels_last))
        return logits.float().clone()


class _Cuda(OptimizedModel):
    """The folded network compiled for a card. Safe to call from several threads, which then take turns."""

    engine = "CUDA graphs"

    def __init__(self, folded: CoAtNet, precision: Precision) -> None:
        super().__init__(folded, precision)
        self.graphed = Graphed(folded, _dtype(precision))

    def _logits(self, images: Tensor) -> Tensor:
        with torch.inference_mode():
            logits = self.graphed(images)
        return logits.clone()


def _dtype(precision: Precision) -> torch.dtype:
    return torch.float32 if precision == "fp32" else torch.bfloat16


def optimize(
    model: nn.Module, *, precision: Precision = "fp32", calibration: Tensor | Iterable[Tensor] | None = None
) -> OptimizedModel:
    """Return the fast inference form of a trained network; the network itself stays as it is.

    `calibration`, images (B, C, H, W) float32 as the network sees them in use or batches of such, tells int8 what
    range to hold; some hundred are enough. Where a slower engine has to do, the logger `coatnet` says why.
    Raises: ConfigError for another kind of model, an unknown precision, int8 without calibration.
    """
    return _choose(model, precision, calibration, may_compile=True)


def optimize_at_once(model: nn.Module, *, precision: Precision = "fp32") -> OptimizedModel:
    """Return the fastest form that is ready at once: nothing is compiled. Else as `optimize`."""
    return _choose(model, precision, None, may_compile=False)


def _choose(
    model: nn.Module, precision: Precision, calibration: Tensor | Iterable[Tensor] | None, *, may_compile: bool
) -> OptimizedModel:
    if not isinstance(model, CoAtNet):
        raise ConfigError(
            f"A {type(model).__name__} cannot be optimized. Give a network of coatnet.create_model or load."
        )
    if precision not in get_args(Precision):
        raise ConfigError(f"precision is {precision!r}. It must be one of {', '.join(get_args(Precision))}.")
    batches = _batches(model, precision, calibration)
    folded = fold(model)
    notes: list[str] = []
    if model.classifier.weight.device.type != "cpu":
        if precision == "int8":
            precision, notes = "bf16", ["8 bits are computed on the CPU alone"]
        made = _on_accelerator(folded, precision, notes, may_compile=may_compile)
    elif (reason := native.missing(precision) or why_not(model.config)) is None:
        made = _Native(folded, precision, measure_ranges(folded, batches) if precision == "int8" else {})
    else:
        notes.append(f"no kernels of our own, since {reason}")
        made = _by_libraries(folded, precision, batches, notes, may_compile=may_compile)
    made.notes = notes
    if notes:
        LOG.warning("coatnet computes by %s in %s: %s.", made.engine, made.precision, "; ".join(notes))
    return made


def _on_accelerator(folded: CoAtNet, precision: Precision, notes: list[str], *, may_compile: bool) -> OptimizedModel:
    """Return the fastest form on the device of the network; say in `notes` what is missing."""
    if folded.classifier.weight.device.type != "cuda" or not may_compile:
        return _Torch(folded, precision, compiled=may_compile)
    if not _has_triton():
        notes.append("torch.compile finds no Triton, or none that serves this card")
        return _Torch(folded, precision, compiled=False)
    return _Cuda(folded, precision)


def _has_triton() -> bool:
    from torch.utils._triton import has_triton  # as torch.compile itself looks for it

    return has_triton()


def _by_libraries(
    folded: CoAtNet, precision: Precision, batches: Sequence[Tensor], notes: list[str], *, may_compile: bool
) -> OptimizedModel:
    """Return the fastest form that others' libraries give on this processor; say in `notes` what is missing."""
    if may_compile:
        try:
            return _OpenVINO(folded, precision, batches, _cache("openvino", notes))
        except ImportError as error:
            notes.append(f"no OpenVINO ({error.name} is not installed: pip install 'coatnet[openvino]')")
    if precision != "fp32":
        precision = "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"  # pyright: ignore
    compiler = may_compile and _has_compiler()
    if may_compile and not compiler:
        notes.append("no C++ compiler for torch.compile")
    return _Torch(folded, precision, compiled=compiler)


def _cache(name: str, notes: list[str]) -> Path | None:
    """Return a private folder of the user's, or None where there can be none; say so in `notes`."""
    try:
        return private_cache(name)
    except OSError as error:
        notes.append(f"what is compiled is not kept for the next process ({error})")
        return None


def _has_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler  # as torch.compile itself looks for it
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except (InvalidCxxCompiler, OSError, RuntimeError):
        return False


def _batches(model: CoAtNet, precision: Precision, calibration: Tensor | Iterable[Tensor] | None) -> list[Tensor]:
    """Return the calibration images in batches that memory bears."""
    if precision != "int8":
        return []
    if calibration is None:
        raise ConfigError(
            "int8 needs calibration images: give calibration=, some hundred images (B, C, H, W) float32 as in use."
        )
    given = [calibration] if isinstance(calibration, Tensor) else list(calibration)
    for images in given:
        model.check_images(images)
    if not sum(map(len, given)):
        raise ConfigError("calibration holds no image. Give some hundred, as the network sees them in use.")
    return [part.float() for images in given for part in images.split(16) if len(part)]
