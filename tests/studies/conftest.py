"""Records of studies as `coatnet study` writes them, of runs that are made up."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from coatnet.record import make_record
from coatnet.studies import catalogue
from coatnet.studies.findings import find_answers
from coatnet.studies.runs import pack
from coatnet.studies.scales import SCALES

N = 400  # test pictures
HOST = {"platform": "Linux x86_64", "cpu": "A Processor", "cores": 2, "torch_threads": 2, "gpu": None}


def made_up_run(row: str, setting: str, place: int, seed: int, num_looks: int) -> dict[str, Any]:
    """Return a run in the form of `runs._summarise`: each row is 6 points worse than the one before it."""
    rng = np.random.default_rng([place, seed])
    num_right = int(0.9 * N) - int(0.06 * N) * place + (0, 3, 1)[seed % 3]
    correct = rng.permutation(np.arange(N) < num_right)
    history = [
        {
            "step": 10 * look,
            "epoch": look / 2,
            "train_loss": 2.3 * math.exp(-look / num_looks * (3 - 0.3 * place)) + 0.02 * rng.random(),
            "val_loss": 0.5 + 1.5 * math.exp(-2 * look / num_looks),
            "val_top1_percent": 100 * num_right / N * (1 - math.exp(-4 * look / num_looks)) + rng.normal(0, 1),
        }
        for look in range(1, num_looks + 1)
    ]
    return {
        "row": row, "setting": setting, "model": row, "image_size": [8, 8], "seed": seed,
        "data_sha256": "5e" * 32, "part": "test", "n": N,
        "top1_percent": 100 * float(correct.mean()), "correct": pack(correct),
        "train_loss": history[-1]["train_loss"], "val_loss": history[-1]["val_loss"], "history": history,
        "num_params": 300_000 + 1000 * place, "gmacs": 0.05 + 0.001 * place, "images": 128_000, "seconds": 100.5,
        "commit": "c0ffee" * 6 + "c0ff", "host": HOST, "versions": {"coatnet": "0.1.0", "torch": "2.15.0"},
        "config": {"data": "digits", "train_percent": None, "num_epochs": 2.0, "holdout_percent": 10.0},
    }  # fmt: skip


def made_up_speed(names: list[str]) -> list[dict[str, Any]]:
    rates = [{"median": 1000.0 - 100 * i, "low": 950.0 - 100 * i, "high": 1050.0 - 100 * i} for i in range(len(names))]
    return [
        {
            "row": name, "device": "cpu", "batch": 64, "precision": "fp32", "images_per_s": rate,
            "training_mib": None if i == 1 else 64.4, "inference_images_per_s": rate,
        }
        for i, (name, rate) in enumerate(zip(names, rates, strict=True))
    ]  # fmt: skip


@pytest.fixture
def make() -> Callable[..., dict[str, Any]]:
    """Return what makes the record of a study, by its name."""

    def record_of(name: str, *, num_seeds: int = 3, num_looks: int = 12) -> dict[str, Any]:
        study, scale = catalogue.find(name), SCALES["toy"]
        trainings = study.trainings(scale)
        names = list(dict.fromkeys(training.row for training in trainings))
        runs = [
            made_up_run(training.row, training.setting, names.index(training.row), seed, num_looks)
            for seed in range(num_seeds)
            for training in trainings
        ]
        groups: dict[tuple[str, str], list[Any]] = {}
        for run in runs:
            groups.setdefault((run["row"], run["setting"]), []).append(run)
        figures = {
            "study": name,
            "scale": "toy",
            "data": ["digits"],
            **find_answers(study, scale, groups),
            "runs": runs,
        }
        if study.measures_speed:
            figures["speed"] = made_up_speed(names)
        record = make_record(kind="study", figures=figures, seeds=list(range(num_seeds)), n=len(runs), seconds=3725.0)
        return {**record, "command": ["coatnet", "study", name, "--out", "my studies"]}

    return record_of
