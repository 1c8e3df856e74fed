"""Recipes as a table: the paper's Table 10, and rows of ours for small data.

"Center crop: yes" is read as RandomResizedCrop and flip in training, resize and centre crop in evaluation; "no" as a
plain resize in both: an independent run that read it so hit the paper's figures. RandAugment's magnitude is on the
scale whose 10 is each operation's full range.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from coatnet.config import AugmentConfig, ModelConfig, OptimizerConfig, PreprocessingConfig, Size
from coatnet.errors import ConfigError, name_hint


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One column of Table 10, or a row of ours. Rates keyed by model hold for those models alone."""

    name: str
    for_what: str
    ours: bool = False
    stochastic_depth_rates: Mapping[str, float] = field(default_factory=dict[str, float])
    peak_lrs: Mapping[str, float] = field(default_factory=dict[str, float])  # where it differs from the optimizer's
    randaugment_magnitudes: Mapping[str, float] = field(default_factory=dict[str, float])  # likewise
    augment: AugmentConfig
    fit: Literal["crop", "resize"]
    optimizer: OptimizerConfig
    warmup_epochs: float | None = None  # instead of the optimizer's warmup_steps
    loss: Literal["softmax", "sigmoid"] = "softmax"
    label_smoothing: float
    num_epochs: int
    global_batch_size: int
    ema_decay: float | None = None

    def settings(self, model: ModelConfig, image_size: Size, num_images: int) -> dict[str, Any]:
        """Return the fields of TrainConfig that the recipe sets for this model at this size and amount of data."""
        optimizer = self.optimizer
        if model.name in self.peak_lrs:
            optimizer = replace(optimizer, peak_lr=self.peak_lrs[model.name])
        if self.warmup_epochs is not None:
            steps = round(self.warmup_epochs * num_images / self.global_batch_size)
            optimizer = replace(optimizer, warmup_steps=steps)
        augment = self.augment
        if model.name in self.randaugment_magnitudes:
            augment = replace(augment, randaugment_magnitude=self.randaugment_magnitudes[model.name])
        rate = self.stochastic_depth_rates.get(model.name, model.stochastic_depth_rate)
        return {
            "recipe": self.name,
            "model": replace(model, image_size=image_size, stochastic_depth_rate=rate),
            "preprocessing": PreprocessingConfig(image_size=image_size, fit=self.fit),
            "augment": augment,
            "optimizer": optimizer,
            "loss": self.loss,
            "label_smoothing": self.label_smoothing,
            "num_epochs": float(self.num_epochs),
            "global_batch_size": self.global_batch_size,
            "ema_decay": self.ema_decay,
        }


def _pretrain(
    peak_lr: float, schedule: Literal["cosine", "linear"], warmup_steps: int, decay: float
) -> OptimizerConfig:
    return OptimizerConfig(
        peak_lr=peak_lr, min_lr=1e-5, schedule=schedule, warmup_steps=warmup_steps, weight_decay=decay
    )


_FINE_TUNE = OptimizerConfig(peak_lr=5e-5, min_lr=5e-5, schedule="constant", weight_decay=1e-8)
_CROP, _RESIZE, _PAD = (AugmentConfig(crop=crop) for crop in ("random_resized", "resize", "pad"))
_1K_DEPTH = {"coatnet_0": 0.2, "coatnet_1": 0.3, "coatnet_2": 0.5, "coatnet_3": 0.7}
_21K_DEPTH = {"coatnet_2": 0.3, "coatnet_3": 0.5, "coatnet_4": 0.7}

