"""Settings chosen from the data and the machine, with the reason for each; what the user gives is never overruled."""

from __future__ import annotations

import math
import os
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from coatnet import recipes, zoo
from coatnet.classifier import read_model_config
from coatnet.config import ModelConfig, OptimizerConfig, Size, TrainConfig
from coatnet.data.sources import measure, open_data
from coatnet.errors import ConfigError, name_hint
from coatnet.layout import count
from coatnet.ranks import find_device

TINY_PX = 40  # pictures of up to this side are taken as they are
SIZES_PX = {"cpu": (64, 96, 128), "accelerator": (64, 96, 128, 160, 224)}
SAMPLES_WANTED = 1_200_000  # seen in a whole run, augmented anew each time
GMACS_OF_A_CPU = 30_000  # multiply-adds forward, in G, that a run on a CPU may take, lest it take all day
EPOCHS = (15, 100)  # fewest and most, for own recipes


def choose_config(data: str, out: str, given: dict[str, Any]) -> tuple[TrainConfig, list[str]]:
    """Return the whole config of a run and a line for each choice that was made.

    `given` holds what the user set: model, recipe, image_size (height, width), and any field of TrainConfig,
    AugmentConfig, OptimizerConfig or ModelConfig; None turns off what a recipe has on.
    Raises: ConfigError, DataError, ModelFileError.
    """
    given, reasons = dict(given), list[str]()
    holdout = given.get("holdout_percent", 10.0)
    seed, share = given.get("seed", 0), given.get("train_percent")
    pictures = open_data(data, seed=seed, holdout_percent=holdout, train_percent=share)
    num_images, median = len(pictures.train), measure(pictures.train)
    device = _choose_device(given.pop("device", "auto"), reasons)

    image_size = given.pop("image_size", None) or _choose_size(median, device.type, reasons)
    model = _choose_model(given.pop("model", None), given.get("init"), image_size, device.type, reasons)
    recipe = recipes.find(given.pop("recipe", None) or _choose_recipe(image_size, bool(given.get("init")), reasons))
    own_batch = recipe.global_batch_size
    recipe = replace(recipe, global_batch_size=given.get("global_batch_size", own_batch))
    model = replace(model, num_classes=len(pictures.class_names), image_size=image_size)
    settings = recipe.settings(model, image_size, num_images)
    if recipe.ours:
        settings |= _choose_length(num_images, device.type, settings, given, reasons)
        settings["optimizer"] = _fit_rate(own_batch, settings, given, reasons)
    settings["optimizer"] = _fit_warmup(num_images, settings | given, settings["optimizer"], reasons)
    if given.get("freeze") and not given.get("init"):
        reasons.append(f"freeze {given['freeze']} without --init: weights that were never trained stay as they are")
    settings |= {"device": str(device), **_choose_speed(device, given, reasons)}
    return _with_given(TrainConfig(data=data, out=out, **settings), given), reasons


def _choose_device(name: str, reasons: list[str]) -> torch.device:
    device = find_device(name)
    if name == "auto":
        reasons.append(
            f"device {device}: " + ("no accelerator at hand" if device.type == "cpu" else "the best at hand")
        )
    return device


