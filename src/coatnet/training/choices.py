"""Settings chosen from the data and the machine, with the reason for each; what the user gives is never overruled."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch

from coatnet import recipes, zoo
from coatnet.config import Size, TrainConfig
from coatnet.data.sources import measure, open_data
from coatnet.errors import ConfigError
from coatnet.ranks import find_device

TINY_PX = 40  # pictures of up to this side are taken as they are
SIZES_PX = {"cpu": (64, 96, 128), "accelerator": (64, 96, 128, 160, 224)}
SAMPLES_WANTED = 1_200_000  # seen in a whole run, augmented anew each time
EPOCHS = (15, 100)  # fewest and most, for own recipes
NUM_IMAGES_FOR_LARGE_BATCH = 20_000


def choose_config(data: str, out: str, given: dict[str, Any]) -> tuple[TrainConfig, list[str]]:
    """Return the whole config of a run and a line for each choice that was made.

    `given` holds what the user set: model, recipe, image_size, and any field of TrainConfig, AugmentConfig,
    OptimizerConfig or ModelConfig that one run may vary (see `_FIELDS`).
    """
    given = {name: value for name, value in given.items() if value is not None}
    reasons: list[str] = []
    holdout = given.get("holdout_percent", 10.0)
    pictures = open_data(data, seed=given.get("seed", 0), holdout_percent=holdout)
    num_images, median = len(pictures.train), measure(pictures.train)
    device = find_device(given.pop("device", "auto")).type
    reasons.append(f"device {device}: the best at hand" if device != "cpu" else "device cpu: no accelerator at hand")

    image_size = given.pop("image_size", None) or _choose_size(median, device, reasons)
    row = zoo.find(given.pop("model", None) or _choose_model(image_size, device, reasons))
    recipe = recipes.find(given.pop("recipe", None) or _choose_recipe(image_size, "init" in given, reasons))
    model = replace(row.config, num_classes=len(pictures.class_names), image_size=image_size)
    settings = recipe.settings(model, image_size, num_images)
    if recipe.ours:
        settings |= _choose_length(num_images, settings, given, reasons)
    settings |= _choose_speed(device, reasons)
    return _with_given(TrainConfig(data=data, out=out, **settings), given), reasons


def _choose_size(median: Size, device: str, reasons: list[str]) -> Size:
    side = min(median)
    if side <= TINY_PX:
        px = max(4, -(-side // 4) * 4)
        reasons.append(f"image size {px} px: the pictures are {median[0]} x {median[1]}, small enough to keep whole")
        return (px, px)
    sizes = SIZES_PX["cpu" if device == "cpu" else "accelerator"]
    px = min(sizes, key=lambda size: abs(size - side)) if side < sizes[-1] else sizes[-1]
    reasons.append(f"image size {px} px: the pictures are {median[0]} x {median[1]} (median), what a {device} affords")
    return (px, px)


def _choose_model(image_size: Size, device: str, reasons: list[str]) -> str:
    if device != "cpu" and min(image_size) >= 160:
        name = "coatnet_0"
    else:
        name = "coatnet_nano" if device == "cpu" else "coatnet_tiny"
    reasons.append(f"model {name}: for {image_size[0]} px on a {device}")
    return name


def _choose_recipe(image_size: Size, starts_trained: bool, reasons: list[str]) -> str:
    if starts_trained:
        name, why = "small_finetune", "starting from a trained model"
    elif max(image_size) <= TINY_PX:
        name, why = "tiny_pictures", "tiny pictures lose too much when they are cropped and magnified"
    else:
        name, why = "small_scratch", "from scratch on a set of this kind"
    reasons.append(f"recipe {name}: {why}")
    return name


def _choose_length(
    num_images: int, settings: dict[str, Any], given: dict[str, Any], reasons: list[str]
) -> dict[str, Any]:
    """Choose batch and epochs of our own recipes by the amount of data."""
    batch = settings["global_batch_size"]
    while batch > 16 and batch * 20 > num_images:
        batch //= 2
    fine_tunes = "init" in given
    least, most = EPOCHS
    epochs = settings["num_epochs"] if fine_tunes else float(min(most, max(least, round(SAMPLES_WANTED / num_images))))
    steps = round(epochs * num_images / batch)
    optimizer = settings["optimizer"]
    if optimizer.warmup_steps > steps // 10:
        optimizer = replace(optimizer, warmup_steps=steps // 10)
    if "num_epochs" not in given and "max_time_s" not in given:
        reasons.append(f"{epochs:g} epochs, batch {batch}: {num_images} training pictures, {steps} updates")
    interval = max(1.0, epochs // 25)  # some 25 points make a curve
    return {
        "num_epochs": epochs,
        "global_batch_size": batch,
        "optimizer": optimizer,
        "evaluation_interval_epochs": interval,
    }


def _choose_speed(device: str, reasons: list[str]) -> dict[str, Any]:
    """Choose precision and workers by what the machine does fast."""
    if device == "cuda":
        fast, why = torch.cuda.is_bf16_supported(), "this GPU computes in it"
    elif device == "cpu":
        fast, why = torch.cpu._is_avx512_bf16_supported(), "this CPU has instructions for it"  # pyright: ignore
    else:
        fast, why = False, ""
    if fast:
        reasons.append(f"precision bf16: {why}")
    workers = 0 if device == "cpu" else min(8, os.cpu_count() or 1)
    return {"device": device, "precision": "bf16" if fast else "fp32", "num_workers": workers}


_FIELDS = ("augment", "optimizer", "model")  # parts of TrainConfig whose fields the user may give by name


def _with_given(config: TrainConfig, given: dict[str, Any]) -> TrainConfig:
    """Set each given field where it lives: in TrainConfig or in one of its parts."""
    for name, value in given.items():
        if hasattr(config, name) and name not in _FIELDS:
            config = replace(config, **{name: value})
            continue
        part = next((part for part in _FIELDS if hasattr(getattr(config, part), name)), None)
        if part is None:
            raise ConfigError(f"There is no setting '{name}'.")
        config = replace(config, **{part: replace(getattr(config, part), **{name: value})})
    return config
