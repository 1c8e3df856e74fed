"""A network, pictures and runs small enough to train in a second."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from coatnet.config import AugmentConfig, ModelConfig, OptimizerConfig, PreprocessingConfig, TrainConfig

CLASSES = ("bird", "fish", "frog")
SIZE = (24, 24)
MODEL = ModelConfig(
    name="tiny",
    depths=(1, 1, 1, 1, 1),
    widths=(8, 8, 16, 32, 32),
    strides=(2, 2, 2, 1, 2),
    head_dim=16,
    batch_norm_momentum=0.1,
    init="fan_in",
    image_size=SIZE,
    num_classes=len(CLASSES),
)
NO_BATCH_NORM = replace(MODEL, mbconv_norm="layer")  # a stem of depth 1 has none either
AUGMENT = AugmentConfig(
    crop="random_resized",
    crop_min_scale=0.5,
    randaugment_ops=2,
    randaugment_magnitude=10.0,
    erase_rate=0.25,
    mixup_alpha=0.8,
    cutmix_alpha=1.0,
)


def write_pictures(
    folder: Path,
    *,
    classes: tuple[str, ...] = CLASSES,
    per_class: int = 20,
    size: tuple[int, int] = SIZE,
    seed: int = 0,
) -> Path:
    """Write noisy PNGs whose colour tells the class: folder/class/000.png."""
    rng = np.random.default_rng(seed)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        colour = np.full(3, 60)
        colour[number % 3] = 200
        for index in range(per_class):
            pixels = np.clip(colour + rng.normal(0, 30, (*size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index:03d}.png")
    return folder


def config_of(data: Path | str, out: Path, **changes: Any) -> TrainConfig:
    """Return a run of two epochs, nine updates of twelve pictures, evaluated after each epoch."""
    model = changes.pop("model", MODEL)
    base = TrainConfig(
        data=str(data),
        out=str(out),
        model=model,
        preprocessing=PreprocessingConfig(image_size=model.image_size, fit="resize"),
        augment=AugmentConfig(crop="pad"),
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=2),
        num_epochs=2,
        global_batch_size=12,
        ema_decay=0.9,
    )
    return replace(base, **changes)


def history_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def files_of(run: Path) -> dict[str, bytes]:
    """Return what a run came to: the bytes of weights, optimizer, average, model and metrics."""
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    files = [*newest.glob("*.safetensors"), run / "model" / "model.safetensors", run / "metrics.jsonl"]
    return {file.relative_to(run).as_posix(): file.read_bytes() for file in files}


def assert_same_end(found: Path, want: Path) -> None:
    """Hold two runs to the same end, bit for bit, naming the file that differs."""
    mine, theirs = files_of(found), files_of(want)
    assert mine.keys() == theirs.keys()
    for name, content in theirs.items():
        assert mine[name] == content, f"{name} differs"