def _choose_size(median: Size, device: str, reasons: list[str]) -> Size:
    if max(median) <= TINY_PX:
        height, width = (max(4, -(-side // 4) * 4) for side in median)
        px = str(height) if height == width else f"{height} x {width}"
        reasons.append(f"image size {px} px: the pictures are {median[0]} x {median[1]}, small enough to keep whole")
        return (height, width)
    side = min(median)
    sizes = SIZES_PX["cpu" if device == "cpu" else "accelerator"]
    px = min(sizes, key=lambda size: abs(size - side)) if side < sizes[-1] else sizes[-1]
    reasons.append(f"image size {px} px: the pictures are {median[0]} x {median[1]} (median), what a {device} affords")
    return (px, px)


def _choose_model(name: str | None, init: str | None, image_size: Size, device: str, reasons: list[str]) -> ModelConfig:
    if name is not None:
        return zoo.find(name).config
    if init is not None and Path(init).is_dir():
        config = read_model_config(init)
        reasons.append(f"model {config.name}: that of {init}")
        return config
    if device != "cpu" and min(image_size) >= 160:
        name = "coatnet_0"
    else:
        name = "coatnet_nano" if device == "cpu" else "coatnet_tiny"
    reasons.append(f"model {name}: for {image_size[0]} px on a {device}")
    return zoo.find(name).config


def _choose_recipe(image_size: Size, starts_trained: bool, reasons: list[str]) -> str:
    if starts_trained and max(image_size) <= TINY_PX:
        name, why = "tiny_finetune", "starting from a trained model, on tiny pictures"
    elif starts_trained:
        name, why = "small_finetune", "starting from a trained model"
    elif max(image_size) <= TINY_PX:
        name, why = "tiny_pictures", "tiny pictures lose too much when they are cropped and magnified"
    else:
        name, why = "small_scratch", "from scratch on a set of this kind"
    reasons.append(f"recipe {name}: {why}")
    return name


def _choose_length(
    num_images: int, device: str, settings: dict[str, Any], given: dict[str, Any], reasons: list[str]
) -> dict[str, Any]:
    """Choose batch and epochs of our own recipes by the data and what the device affords."""
    batch = settings["global_batch_size"]
    while "global_batch_size" not in given and batch > 16 and batch * 20 > num_images:
        batch //= 2
    least, most = EPOCHS
    affordable = GMACS_OF_A_CPU / count(settings["model"]).gmacs if device == "cpu" else SAMPLES_WANTED
    epochs = float(min(most, max(least, round(min(SAMPLES_WANTED, affordable) / num_images))))
    if given.get("init"):
        epochs = settings["num_epochs"]
    epochs = given.get("num_epochs", epochs)
    steps = round(epochs * num_images / batch)
    if "num_epochs" not in given:
        at_most = "at most " if "max_time_s" in given else ""
        reasons.append(f"{at_most}{epochs:g} epochs: {num_images} training pictures, {steps} updates")
    if "global_batch_size" not in given:
        reasons.append(f"batch {batch}: recipe {settings['recipe']} with {num_images} training pictures")
    interval = 1.0 if "patience_epochs" in given else max(1.0, epochs // 25)  # some 25 points make a curve
    return {
        "num_epochs": epochs,
        "global_batch_size": batch,
        "evaluation_interval_epochs": interval,
    }


def _fit_rate(own_batch: int, settings: dict[str, Any], given: dict[str, Any], reasons: list[str]) -> OptimizerConfig:
    """Scale a Muon recipe's rate to another batch than its own by the square root, as was measured (docs/log.md)."""
    batch, optimizer = settings["global_batch_size"], settings["optimizer"]
    if batch == own_batch or "peak_lr" in given or optimizer.method != "muon":
        return optimizer
    peak_lr = float(f"{optimizer.peak_lr * math.sqrt(batch / own_batch):.2g}")
    reasons.append(f"peak rate {peak_lr:g}: the recipe's {optimizer.peak_lr:g} is for batch {own_batch}")
    return replace(optimizer, peak_lr=peak_lr, min_lr=min(optimizer.min_lr, peak_lr))


def _fit_warmup(
    num_images: int, settings: dict[str, Any], optimizer: OptimizerConfig, reasons: list[str]
) -> OptimizerConfig:
    """Cut a warm-up that would take most of the run, made for more data or more epochs, to a tenth of it."""
    steps = round(settings["num_epochs"] * num_images / settings["global_batch_size"])
    wanted = optimizer.warmup_steps
    if wanted <= steps // 10 or (wanted <= steps // 2 and not recipes.find(settings["recipe"]).ours):
        return optimizer
    reasons.append(f"warm-up {steps // 10} updates, not the recipe's {wanted}: the run has {steps}")
    return replace(optimizer, warmup_steps=steps // 10)


def num_workers_for(device: torch.device) -> int:
    """Return how many processes should read pictures: none beside a processor that computes, some for a card."""
    return 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)


def _choose_speed(device: torch.device, given: dict[str, Any], reasons: list[str]) -> dict[str, Any]:
    """Choose precision and workers by what the machine does fast."""
    if device.type == "cuda":
        fast, why = torch.cuda.is_bf16_supported(), "this GPU computes in it"
    elif device.type == "cpu":
        fast, why = torch.cpu._is_avx512_bf16_supported(), "this CPU has instructions for it"  # pyright: ignore
    else:
        fast, why = False, ""
    if fast and "precision" not in given:
        reasons.append(f"precision bf16: {why}")
    workers = num_workers_for(device)
    if workers and "num_workers" not in given:
        reasons.append(f"{workers} workers: pictures are read while the {device.type} computes")
    return {"precision": "bf16" if fast else "fp32", "num_workers": workers}


def differing(config: TrainConfig, given: dict[str, Any]) -> list[str]:
    """Return the names of the given settings that are others than a run's. Raises: ConfigError for unknown ones."""
    own = {"model": config.model.name, "recipe": config.recipe, "image_size": config.model.image_size}
    names = [name for name in own if name in given and given[name] != own[name]]
    for name, value in given.items():
        if name not in own and not (name == "device" and value == "auto"):
            names += [name] if _with_given(config, {name: value}) != config else []
    return names


_PARTS = ("augment", "optimizer", "model")  # of TrainConfig, whose fields the user may give by name


def _with_given(config: TrainConfig, given: dict[str, Any]) -> TrainConfig:
    """Set each given field where it lives: in TrainConfig or in one of its parts."""
    places: dict[str, dict[str, Any]] = {part: {} for part in ("", *_PARTS)}
    for name, value in given.items():
        places[_place_of(name, config)][name] = value
    if "peak_lr" in given and "min_lr" not in given:  # a peak below the recipe's end is a lower end too
        places["optimizer"]["min_lr"] = min(config.optimizer.min_lr, given["peak_lr"])
    parts = {part: replace(getattr(config, part), **places[part]) for part in _PARTS}
    return replace(config, **parts, **places[""])


def _place_of(name: str, config: TrainConfig) -> str:
    """Return the part that has a field of this name, "" for the config itself. Raises: ConfigError."""
    own = [field.name for field in fields(config) if field.name not in _PARTS]
    names = {"": own} | {part: [field.name for field in fields(getattr(config, part))] for part in _PARTS}
    for part, known in names.items():
        if name in known:
            return part
    raise ConfigError(f"There is no setting '{name}'. {name_hint(name, chain.from_iterable(names.values()))}")
