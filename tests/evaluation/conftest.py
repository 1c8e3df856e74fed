"""Answers of a made-up classifier of clothes, right about four times in five."""

from __future__ import annotations

import numpy as np
import pytest

from coatnet.data.image_sets import ArrayImages
from coatnet.evaluation.metrics import Outcome

NAMES = ("shirt", "<b>coat</b>", 'bag & "purse"', "boot", "dress", "sandal", "trouser")
N = 300


@pytest.fixture
def image_set() -> ArrayImages:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (N, 28, 28), dtype=np.uint8)
    return ArrayImages(pixels, rng.integers(0, len(NAMES), N), NAMES, "test", np.arange(N))


@pytest.fixture
def outcome(image_set: ArrayImages) -> Outcome:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(N, len(NAMES))).astype(np.float32)
    logits[np.arange(N), image_set.targets] += 2
    return Outcome(
        logits=logits,
        targets=image_set.targets,
        positions=np.arange(N),
        names=[image_set.name(i) for i in range(N)],
        class_names=NAMES,
        bad_images={},
    )
