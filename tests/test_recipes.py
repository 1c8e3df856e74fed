"""Recipes: Table 10 of the paper, cell by cell, and what a row gives to a run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from coatnet import zoo
from coatnet.config import TrainConfig
from coatnet.errors import ConfigError
from coatnet.recipes import RECIPES, find

NUM_IMAGES = 1_281_167
LARGE = {
    "global_batch_size": 4096,
    "schedule": "cosine",
    "peak_lr": 1e-3,
    "min_lr": 1e-5,
    "ema_decay": None,
    "fit": "crop",
}
FINE = {
    "schedule": "constant",
    "peak_lr": 5e-5,
    "min_lr": 5e-5,
    "warmup_steps": 0,
    "weight_decay": 1e-8,
    "ema_decay": 0.9999,
    "fit": "resize",
    "num_epochs": 30,
    "loss": "softmax",
    "label_smoothing": 0.1,
}
SIGMOID = {"loss": "sigmoid", "label_smoothing": 0.0001, "schedule": "linear", "weight_decay": 0.01}

# arXiv 2106.04803, Table 10: what holds for a whole column, then what differs by model, {0: ...} being coatnet_0.
COLUMNS: dict[str, tuple[dict[str, Any], dict[int, dict[str, Any]]]] = {
    "imagenet_1k": (
        LARGE | {
            "randaugment": (2, 15), "mixup_alpha": 0.8, "loss": "softmax", "label_smoothing": 0.1, "num_epochs": 300,
            "warmup_steps": 10_000, "weight_decay": 0.05,
        },
        {0: {"depth": 0.2}, 1: {"depth": 0.3}, 2: {"depth": 0.5}, 3: {"depth": 0.7}},
    ),
    "imagenet_1k_finetune": (
        FINE | {"randaugment": (2, 15), "mixup_alpha": 0.8, "global_batch_size": 512},
        {0: {"depth": 0.2}, 1: {"depth": 0.3}, 2: {"depth": 0.5}, 3: {"depth": 0.7, "randaugment": (2, 20)}},
    ),
    "imagenet_21k": (
        LARGE | SIGMOID | {
            "randaugment": (0, 0), "mixup_alpha": None, "num_epochs": 90, "warmup_steps": round(5 * NUM_IMAGES / 4096)
        },
        {2: {"depth": 0.3}, 3: {"depth": 0.5}, 4: {"depth": 0.7}},
    ),
    "imagenet_21k_randaugment": (
        LARGE | SIGMOID | {
            "randaugment": (2, 5), "mixup_alpha": None, "num_epochs": 150, "warmup_steps": round(5 * NUM_IMAGES / 4096)
        },
        {4: {"depth": 0.7}},
    ),
    "imagenet_21k_to_1k": (
        FINE | {"randaugment": (0, 0), "mixup_alpha": None, "global_batch_size": 1024},
        {2: {"depth": 0.3}, 3: {"depth": 0.5}, 4: {"depth": 0.7}},
    ),
    "imagenet_21k_randaugment_to_1k": (
        FINE | {"randaugment": (2, 5), "mixup_alpha": None, "global_batch_size": 1024},
        {4: {"depth": 0.7}},
    ),
    "jft": (
        LARGE | SIGMOID | {"randaugment": (2, 5), "mixup_alpha": None, "num_epochs": 14, "warmup_steps": 20_000},
        {3: {"depth": 0.0}, 4: {"depth": 0.1, "peak_lr": 5e-4}, 5: {"depth": 0.0, "peak_lr": 5e-4}},
    ),
    "jft_to_1k": (
        FINE | {"randaugment": (2, 5), "mixup_alpha": None, "global_batch_size": 512},
        {3: {"depth": 0.1}, 4: {"depth": 0.3}, 5: {"depth": 0.2}},
    ),
}  # fmt: skip
CELLS = [
    (name, number, {**column, **own}) for name, (column, models) in COLUMNS.items() for number, own in models.items()
]


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's settings under the words of the table."""
    augment, optimizer = settings["augment"], settings["optimizer"]
    own = {name: settings[name] for name in ("loss", "label_smoothing", "num_epochs", "global_batch_size", "ema_decay")}
    return own | {
        "depth": settings["model"].stochastic_depth_rate,
        "randaugment": (augment.randaugment_ops, augment.randaugment_magnitude),
        "mixup_alpha": augment.mixup_alpha,
        "fit": settings["preprocessing"].fit,
        "schedule": optimizer.schedule,
        "peak_lr": optimizer.peak_lr,
        "min_lr": optimizer.min_lr,
        "warmup_steps": optimizer.warmup_steps,
        "weight_decay": optimizer.weight_decay,
    }


@pytest.mark.parametrize(("name", "number", "want"), CELLS, ids=[f"{name}-{number}" for name, number, _ in CELLS])
def test_recipe_is_the_papers(name: str, number: int, want: dict[str, Any]):
    model = zoo.find(f"coatnet_{number}").config
    settings = find(name).settings(model, (384, 384), NUM_IMAGES)
    assert flat(settings) == want
    assert settings["optimizer"].max_grad_norm == 1.0, "Table 10 clips to a global norm of 1 in every column"
    assert (settings["optimizer"].beta1, settings["optimizer"].beta2) == (0.9, 0.999)
    crop = {"crop": "random_resized", "resize": "resize"}[want["fit"]]
    assert settings["augment"].crop == crop, "centre crop: yes means RandomResizedCrop in training, no a plain resize"
    assert settings["augment"].cutmix_alpha is None
    assert settings["augment"].erase_rate == 0


def test_every_recipe_of_the_paper_is_held_to_it():
    assert {name for name, recipe in RECIPES.items() if not recipe.ours} == set(COLUMNS)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
def test_settings_make_a_config(recipe: Any):
    model = replace(zoo.find("coatnet_3").config, num_classes=7)
    config = TrainConfig(data="d", out="o", **recipe.settings(model, (192, 256), NUM_IMAGES))
    assert config.model.image_size == config.preprocessing.image_size == (192, 256)
    assert (config.recipe, config.model.num_classes) == (recipe.name, 7)


def test_a_model_outside_the_column_keeps_its_own_rate():
    model = replace(zoo.find("coatnet_7").config, stochastic_depth_rate=0.25)
    assert find("jft").settings(model, (224, 224), NUM_IMAGES)["model"].stochastic_depth_rate == 0.25


@pytest.mark.parametrize(
    ("typed", "want"),
    [("imagenet1k", "Did you mean 'imagenet_1k'?"), ("zzz", "There are: imagenet_1k, imagenet_1k_finetune")],
)
def test_unknown_recipe_is_told_the_nearest(typed: str, want: str):
    with pytest.raises(ConfigError, match=f"There is no recipe '{typed}'") as refusal:
        find(typed)
    assert want in str(refusal.value)