_SMALL_FINETUNE = Recipe(
    name="small_finetune",
    for_what="your own pictures, starting from a trained model (--init)",
    ours=True,
    augment=replace(_CROP, crop_min_scale=0.5),
    fit="crop",
    optimizer=OptimizerConfig(peak_lr=3e-4, min_lr=1e-6, warmup_steps=50, weight_decay=0.01),
    label_smoothing=0.1,
    num_epochs=20,
    global_batch_size=64,
    ema_decay=0.99,
)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="imagenet_1k",
            for_what="ImageNet-1K from scratch, 224 px",
            stochastic_depth_rates=_1K_DEPTH,
            augment=replace(_CROP, randaugment_ops=2, randaugment_magnitude=15, mixup_alpha=0.8),
            fit="crop",
            optimizer=_pretrain(1e-3, "cosine", 10_000, 0.05),
            label_smoothing=0.1,
            num_epochs=300,
            global_batch_size=4096,
        ),
        Recipe(
            name="imagenet_1k_finetune",
            for_what="ImageNet-1K after imagenet_1k, at a larger size",
            stochastic_depth_rates=_1K_DEPTH,
            randaugment_magnitudes={"coatnet_3": 20},
            augment=replace(_RESIZE, randaugment_ops=2, randaugment_magnitude=15, mixup_alpha=0.8),
            fit="resize",
            optimizer=_FINE_TUNE,
            label_smoothing=0.1,
            num_epochs=30,
            global_batch_size=512,
            ema_decay=0.9999,
        ),
        Recipe(
            name="imagenet_21k",
            for_what="ImageNet-21K from scratch, 224 px",
            stochastic_depth_rates=_21K_DEPTH,
            augment=_CROP,
            fit="crop",
            optimizer=_pretrain(1e-3, "linear", 0, 0.01),
            warmup_epochs=5,
            loss="sigmoid",
            label_smoothing=0.0001,
            num_epochs=90,
            global_batch_size=4096,
        ),
        Recipe(
            name="imagenet_21k_randaugment",
            for_what="the same for coatnet_4 with RandAugment, 150 epochs (88.56 % at 512 px)",
            stochastic_depth_rates=_21K_DEPTH,
            augment=replace(_CROP, randaugment_ops=2, randaugment_magnitude=5),
            fit="crop",
            optimizer=_pretrain(1e-3, "linear", 0, 0.01),
            warmup_epochs=5,
            loss="sigmoid",
            label_smoothing=0.0001,
            num_epochs=150,
            global_batch_size=4096,
        ),
        Recipe(
            name="imagenet_21k_to_1k",
            for_what="ImageNet-1K after imagenet_21k",
            stochastic_depth_rates=_21K_DEPTH,
            augment=_RESIZE,
            fit="resize",
            optimizer=_FINE_TUNE,
            label_smoothing=0.1,
            num_epochs=30,
            global_batch_size=1024,
            ema_decay=0.9999,
        ),
        Recipe(
            name="imagenet_21k_randaugment_to_1k",
            for_what="ImageNet-1K after imagenet_21k_randaugment",
            stochastic_depth_rates=_21K_DEPTH,
            augment=replace(_RESIZE, randaugment_ops=2, randaugment_magnitude=5),
            fit="resize",
            optimizer=_FINE_TUNE,
            label_smoothing=0.1,
            num_epochs=30,
            global_batch_size=1024,
            ema_decay=0.9999,
        ),
        Recipe(
            name="jft",
            for_what="JFT from scratch, 224 px",
            stochastic_depth_rates={"coatnet_3": 0.0, "coatnet_4": 0.1, "coatnet_5": 0.0},
            peak_lrs={"coatnet_4": 5e-4, "coatnet_5": 5e-4},
            augment=replace(_CROP, randaugment_ops=2, randaugment_magnitude=5),
            fit="crop",
            optimizer=_pretrain(1e-3, "linear", 20_000, 0.01),
            loss="sigmoid",
            label_smoothing=0.0001,
            num_epochs=14,
            global_batch_size=4096,
        ),
        Recipe(
            name="jft_to_1k",
            for_what="ImageNet-1K after jft",
            stochastic_depth_rates={"coatnet_3": 0.1, "coatnet_4": 0.3, "coatnet_5": 0.2},
            augment=replace(_RESIZE, randaugment_ops=2, randaugment_magnitude=5),
            fit="resize",
            optimizer=_FINE_TUNE,
            label_smoothing=0.1,
            num_epochs=30,
            global_batch_size=512,
            ema_decay=0.9999,
        ),
        Recipe(
            name="small_scratch",
            for_what="up to some 100,000 pictures of your own, from scratch",
            ours=True,
            augment=replace(_CROP, crop_min_scale=0.35, randaugment_ops=1, randaugment_magnitude=5),
            fit="crop",
            optimizer=OptimizerConfig(peak_lr=3e-3, min_lr=1e-5, warmup_steps=100, weight_decay=0.05),
            label_smoothing=0.1,
            num_epochs=100,
            global_batch_size=128,
            ema_decay=0.998,
        ),
        Recipe(
            name="tiny_pictures",
            for_what="pictures of up to 40 px, from scratch: shifted and mirrored, never magnified",
            ours=True,
            augment=replace(_PAD, max_shift_ratio=1 / 32),  # 1 px of 28 and 32: more learns slower in short runs
            fit="resize",
            optimizer=OptimizerConfig(method="muon", peak_lr=3e-3, min_lr=1e-5, warmup_steps=60, weight_decay=0.05),
            label_smoothing=0.1,
            num_epochs=20,
            global_batch_size=512,
            ema_decay=0.995,
        ),
        _SMALL_FINETUNE,
        replace(
            _SMALL_FINETUNE,
            name="tiny_finetune",
            for_what="the same for pictures of up to 40 px",
            augment=_PAD,
            fit="resize",
        ),
    )
}


def find(name: str) -> Recipe:
    """Return the recipe of that name. Raises: ConfigError naming the nearest known name."""
    if name in RECIPES:
        return RECIPES[name]
    raise ConfigError(f"There is no recipe '{name}'. {name_hint(name, RECIPES)}")
