"""Configs: every refusal once, saying what was met and what is allowed; JSON both ways."""

from __future__ import annotations

import json
import re
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coatnet.config import (
    AugmentConfig,
    Config,
    ModelConfig,
    OptimizerConfig,
    PreprocessingConfig,
    TrainConfig,
)
from coatnet.errors import ConfigError

MODEL = ModelConfig(depths=(2, 2, 3, 5, 2), widths=(64, 96, 192, 384, 768))
TRAIN = TrainConfig(data="pictures", out="run", model=MODEL)
VIT = replace(MODEL, layout="vit_rel", depths=(12,), widths=(384,))
LISTING = replace(MODEL, blocks="listing", head="plain", widths=(128, 128, 256, 512, 1026))

REFUSALS: list[tuple[Config, dict[str, Any], str, str]] = [  # config, change, what was met, what is allowed
    (MODEL, {"layout": "TTCC"}, "layout is 'TTCC'", "C before T"),
    (MODEL, {"layout": "CCT"}, "layout is 'CCT'", "four letters"),
    (MODEL, {"layout": "cctt"}, "layout is 'cctt'", "or 'vit_rel'"),
    (MODEL, {"depths": (2, 2, 3, 5)}, "depths is (2, 2, 3, 5)", "5 whole numbers of 1 or more, for S0 .. S4"),
    (MODEL, {"depths": (2, 2, 3, 5, 0)}, "depths is (2, 2, 3, 5, 0)", "1 or more"),
    (MODEL, {"depths": (2, 2, 3, 5, 2.5)}, "depths is (2, 2, 3, 5, 2.5)", "a list of whole numbers"),
    (MODEL, {"depths": 5}, "depths is 5", "must be a list"),
    (MODEL, {"widths": (64, 96)}, "widths is (64, 96)", "5 whole numbers"),
    (VIT, {"widths": (384, 384)}, "widths is (384, 384)", "1 whole number of 1 or more for vit_rel"),
    (VIT, {"depths": (2, 2, 3, 5, 2)}, "depths is (2, 2, 3, 5, 2)", "1 whole number of 1 or more for vit_rel"),
    (MODEL, {"strides": (2, 2, 2, 2)}, "strides is (2, 2, 2, 2)", "five numbers"),
    (MODEL, {"strides": (4, 2, 2, 2, 2)}, "strides is (4, 2, 2, 2, 2)", "each 1 or 2"),
    (MODEL, {"strides": (2.0, 2, 2, 2, 2)}, "strides is (2.0, 2, 2, 2, 2)", "a list of whole numbers"),
    (MODEL, {"layout": "CCCT", "s3_mbconv": (8, 768)}, "s3_mbconv is (8, 768) in layout CCCT", "S3 must be T"),
    (VIT, {"s3_mbconv": (8, 768)}, "s3_mbconv is (8, 768) in layout vit_rel", "S3 must be T"),
    (MODEL, {"s3_mbconv": (0, 768)}, "s3_mbconv is (0, 768)", "(blocks, channels)"),
    (MODEL, {"s3_mbconv": (8,)}, "s3_mbconv is (8,)", "(blocks, channels)"),
    (MODEL, {"s3_mbconv": (8.5, 768)}, "s3_mbconv is (8.5, 768)", "a list of whole numbers"),
    (MODEL, {"s3_mbconv": ("8", 768)}, "s3_mbconv is ('8', 768)", "a list of whole numbers"),
    (MODEL, {"head_dim": 50}, "An attention stage of 384 channels has no whole number of heads of 50", "that divides"),
    (MODEL, {"head_dim": 0}, "head_dim is 0", "1 or more"),
    (VIT, {"head_dim": 100}, "An attention stage of 384 channels", "head_dim that divides it"),
    (MODEL, {"window_size": 0}, "window_size is 0", "1 or more"),
    (VIT, {"patch_size": -1}, "patch_size is -1", "1 or more"),
    (MODEL, {"in_channels": 0}, "in_channels is 0", "1 or more"),
    (MODEL, {"num_classes": 0}, "num_classes is 0", "1 or more"),
    (MODEL, {"num_classes": "10"}, "num_classes is '10'", "must be int"),
    (MODEL, {"num_classes": True}, "num_classes is True", "must be int"),
    (MODEL, {"image_size": (224,)}, "image_size is (224,)", "(height, width) in px"),
    (MODEL, {"image_size": (224, 0)}, "image_size is (224, 0)", "each 1 to 16384"),
    (MODEL, {"image_size": (224.0, 224)}, "image_size is (224.0, 224)", "a list of whole numbers"),
    (MODEL, {"stochastic_depth_rate": 1.0}, "stochastic_depth_rate is 1.0", "at least 0 and below 1"),
    (MODEL, {"batch_norm_momentum": -0.1}, "batch_norm_momentum is -0.1", "at least 0 and below 1"),
    (
        MODEL,
        {"relative_attention": "prae"},
        "relative_attention is 'prae'",
        "one of 'pre', 'post', 'none'",
    ),
    (MODEL, {"attention": "windows"}, "attention is 'windows'", "one of 'global', 'window', 'linear'"),
    (MODEL, {"mbconv_norm": "group"}, "mbconv_norm is 'group'", "one of 'batch', 'layer'"),
    (MODEL, {"stride_in": "shortcut"}, "stride_in is 'shortcut'", "one of 'expand', 'depthwise'"),
    (MODEL, {"blocks": "timm"}, "blocks is 'timm'", "one of 'paper', 'listing'"),
    (MODEL, {"blocks": "listing"}, "head is 'dense' with blocks 'listing'", "must be 'plain' there"),
    (LISTING, {"layout": "vit_rel", "depths": (5,), "widths": (64,)}, "layout is 'vit_rel' with blocks", "C and T"),
    (LISTING, {"head_dim": 64}, "head_dim is 64 with blocks 'listing'", "must be 32 there"),
    (LISTING, {"s3_mbconv": (2, 96)}, "s3_mbconv is (2, 96) with blocks 'listing'", "must be None there"),
    (LISTING, {"relative_attention": "post"}, "relative_attention is 'post' with blocks", "must be 'pre' there"),
    (LISTING, {"attention": "window"}, "attention is 'window' with blocks 'listing'", "must be 'global' there"),
    (LISTING, {"mbconv_norm": "layer"}, "mbconv_norm is 'layer' with blocks 'listing'", "must be 'batch' there"),
    (LISTING, {"stride_in": "depthwise"}, "stride_in is 'depthwise' with blocks", "must be 'expand' there"),
    (LISTING, {"stochastic_depth_rate": 0.1}, "stochastic_depth_rate is 0.1 with blocks", "must be 0.0 there"),
    (LISTING, {"blocks": "paper"}, "An attention stage of 1026 channels has no whole number of heads of 32", "divides"),
    (MODEL, {"name": 5}, "name is 5", "must be str"),
    (PreprocessingConfig(), {"image_size": (0, 5)}, "image_size is (0, 5)", "each 1 to 16384"),
    (PreprocessingConfig(), {"crop_ratio": 0.0}, "crop_ratio is 0.0", "above 0 and at most 1"),
    (PreprocessingConfig(), {"crop_ratio": 1.5}, "crop_ratio is 1.5", "above 0 and at most 1"),
    (PreprocessingConfig(), {"fit": "stretch"}, "fit is 'stretch'", "'crop', 'resize'"),
    (PreprocessingConfig(), {"mean": (0.5,)}, "mean (0.5,) and std (0.229, 0.224, 0.225)", "one of each"),
    (PreprocessingConfig(), {"mean": ("a", 0.5, 0.5)}, "mean is ('a', 0.5, 0.5)", "a list of numbers"),
    (PreprocessingConfig(), {"std": (0.2, 0.2, 0.0)}, "std (0.2, 0.2, 0.0)", "std above 0"),
    (AugmentConfig(), {"crop_min_scale": 0.0}, "crop_min_scale is 0.0", "above 0 and at most 1"),
    (AugmentConfig(), {"max_shift_ratio": 1.0}, "max_shift_ratio is 1.0", "at least 0 and below 1"),
    (AugmentConfig(), {"randaugment_ops": -1}, "randaugment_ops is -1", "0 or more"),
    (AugmentConfig(), {"randaugment_magnitude": 31.0}, "randaugment_magnitude is 31.0", "10 is the full range"),
    (AugmentConfig(), {"flip_rate": 1.5}, "flip_rate is 1.5", "0 to 1"),
    (AugmentConfig(), {"erase_rate": -0.5}, "erase_rate is -0.5", "0 to 1"),
    (AugmentConfig(), {"mix_share": 1.5}, "mix_share is 1.5", "0 to 1"),
    (AugmentConfig(), {"mixup_alpha": 0.0}, "mixup_alpha is 0.0", "above 0"),
    (AugmentConfig(), {"cutmix_alpha": -1.0}, "cutmix_alpha is -1.0", "above 0"),
    (OptimizerConfig(), {"peak_lr": 0.0}, "peak_lr is 0.0", "above 0"),
    (OptimizerConfig(), {"max_grad_norm": 0.0}, "max_grad_norm is 0.0", "above 0"),
    (OptimizerConfig(), {"min_lr": 1.0}, "min_lr is 1.0", "0 to peak_lr, 0.001"),
    (OptimizerConfig(), {"warmup_steps": -1}, "warmup_steps is -1", "0 or more"),
    (OptimizerConfig(), {"weight_decay": -1.0}, "weight_decay is -1.0", "0 or more"),
    (OptimizerConfig(), {"beta1": 1.0}, "beta1 is 1.0", "below 1"),
    (OptimizerConfig(), {"beta2": -1.0}, "beta2 is -1.0", "at least 0"),
    (OptimizerConfig(), {"method": "sgd"}, "method is 'sgd'", "one of 'adamw', 'muon'"),
    (OptimizerConfig(), {"schedule": "cosin"}, "schedule is 'cosin'", "one of 'cosine', 'linear', 'constant'"),
    (TRAIN, {"label_smoothing": 1.0}, "label_smoothing is 1.0", "below 1"),
    (TRAIN, {"ema_decay": 1.0}, "ema_decay is 1.0", "below 1"),
    (TRAIN, {"num_epochs": 0.0}, "num_epochs is 0.0", "above 0"),
    (TRAIN, {"global_batch_size": 0}, "global_batch_size is 0", "above 0"),
    (TRAIN, {"microbatch_size": 0}, "microbatch_size is 0", "above 0"),
    (TRAIN, {"max_time_s": -1.0}, "max_time_s is -1.0", "above 0"),
    (TRAIN, {"patience_epochs": 0}, "patience_epochs is 0", "above 0"),
    (TRAIN, {"checkpoint_interval_s": 0.0}, "checkpoint_interval_s is 0.0", "above 0"),
    (TRAIN, {"evaluation_interval_epochs": 0.0}, "evaluation_interval_epochs is 0.0", "above 0"),
    (TRAIN, {"num_workers": -1}, "num_workers is -1", "0 or more"),
    (TRAIN, {"seed": -1}, "seed is -1", "0 or more"),
    (TRAIN, {"holdout_percent": 60.0}, "holdout_percent is 60.0", "at most 50"),
    (TRAIN, {"train_percent": 0.0}, "train_percent is 0.0", "above 0, at most 100"),
    (TRAIN, {"train_percent": 101.0}, "train_percent is 101.0", "above 0, at most 100"),
    (TRAIN, {"precision": "fp16"}, "precision is 'fp16'", "one of 'fp32', 'bf16'"),
    (TRAIN, {"compile": 1}, "compile is 1", "must be bool"),
    (TRAIN, {"freeze": "S5"}, "freeze is 'S5'", "'S0', 'S1', 'S2', 'S3', 'S4'"),
    (
        TRAIN,
        {"preprocessing": PreprocessingConfig(image_size=(96, 96))},
        "preprocessing gives (96, 96) px, the model's tables fit (224, 224)",
        "Make them equal",
    ),
]


