"""How large a study is: its networks, its pictures, how long they are learned. One row a scale.

The five networks of Figure 1 are not tabled in the paper. These are matched at each scale but toy: parameters within
5 %, multiply-adds within 15 % (`tests/studies/test_scales.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from coatnet import recipes, zoo
from coatnet.config import (
    AugmentConfig,
    ModelConfig,
    OptimizerConfig,
    PreprocessingConfig,
    TrainConfig,
)
from coatnet.typed import ScaleName

DATA_WANTED = "DATA"  # stands where somebody has to say which pictures
NUM_IMAGES = {"fashion-mnist": 60_000, "digits": 1_416, "letters": 100_000, DATA_WANTED: 1_281_167}  # for training


def known_num_images(data: str) -> int:
    """Return how many pictures for training one of the scales' own data sets has, without opening it."""
    name, _, number = data.partition(":")
    return int(number) if number.isdigit() else NUM_IMAGES[name]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One row of the table."""

    name: ScaleName
    summary: str
    networks: Mapping[str, ModelConfig]  # the five layouts of Figure 1
    listing_widths: tuple[int, ...]  # with which the listing has the parameters of the usual network
    splits: tuple[tuple[int, int], ...]  # blocks of (S2, S3); the first is the usual one (Table 7)
    px: int  # trained at
    larger_px: int  # fine-tuned at
    early_px: int  # where attention in S1 and S2 meets many tokens
    limited: TrainConfig  # Figure 1a: many passes over few pictures, nothing that regularises
    abundant: TrainConfig  # Figure 1b: few passes over many pictures, nothing that regularises
    usual: TrainConfig  # as one trains, augmented and regularised
    fine_tuned: TrainConfig  # after `usual`, the same pictures larger
    pretrained: TrainConfig  # for the study of transfer
    transferred: TrainConfig  # after `pretrained`, other pictures

    def on(self, data: str, num_images: int) -> Scale:
        """Return the scale with other pictures, so many for training; what is pre-trained on stays."""
        return replace(
            self,
            limited=moved(self.limited, data, num_images),
            abundant=moved(self.abundant, data, num_images),
            usual=moved(self.usual, data, num_images),
            fine_tuned=moved(self.fine_tuned, data, num_images),
            transferred=moved(self.transferred, data, num_images),
        )


def moved(config: TrainConfig, data: str, num_images: int) -> TrainConfig:
    """Return a training on other pictures: as many updates, over as many different pictures where there are so many.

    Where the scale leaves the pictures to the user it sets passes, not updates, and they stay.
    """
    if config.data == DATA_WANTED:
        return replace(config, data=data)
    own, share = known_num_images(config.data), (config.train_percent or 100) / 100
    new_share = min(1.0, own * share / num_images) if config.train_percent else 1.0
    passes = own * share / (num_images * new_share)
    return replace(
        config,
        data=data,
        num_epochs=config.num_epochs * passes,
        evaluation_interval_epochs=config.evaluation_interval_epochs * passes,
        train_percent=100 * new_share if new_share < 1 else None,
    )


_LAYOUTS = ("CCCC", "CCCT", "CCTT", "CTTT")
Shape = tuple[tuple[int, ...], tuple[int, ...]]  # depths, widths


def _networks(shapes: tuple[Shape, ...], vit: tuple[int, int, int], **shared: Any) -> dict[str, ModelConfig]:
    """Build the four layouts and ViT_rel: (blocks, width, patch size)."""
    named = dict(zip(_LAYOUTS, shapes, strict=True))
    found = {
        layout: ModelConfig(name=layout, layout=layout, depths=depths, widths=widths, **shared)
        for layout, (depths, widths) in named.items()
    }
    depth, width, patch = vit
    plain = {key: value for key, value in shared.items() if key != "strides"}
    found["ViT_rel"] = ModelConfig(
        name="ViT_rel", layout="vit_rel", depths=(depth,), widths=(width,), patch_size=patch, **plain
    )
    return found


# What narrow networks and short runs need, as in the zoo's own rows (docs/log.md).
_NARROW: dict[str, Any] = {"head": "plain", "init": "fan_in", "batch_norm_momentum": 0.1}

# fmt: off
_SMALL_NETWORKS = _networks(
    #  S0 S1 S2 S3 S4    S0  S1  S2  S3  S4
    (((2, 2, 2, 3, 1), (24, 40, 56, 64, 72)),
     ((2, 2, 2, 4, 1), (24, 48, 48, 56, 64)),
     ((2, 2, 2, 3, 1), (16, 24, 32, 64, 96)),
     ((2, 2, 2, 3, 1), (16, 24, 32, 64, 96))),
    (6, 64, 5), strides=(2, 2, 1, 1, 2), image_size=(28, 28), **_NARROW,
)
_MEDIUM_NETWORKS = _networks(
    (((2, 2, 4, 7, 2), (32, 64, 128, 192, 256)),
     ((2, 2, 3, 8, 1), (32, 64, 128, 192, 320)),
     ((2, 2, 2, 6, 1), (32, 64, 128, 192, 384)),
     ((2, 2, 2, 4, 2), (32, 64,  96, 224, 288))),
    (8, 224, 8), strides=(2, 2, 1, 2, 2), image_size=(64, 64), **_NARROW,
)
_PAPER_NETWORKS = _networks(
    (((2, 2, 4, 9, 2), (64, 96, 224, 384, 640)),
     ((2, 2, 5, 5, 2), (64, 96, 256, 352, 768)),
     ((2, 2, 5, 7, 2), (64, 96, 160, 352, 704)),
     ((2, 2, 2, 7, 2), (64, 96, 192, 320, 768))),
    (11, 416, 16),
)
# fmt: on


def _training(
    network: ModelConfig,
    data: str,
    *,
    epochs: float,
    looks: int,
    batch: int,
    optimizer: OptimizerConfig,
    augment: AugmentConfig | None = None,
    label_smoothing: float = 0.0,
    holdout_percent: float | None = 5.0,
) -> TrainConfig:
    """Build a training of so many epochs with so many looks at the pictures set apart; plain unless said otherwise."""
    return TrainConfig(
        data=data,
        out="",
        model=network,
        preprocessing=PreprocessingConfig(image_size=network.image_size, fit="resize"),
        augment=augment or AugmentConfig(crop="resize", flip_rate=0.0),
        optimizer=optimizer,
        recipe="study",
        label_smoothing=label_smoothing,
        num_epochs=epochs,
        evaluation_interval_epochs=epochs / looks,
        global_batch_size=batch,
        holdout_percent=holdout_percent,
        precision="bf16",
        checkpoint_interval_s=60.0,
        keep_last=1,
    )


_SHIFTED = AugmentConfig(crop="pad", max_shift_ratio=1 / 32, flip_rate=0.5)
_ADAMW = OptimizerConfig(peak_lr=2e-3, min_lr=1e-5, warmup_steps=50, weight_decay=0.05)
_UNDECAYED = replace(_ADAMW, weight_decay=0.0)
# In one pass over the letters AdamW leaves attention where it began (docs/log.md).
_MUON = OptimizerConfig(method="muon", peak_lr=3e-3, min_lr=1e-5, warmup_steps=50, weight_decay=0.0)
_GENTLE = OptimizerConfig(peak_lr=2e-4, min_lr=1e-5, warmup_steps=10, weight_decay=1e-8)

_ANEW = replace(_GENTLE, peak_lr=1e-3)  # for a classifier that starts anew

_CCTT = _SMALL_NETWORKS["CCTT"]
_SMALL_ABUNDANT = _training(_CCTT, "letters", holdout_percent=2.5, epochs=1, looks=8, batch=128, optimizer=_MUON)
SMALL = Scale(
    name="small",
    summary="0.3 M parameters, Fashion-MNIST and letters of typefaces at 28 px: a few hours of two cores for all",
    networks=_SMALL_NETWORKS,
    listing_widths=(16, 32, 32, 40, 96),
    splits=((2, 3), (1, 4), (3, 2)),
    px=28,
    larger_px=48,  # 384 / 224 of it
    early_px=56,
    limited=replace(
        _training(_CCTT, "fashion-mnist", epochs=16, looks=8, batch=128, optimizer=_UNDECAYED), train_percent=10
    ),
    abundant=_SMALL_ABUNDANT,
    usual=_training(
        _CCTT, "fashion-mnist", epochs=1.5, looks=6, batch=128, optimizer=_ADAMW, augment=_SHIFTED, label_smoothing=0.1
    ),
    fine_tuned=_training(
        _CCTT, "fashion-mnist", epochs=0.2, looks=2, batch=128, optimizer=_GENTLE, augment=_SHIFTED, label_smoothing=0.1
    ),
    pretrained=_SMALL_ABUNDANT,
    transferred=_training(
        _CCTT, "fashion-mnist", epochs=1, looks=4, batch=128, optimizer=_ANEW, augment=_SHIFTED, label_smoothing=0.1
    ),
)


_TOY_NETWORKS = {
    row: replace(model, depths=(3,) if row == "ViT_rel" else (1, 1, 2, 2, 1)) for row, model in _SMALL_NETWORKS.items()
}


def _toy(config: TrainConfig) -> TrainConfig:
    network = replace(_TOY_NETWORKS["CCTT"], image_size=(8, 8))
    optimizer = replace(config.optimizer, warmup_steps=4)
    made = _training(network, "digits", epochs=1, looks=2, batch=64, optimizer=optimizer, holdout_percent=10)
    return replace(made, train_percent=config.train_percent, precision="fp32")


TOY = replace(
    SMALL,
    name="toy",
    networks=_TOY_NETWORKS,
    listing_widths=(16, 24, 32, 48, 80),
    splits=((2, 2), (1, 3), (3, 1)),
    summary="0.2 M parameters, scikit-learn's digits at 8 px: a minute, to see a study work; its answers mean nothing",
    px=8,
    larger_px=16,
    early_px=16,
    limited=_toy(SMALL.limited),
    abundant=_toy(SMALL.abundant),
    usual=_toy(SMALL.usual),
    fine_tuned=replace(_toy(SMALL.fine_tuned), num_epochs=0.5, evaluation_interval_epochs=0.5),
    pretrained=_toy(SMALL.pretrained),
    transferred=_toy(SMALL.transferred),
)

_SAMPLED = AugmentConfig(crop="random_resized", crop_min_scale=0.35)
_MEDIUM_ABUNDANT = _training(
    _MEDIUM_NETWORKS["CCTT"], "letters:1000000", holdout_percent=1, epochs=3, looks=30, batch=256, optimizer=_UNDECAYED
)
MEDIUM = Scale(
    name="medium",
    summary="4.8 M parameters, letters or pictures of your own at 64 px: a day of one GPU for all",
    networks=_MEDIUM_NETWORKS,
    listing_widths=(32, 64, 128, 208, 480),
    splits=((2, 6), (1, 7), (4, 4)),
    px=64,
    larger_px=112,
    early_px=128,
    limited=_training(
        _MEDIUM_NETWORKS["CCTT"], "fashion-mnist", epochs=60, looks=30, batch=256, optimizer=_UNDECAYED
    ),
    abundant=_MEDIUM_ABUNDANT,
    usual=_training(
        _MEDIUM_NETWORKS["CCTT"], "letters:200000", epochs=20, looks=20, batch=256, optimizer=_ADAMW,
        augment=_SAMPLED, label_smoothing=0.1,
    ),
    fine_tuned=_training(
        _MEDIUM_NETWORKS["CCTT"], "letters:200000", epochs=2, looks=2, batch=256, optimizer=_GENTLE,
        augment=_SAMPLED, label_smoothing=0.1,
    ),
    pretrained=_MEDIUM_ABUNDANT,
    transferred=_training(
        _MEDIUM_NETWORKS["CCTT"], "fashion-mnist", epochs=10, looks=5, batch=256, optimizer=_ANEW,
        augment=_SAMPLED, label_smoothing=0.1,
    ),
)  # fmt: skip


def _tabled(recipe_name: str, network: ModelConfig, px: int, looks: int) -> TrainConfig:
    """Return the paper's recipe (Table 10) for a network."""
    found = recipes.find(recipe_name)
    settings = found.settings(network, (px, px), 1_281_167)
    return TrainConfig(
        data=DATA_WANTED, out="", precision="bf16", evaluation_interval_epochs=settings["num_epochs"] / looks,
        holdout_percent=None, **settings,
    )  # fmt: skip


