"""Every setting of a network, its pictures and its training, as frozen data that is checked without torch.

A field exists only if a row of the zoo, a recipe, a study or a person's own pictures vary it. What is off is `None`;
derived values are properties; a variant is `dataclasses.replace`. `to_dict` and `from_dict` carry it through JSON.
"""

from __future__ import annotations

import dataclasses
import re
import types
from dataclasses import dataclass, field
from typing import Any, Literal, Self, Union, cast, get_args, get_origin, get_type_hints

from coatnet.errors import ConfigError, brief, name_hint, one_line

Size = tuple[int, int]  # (height, width) in pixels
FloatPrecision = Literal["fp32", "bf16"]  # what networks are trained in
Precision = Literal["fp32", "bf16", "int8"]  # what trained ones are used in
MAX_NUMBER = 2**63  # sizes and counts are multiplied, and shall stay numbers that floats can hold
MAX_DEPTH = 1000  # blocks a stage; the paper's rows have 42 at most
MAX_SIDE = 16384  # px of a picture
LISTING_ONLY: dict[str, object] = {  # the one form that blocks "listing" come in
    "head_dim": 32,
    "s3_mbconv": None,
    "relative_attention": "pre",
    "attention": "global",
    "mbconv_norm": "batch",
    "stride_in": "expand",
    "head": "plain",
    "stochastic_depth_rate": 0.0,
}


