"""`coatnet plan`: what a recipe needs of so many GPUs, for DDP and FSDP, with and without activation checkpointing.

The memory is counted from the tape (`tests/test_plan.py` holds it to what is measured); the time is operations over an
assumed speed. Communication, reading pictures and evaluation cost time that is not in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from coatnet import recipes, zoo
from coatnet.config import FloatPrecision, ModelConfig, Size
from coatnet.errors import ConfigError
from coatnet.layout import count, count_block, unroll
from coatnet.plan.memory import Setting, Sharding, peak_bytes
from coatnet.plan.tape import FP32, Tape, mixing_share, record

GIB = 2**30
USABLE = 0.9  # of a GPU's memory; assumed: the rest is for context, workspaces, gaps, and what the plan errs by
ENOUGH_FOR_BATCH_NORM = 16  # pictures a microbatch: its statistics are taken from one
TWICE = (False, True)  # whether activations are computed twice
NAMES: dict[Sharding, str] = {"none": "plain training", "ddp": "DDP", "fsdp": "FSDP"}
H100_TFLOPS = 989.0  # dense bf16 products, by the vendor's data sheet
UTILISATION = 0.3  # share of it that training reaches; assumed


@dataclass(frozen=True, slots=True)
class DataFacts:
    """A data set as the paper tells it."""

    name: str
    num_images: int
    num_classes: int


# Section 4.1 of the paper; classes: Deng et al. 2009, and Sun et al. 2017 (arXiv:1707.02968) for JFT-300M.
_1K = DataFacts("ImageNet-1K", 1_281_167, 1000)
_21K = DataFacts("ImageNet-21K", 12_700_000, 21_841)
_JFT = DataFacts("JFT-300M", 300_000_000, 18_291)
DATA = {
    "imagenet_1k": _1K,
    "imagenet_1k_finetune": _1K,
    "imagenet_21k": _21K,
    "imagenet_21k_randaugment": _21K,
    "imagenet_21k_to_1k": _1K,
    "imagenet_21k_randaugment_to_1k": _1K,
    "jft": _JFT,
    "jft_to_1k": _1K,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is asked; what is None is the recipe's, or chosen."""

    model: str
    recipe: str = "imagenet_1k"
    image_size: Size | None = None  # px; the model's own
    batch: int | None = None  # images an update, over all GPUs; the recipe's
    microbatch: int | None = None  # images a GPU holds at once; the largest that fits
    num_images: int | None = None  # the recipe's data set's
    precision: FloatPrecision = "bf16"
    gpus: int = 8
    gpu_memory_gib: float = 80.0
    gpu_tflops: float = H100_TFLOPS
    utilisation: float = UTILISATION