@pytest.mark.parametrize(("config", "changes", "met", "allowed"), REFUSALS, ids=lambda value: str(value)[:40])
def test_refusal_says_what_was_met_and_what_is_allowed(config: Any, changes: dict[str, Any], met: str, allowed: str):
    with pytest.raises(ConfigError, match=re.escape(met)) as refusal:
        replace(config, **changes)
    message = str(refusal.value)
    assert allowed in message
    assert message.endswith((".", "?.")), "a sentence"
    assert "\n" not in message


def test_config_is_frozen():
    with pytest.raises(FrozenInstanceError):
        MODEL.head_dim = 64  # type: ignore[misc]


def test_equal_configs_have_equal_hashes():
    assert hash(replace(MODEL)) == hash(MODEL)
    assert replace(MODEL, name="other") != MODEL


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (ModelConfig, {"head_dims": 32}, "ModelConfig has no field 'head_dims'. Did you mean 'head_dim'?"),
        (ModelConfig, {"zzz": 1}, "ModelConfig has no field 'zzz'. There are: name, depths, widths"),
        (
            TrainConfig,
            {"optimizer": {"peek_lr": 1.0}},
            "OptimizerConfig has no field 'peek_lr'. Did you mean 'peak_lr'?",
        ),
        (ModelConfig, {"depths": [1, 1, 1, 1, 1]}, "ModelConfig: "),
        (
            TrainConfig,
            {"data": "d", "out": "o", "model": "coatnet_0"},
            "model is 'coatnet_0'. It must be a ModelConfig",
        ),
    ],
)
def test_data_that_fit_no_config_are_refused(kind: type[Config], values: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        kind.from_dict(values)


def test_missing_field_is_named():
    with pytest.raises(ConfigError, match="widths"):
        ModelConfig.from_dict({"depths": [1, 1, 1, 1, 1]})


@pytest.mark.parametrize(
    ("size", "strides", "grids"),
    [
        ((224, 224), (2, 2, 2, 2, 2), ((112, 112), (56, 56), (28, 28), (14, 14), (7, 7))),
        ((1, 1), (2, 2, 2, 2, 2), ((1, 1),) * 5),
        ((37, 90), (1, 2, 2, 1, 2), ((37, 90), (19, 45), (10, 23), (10, 23), (5, 12))),
    ],
)
def test_grids_are_ceil_of_half(size: Any, strides: Any, grids: Any):
    assert replace(MODEL, image_size=size, strides=strides).grids == grids


def test_vit_rel_has_one_grid():
    assert replace(VIT, image_size=(224, 100), patch_size=16).grids == ((14, 7),)


MODELS = st.builds(
    ModelConfig,
    depths=st.tuples(*[st.integers(1, 9)] * 5),
    widths=st.tuples(*[st.integers(1, 9).map(lambda n: 8 * n)] * 5),
    layout=st.sampled_from(["CCCC", "CCCT", "CCTT", "CTTT", "TTTT"]),
    strides=st.tuples(*[st.sampled_from([1, 2])] * 5),
    head_dim=st.sampled_from([1, 2, 4, 8]),
    relative_attention=st.sampled_from(["pre", "post", "none"]),
    attention=st.sampled_from(["global", "window", "linear"]),
    mbconv_norm=st.sampled_from(["batch", "layer"]),
    stride_in=st.sampled_from(["expand", "depthwise"]),
    stochastic_depth_rate=st.floats(0, 0.99),
    image_size=st.tuples(st.integers(1, 600), st.integers(1, 600)),
    num_classes=st.integers(1, 22_000),
)


MEANS = (0.5, 0.25, 0.125)


@given(
    model=MODELS.filter(lambda model: model.in_channels in (1, 3)),
    ema=st.none() | st.floats(0, 0.9999),
    alpha=st.none() | st.floats(0.01, 2),
    seed=st.integers(0, 2**62),
)
def test_json_carries_a_config_both_ways(model: ModelConfig, ema: float | None, alpha: float | None, seed: int):
    config = TrainConfig(
        data="d",
        out="o",
        model=model,
        preprocessing=PreprocessingConfig(
            image_size=model.image_size, mean=MEANS[: model.in_channels], std=MEANS[: model.in_channels]
        ),
        augment=AugmentConfig(mixup_alpha=alpha),
        ema_decay=ema,
        seed=seed,
    )
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_json_carries_both_kinds_of_s3():
    config = replace(MODEL, s3_mbconv=(8, 768))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