def _check(holds: bool, met: str, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{met}. {allowed}.")


class Config:
    """What every config shares: strict choices, strict keys, JSON both ways."""

    __slots__ = ()

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            _check_choice(item.name, getattr(self, item.name), hints[item.name])
        self.check()

    def check(self) -> None:
        """Raise ConfigError where fields are out of range or at odds."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data (tuples become lists)."""
        return {
            item.name: _to_plain(getattr(self, item.name))
            for item in dataclasses.fields(self)  # type: ignore[arg-type]
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild a config from `to_dict`'s data.

        Raises: ConfigError for an unknown key, naming the nearest known one, and for a value of the wrong kind.
        """
        hints = get_type_hints(cls)
        known = [item.name for item in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for key in values:
            if key not in known:
                raise ConfigError(f"{cls.__name__} has no field '{one_line(key)}'. {name_hint(key, known)}")
        try:
            return cls(**{key: _from_plain(value, hints[key]) for key, value in values.items()})
        except TypeError as error:
            raise ConfigError(f"{cls.__name__}: {error}.") from None


def _to_plain(value: object) -> object:
    if isinstance(value, Config):
        return value.to_dict()
    return [_to_plain(part) for part in value] if isinstance(value, tuple) else value


def _unwrapped(hint: Any) -> Any:
    """Return what an annotation allows besides None."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(part for part in get_args(hint) if part is not type(None))
    return hint


def _from_plain(value: Any, hint: Any) -> Any:
    kind = _unwrapped(hint)
    if isinstance(kind, type) and issubclass(kind, Config):
        return kind.from_dict(value) if isinstance(value, dict) else value
    if isinstance(value, list):
        return tuple(value)
    return value


def _check_choice(name: str, value: object, hint: Any) -> None:
    """Hold a field to its annotation as far as JSON can break it: choices, numbers, text, truth values."""
    if value is None and _unwrapped(hint) is not hint:
        return
    hint = _unwrapped(hint)
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        _check(value in choices, f"{name} is {brief(value)}", f"It must be one of {', '.join(map(repr, choices))}")
    elif hint in (int, float, str, bool):
        fits = isinstance(value, hint) or (hint is float and isinstance(value, int))
        _check(
            fits and (hint is bool or not isinstance(value, bool)),
            f"{name} is {brief(value)}",
            f"It must be {hint.__name__}",
        )
        _check_number(name, value)
    elif get_origin(hint) is tuple:
        kind = get_args(hint)[0]
        fits = isinstance(value, tuple) and all(
            isinstance(part, (int, float) if kind is float else kind) and not isinstance(part, bool) for part in value
        )
        what = "numbers" if kind is float else "whole numbers"
        _check(fits, f"{name} is {brief(value)}", f"It must be a list of {what}")
        for part in cast(tuple[object, ...], value):
            _check_number(name, part)
    elif isinstance(hint, type):
        _check(isinstance(value, hint), f"{name} is {brief(value)}", f"It must be a {hint.__name__}")


def _check_number(name: str, value: object) -> None:
    fits = not isinstance(value, int) or -MAX_NUMBER < value < MAX_NUMBER
    _check(fits, f"{name} is {brief(value)}", "Whole numbers must be below 2**63")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(Config):
    """One network of the paper's design space. Source: Table 3, Table 11, section 2, appendix A.1."""

    name: str = "custom"
    depths: tuple[int, ...]  # blocks in S0 .. S4; one number for vit_rel
    widths: tuple[int, ...]  # channels out of S0 .. S4; one number for vit_rel
    blocks: Literal["paper", "listing"] = "paper"  # "listing": another network of that name (model/listing.py)
    layout: str = "CCTT"  # S1 .. S4: C = MBConv, T = attention; or "vit_rel"
    s3_mbconv: tuple[int, int] | None = None  # (blocks, channels) of MBConv that open S3 (C-6 and C-7)
    strides: tuple[int, ...] = (2, 2, 2, 2, 2)  # of S0 .. S4
    patch_size: int = 16  # px, the stride of vit_rel's stem
    head_dim: int = 32
    relative_attention: Literal["pre", "post", "none"] = "pre"  # Eq. 3
    attention: Literal["global", "window", "linear"] = "global"  # options A, B, C of section 2.2
    window_size: int = 7  # cells a side, for attention "window"
    mbconv_norm: Literal["batch", "layer"] = "batch"  # Table 8
    stride_in: Literal["expand", "depthwise"] = "expand"  # Table 9: first 1x1 convolution, or the depthwise one
    head: Literal["dense", "plain"] = "dense"  # LayerNorm, Dense + tanh, classifier; "plain" leaves out the Dense
    init: Literal["normal", "fan_in"] = "normal"  # deviation 0.02, or 1 / sqrt(fan in)
    batch_norm_momentum: float = 0.01  # share of the newest batch in the running statistics
    stochastic_depth_rate: float = 0.0  # of the last block; grows linearly with depth
    image_size: Size = (224, 224)  # px, the size whose grid the bias tables fit
    in_channels: int = 3
    num_classes: int = 1000

    def check(self) -> None:
        vit = self.layout == "vit_rel"
        _check(
            vit or re.fullmatch(r"(?=.{4}$)C*T*", self.layout) is not None,
            f"layout is {brief(self.layout)}",
            "It must be four letters for S1 .. S4, C before T (CCCC, CCCT, CCTT, CTTT, TTTT), or 'vit_rel'",
        )
        stages = 1 if vit else 5
        for name in ("depths", "widths"):
            values = getattr(self, name)
            _check(
                len(values) == stages and all(isinstance(value, int) and value >= 1 for value in values),
                f"{name} is {brief(values)}",
                f"It must be {stages} whole number{'s' * (not vit)} of 1 or more"
                + (" for vit_rel" if vit else ", for S0 .. S4"),
            )
        deepest = max(*self.depths, self.s3_mbconv[0] if self.s3_mbconv else 0)
        _check(deepest <= MAX_DEPTH, f"A stage has {deepest} blocks", f"It must be {MAX_DEPTH} at most")
        _check(
            len(self.strides) == 5 and all(stride in (1, 2) for stride in self.strides),
            f"strides is {brief(self.strides)}",
            "It must be five numbers for S0 .. S4, each 1 or 2",
        )
        _check(
            self.s3_mbconv is None
            or (self.layout[2:3] == "T" and len(self.s3_mbconv) == 2 and min(self.s3_mbconv) >= 1),
            f"s3_mbconv is {brief(self.s3_mbconv)} in layout {self.layout}",
            "It must be (blocks, channels), and S3 must be T",
        )
        for name in ("head_dim", "window_size", "patch_size", "in_channels", "num_classes"):
            _check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}", "It must be 1 or more")
        if self.blocks == "listing":
            self._check_listing()
        for width in self.attention_widths if self.blocks == "paper" else ():
            _check(
                width % self.head_dim == 0,
                f"An attention stage of {width} channels has no whole number of heads of {self.head_dim}",
                "Give a head_dim that divides it",
            )
        _check_size("image_size", self.image_size)
        _check_rate("stochastic_depth_rate", self.stochastic_depth_rate)
        _check_rate("batch_norm_momentum", self.batch_norm_momentum)

    def _check_listing(self) -> None:
        """Raise ConfigError for what the listing's blocks have no form for."""
        _check(self.layout != "vit_rel", "layout is 'vit_rel' with blocks 'listing'", "It must be C and T stages there")
        for name, only in LISTING_ONLY.items():
            met = getattr(self, name)
            _check(met == only, f"{name} is {brief(met)} with blocks 'listing'", f"It must be {only!r} there")

    @property
    def attention_widths(self) -> tuple[int, ...]:
        """Return the widths of the attention stages, which `head_dim` must divide in the paper's blocks."""
        if self.layout == "vit_rel":
            return self.widths
        return tuple(width for kind, width in zip(self.layout, self.widths[1:], strict=True) if kind == "T")

    @property
    def grids(self) -> tuple[Size, ...]:
        """Return the grid (h, w) after each of S0 .. S4 at `image_size`; each is ceil(n/2) of the one before."""
        sizes = [self.image_size]
        for stride in (self.patch_size,) if self.layout == "vit_rel" else self.strides:
            height, width = sizes[-1]
            sizes.append((-(-height // stride), -(-width // stride)))
        return tuple(sizes[1:])


def _check_size(name: str, size: tuple[object, ...]) -> None:
    _check(
        len(size) == 2 and all(isinstance(side, int) and 1 <= side <= MAX_SIDE for side in size),
        f"{name} is {brief(size)}",
        f"It must be (height, width) in px, each 1 to {MAX_SIDE}",
    )


def _check_rate(name: str, value: float, below: float = 1.0) -> None:
    _check(0 <= value < below, f"{name} is {value}", f"It must be at least 0 and below {below:g}")


def _check_positive(name: str, value: float | None) -> None:
    _check(value is None or 0 < value < float("inf"), f"{name} is {value}", "It must be above 0, and finite")


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessingConfig(Config):
    """How a picture becomes the network's input. Stored with the model; evaluation, predict and server share it."""

    image_size: Size = (224, 224)  # px
    fit: Literal["crop", "resize"] = (
        "crop"  # "crop": shorter side to size / crop_ratio, then the centre; "resize": plain
    )
    crop_ratio: float = 0.875
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of RGB in 0 .. 1
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def check(self) -> None:
        _check_size("image_size", self.image_size)
        _check(0 < self.crop_ratio <= 1, f"crop_ratio is {self.crop_ratio}", "It must be above 0 and at most 1")
        _check(
            len(self.mean) == len(self.std) and len(self.mean) in (1, 3) and min(self.std) > 0,
            f"mean {brief(self.mean)} and std {brief(self.std)}",
            "Give one of each for a grey picture or three for RGB, std above 0",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig(Config):
    """What training does to a picture. Source: Table 10; "pad" and the rates of flip and erase are ours."""

    crop: Literal["random_resized", "pad", "resize"] = "random_resized"  # "pad": shifted by up to max_shift_ratio
    crop_min_scale: float = 0.08  # of the area, for "random_resized"
    max_shift_ratio: float = 1 / 12  # of each side, rounded up to px, for "pad"
    flip_rate: float = 0.5
    randaugment_ops: int = 0
    randaugment_magnitude: float = 0.0  # 10 is each operation's full range, as in the reference
    erase_rate: float = 0.0
    mixup_alpha: float | None = None
    cutmix_alpha: float | None = None
    mix_share: float = 1.0  # of the run, from its start on; what is left of it sees pictures as they are

    @property
    def mixes(self) -> bool:
        """Whether pictures are mixed in pairs, which stay together."""
        return self.mixup_alpha is not None or self.cutmix_alpha is not None

    def check(self) -> None:
        _check(
            0 < self.crop_min_scale <= 1, f"crop_min_scale is {self.crop_min_scale}", "It must be above 0 and at most 1"
        )
        _check_rate("max_shift_ratio", self.max_shift_ratio)
        _check(self.randaugment_ops >= 0, f"randaugment_ops is {self.randaugment_ops}", "It must be 0 or more")
        _check(
            0 <= self.randaugment_magnitude <= 30,
            f"randaugment_magnitude is {self.randaugment_magnitude}",
            "It must be 0 to 30, where 10 is the full range",
        )
        for name in ("flip_rate", "erase_rate", "mix_share"):
            _check(0 <= getattr(self, name) <= 1, f"{name} is {getattr(self, name)}", "It must be 0 to 1")
        for name in ("mixup_alpha", "cutmix_alpha"):
            _check_positive(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig(Config):
    """AdamW and its schedule. Source: Table 10; Muon is ours."""

    method: Literal["adamw", "muon"] = "adamw"  # "muon": orthogonal updates for the weights that mix channels
    peak_lr: float = 1e-3  # of AdamW's parameters; Muon's move and decay at six times the rate
    min_lr: float = 1e-5
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0  # linear from 0 to peak_lr
    weight_decay: float = 0.05  # on weights only: never norms, biases or bias tables
    beta1: float = 0.9  # both betas are AdamW's
    beta2: float = 0.999
    max_grad_norm: float | None = 1.0

    def check(self) -> None:
        _check_positive("peak_lr", self.peak_lr)
        _check_positive("max_grad_norm", self.max_grad_norm)
        _check(0 <= self.min_lr <= self.peak_lr, f"min_lr is {self.min_lr}", f"It must be 0 to peak_lr, {self.peak_lr}")
        _check(self.warmup_steps >= 0, f"warmup_steps is {self.warmup_steps}", "It must be 0 or more")
        _check(self.weight_decay >= 0, f"weight_decay is {self.weight_decay}", "It must be 0 or more")
        _check_rate("beta1", self.beta1)
        _check_rate("beta2", self.beta2)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Config):
    """One training run, whole: the same config gives the same run."""

    data: str  # folder, shards, table or name, as `open_data` takes them
    out: str  # run folder
    model: ModelConfig
    preprocessing: PreprocessingConfig = field(default_factory=PreprocessingConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    recipe: str = "custom"  # the row of recipes.py it came from
    loss: Literal["softmax", "sigmoid"] = "softmax"
    label_smoothing: float = 0.1
    num_epochs: float = 300.0
    global_batch_size: int = 4096  # images an update
    microbatch_size: int | None = None  # images a rank holds at once; the whole share if absent
    max_time_s: float | None = None  # the schedule ends with it
    ema_decay: float | None = None
    patience_epochs: int | None = None  # stop when validation has not improved for so long
    holdout_percent: float | None = 10.0  # of an unsplit folder's images, for validation; absent: train on everything
    train_percent: float | None = None  # of the training pictures, class by class; absent: all
    checkpoint_interval_s: float = 300.0
    keep_last: int = 2  # checkpoints
    keep_best: bool = False  # that of the best validation too; one is taken whenever validation improves
    keep_every: int | None = None  # every so many-th checkpoint for good
    evaluation_interval_epochs: float = 1.0
    init: str | None = None  # run, model folder, .safetensors or .pt file to fine-tune from
    freeze: Literal["S0", "S1", "S2", "S3", "S4"] | None = None  # keep everything up to this stage as it is
    precision: FloatPrecision = "fp32"
    compile: bool = False
    shard: bool = False  # divide weights, gradients and the optimizer's tensors over the ranks (FSDP)
    activation_checkpointing: bool = False
    sync_batch_norm: bool = False  # statistics over all ranks' pictures, not each rank's own
    device: str = "cpu"
    num_workers: int = 0
    on_bad_image: Literal["skip", "stop"] = "skip"
    seed: int = 0

    def check(self) -> None:
        _check_rate("label_smoothing", self.label_smoothing)
        if self.ema_decay is not None:
            _check_rate("ema_decay", self.ema_decay)
        for name in (
            "num_epochs", "global_batch_size", "microbatch_size", "max_time_s", "patience_epochs",
            "checkpoint_interval_s", "evaluation_interval_epochs", "keep_last", "keep_every",
        ):  # fmt: skip
            _check_positive(name, getattr(self, name))
        _check(
            not (self.shard and self.optimizer.method == "muon"),
            "shard is on and the optimizer is Muon, which needs whole matrices where sharding leaves a rank some rows",
            "Take a recipe with AdamW, like small_scratch, or do not shard",
        )
        _check(not (self.shard and self.compile), "shard and compile are both on", "Choose one of them")
        _check(self.num_workers >= 0, f"num_workers is {self.num_workers}", "It must be 0 or more")
        _check(0 <= self.seed < 2**63, f"seed is {self.seed}", "It must be 0 or more")
        if self.holdout_percent is not None:
            _check(
                0 < self.holdout_percent <= 50,
                f"holdout_percent is {self.holdout_percent}",
                "It must be above 0, at most 50",
            )
        if self.train_percent is not None:
            _check(
                0 < self.train_percent <= 100,
                f"train_percent is {self.train_percent}",
                "It must be above 0, at most 100",
            )
        _check(
            len(self.preprocessing.mean) == self.model.in_channels,
            f"preprocessing has {len(self.preprocessing.mean)} channels, the model {self.model.in_channels}",
            "Give mean and std of in_channels numbers",
        )
        _check(
            self.preprocessing.image_size == self.model.image_size,
            f"preprocessing gives {self.preprocessing.image_size} px, the model's tables fit {self.model.image_size}",
            "Make them equal",
        )