@dataclass(frozen=True, slots=True)
class Form:
    """One way to train, and what a GPU holds at its peak."""

    name: str
    checkpointed: bool
    microbatch: int  # images; the smallest where none fits
    fits: bool
    parts: dict[str, int]  # bytes

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class Cost:
    """How much there is to compute, and how long that takes at the speed assumed."""

    flops_a_step: float
    num_steps: int
    gpu_hours: float
    days: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The answer to a request."""

    request: Request
    config: ModelConfig
    data_name: str
    num_images: int
    num_params: int
    num_epochs: float
    batch: int
    optimizer: str
    forms: list[Form]
    costs: dict[bool, Cost]  # by whether activations are computed twice

    @property
    def share(self) -> int:
        """Images of an update that one GPU takes."""
        return self.batch // self.request.gpus

    @property
    def best(self) -> Form | None:
        """Return the form to take: the cheapest whose microbatch is large enough for BatchNorm, else the largest."""
        fitting = sorted((form for form in self.forms if form.fits), key=lambda form: form.checkpointed)
        enough = min(self.share, ENOUGH_FOR_BATCH_NORM)
        large = (form for form in fitting if form.microbatch >= enough)
        return next(large, max(fitting, key=lambda form: form.microbatch, default=None))


def make_plan(request: Request) -> Plan:
    """Return what training needs. Raises: ConfigError for what is unknown, out of range or at odds."""
    _check(request)
    recipe, row = recipes.find(request.recipe), zoo.find(request.model).config
    data = DATA.get(recipe.name)
    if data is None and request.num_images is None:
        raise ConfigError(f"Recipe '{recipe.name}' is for pictures of your own. Say how many they are with --pictures.")
    num_images = request.num_images or (data.num_images if data else 0)
    row = replace(row, num_classes=data.num_classes) if data else row
    settings = recipe.settings(row, request.image_size or row.image_size, num_images)
    config, batch = settings["model"], request.batch or settings["global_batch_size"]
    if batch % request.gpus:
        raise ConfigError(
            f"A batch of {batch} has no equal shares for {request.gpus} GPUs. Give --batch a multiple of it."
        )
    method, keeps_average = settings["optimizer"].method, settings["ema_decay"] is not None
    mixes = settings["augment"].mixes
    tapes, share = record(config, request.precision, "cuda"), batch // request.gpus
    optimizer = 2 * FP32 - (FP32 * mixing_share(tapes) if method == "muon" else 0)  # Muon has one average
    forms: list[Form] = []
    for sharding in ("ddp", "fsdp") if request.gpus > 1 else ("none",):
        setting = Setting(optimizer=optimizer, average=FP32 * keeps_average, sharding=sharding, num_ranks=request.gpus)
        forms += [_find_form(tapes, request, share, replace(setting, checkpointed=again), mixes) for again in TWICE]
    steps = round(settings["num_epochs"] * num_images / batch)
    return Plan(
        request=request,
        config=config,
        data_name=data.name if data and not request.num_images else "your pictures",
        num_images=num_images,
        num_params=sum(tape.num_params for tape in tapes),
        num_epochs=settings["num_epochs"],
        batch=batch,
        optimizer=method,
        forms=forms,
        costs={again: _cost(config, request, batch, steps, again) for again in TWICE},
    )


def _check(request: Request) -> None:
    counts = {"--batch": request.batch, "--microbatch-size": request.microbatch, "--pictures": request.num_images}
    for flag, value in {**counts, "--gpus": request.gpus}.items():
        if value is not None and value < 1:
            raise ConfigError(f"{flag} is {value}. Give a whole number of 1 or more.")
    for flag, value in {"--gpu-memory": request.gpu_memory_gib, "--gpu-tflops": request.gpu_tflops}.items():
        if not 0 < value < float("inf"):
            raise ConfigError(f"{flag} is {value:g}. Give a number above 0.")
    if not 0 < request.utilisation <= 1:
        raise ConfigError(f"--utilisation is {request.utilisation:g}. Give a share above 0, at most 1.")


def _find_form(tapes: list[Tape], request: Request, share: int, setting: Setting, mixes: bool) -> Form:
    """Return a form with the microbatch that was asked for, or else the largest that fits."""

    def parts(microbatch: int) -> dict[str, int]:
        return peak_bytes(tapes, microbatch, replace(setting, accumulates=microbatch < share))

    def fits(microbatch: int) -> bool:
        return sum(parts(microbatch).values()) <= USABLE * request.gpu_memory_gib * GIB

    if request.microbatch is not None and request.microbatch > share:
        raise ConfigError(f"--microbatch-size is {request.microbatch}, but a GPU's share of an update is {share}.")
    microbatch = request.microbatch or (share if fits(share) else _largest(fits, share, step=2 if mixes else 1))
    name = NAMES[setting.sharding] + (" + checkpointing" if setting.checkpointed else "")
    return Form(name, setting.checkpointed, microbatch, fits(microbatch), parts(microbatch))


def _largest(fits: Callable[[int], bool], share: int, *, step: int) -> int:
    """Return the largest multiple of `step` below the share that fits, `step` if none does (pairs are mixed)."""
    low, high = 1, max(2, share // step)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return min(low * step, share)


def _cost(config: ModelConfig, request: Request, batch: int, num_steps: int, again: bool) -> Cost:
    """Count a forward pass and a backward pass of twice its work; blocks computed again add theirs once more."""
    macs = 3e9 * count(config).gmacs
    if again:
        macs += sum(count_block(config, block)[1] for block in unroll(config))
    flops_a_step = 2 * macs * batch
    gpu_hours = num_steps * flops_a_step / (request.utilisation * request.gpu_tflops * 1e12) / 3600
    return Cost(flops_a_step, num_steps, gpu_hours, gpu_hours / request.gpus / 24)