def _unregularised(network: ModelConfig, epochs: float, looks: int) -> TrainConfig:
    """Return Figure 1's training: Table 10's batch and rates, without augmentation and regularisation."""
    optimizer = replace(recipes.find("imagenet_1k").optimizer, weight_decay=0.0)
    return _training(
        network, DATA_WANTED, epochs=epochs, looks=looks, batch=4096, optimizer=optimizer, holdout_percent=None
    )


_C2 = zoo.find("coatnet_2").config  # Tables 6 to 8
PAPER = Scale(
    name="paper",
    summary="25 M parameters, ImageNet at 224 px (give --data): the paper's own setting, for a cluster",
    networks=_PAPER_NETWORKS,
    listing_widths=(128, 128, 256, 608, 1216),
    splits=((6, 14), (2, 18), (8, 12)),
    px=224,
    larger_px=384,
    early_px=224,
    limited=_unregularised(_PAPER_NETWORKS["CCTT"], 300, 60),
    abundant=_unregularised(_PAPER_NETWORKS["CCTT"], 3, 30),
    usual=_tabled("imagenet_1k", _C2, 224, 60),
    fine_tuned=_tabled("imagenet_1k_finetune", _C2, 384, 10),
    pretrained=_unregularised(_PAPER_NETWORKS["CCTT"], 3, 30),
    transferred=_tabled("imagenet_21k_to_1k", _PAPER_NETWORKS["CCTT"], 224, 10),
)

SCALES = {scale.name: scale for scale in (TOY, SMALL, MEDIUM, PAPER)}
