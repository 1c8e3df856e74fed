"""`coatnet bench agreement`: how often a trained model answers in bf16 and int8 as it does in fp32, and how well."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from coatnet.bench.infer import optimize_as_asked
from coatnet.classifier import Classifier, load
from coatnet.config import Precision
from coatnet.data.loader import EvaluationLoader
from coatnet.data.sources import ImageSet, open_data
from coatnet.errors import DataError
from coatnet.evaluation.metrics import evaluate, wilson_percent

NUM_CALIBRATION = 256  # pictures of the training part, drawn over all classes


class Form(NamedTuple):
    """What a network answered in one precision."""

    predictions: np.ndarray
    targets: np.ndarray
    seconds: float
    engine: str


def bench_agreement(run: Path, data: str, precisions: Sequence[Precision]) -> list[dict[str, Any]]:
    """Evaluate the test part in fp32 and in each precision. Raises: DataError where the data has no test part."""
    classifier, found = load(run), open_data(data, holdout_percent=None)
    if found.test is None:
        raise DataError(f"{data} has no test part. Give a folder with train/ and test/.")
    calibration = _calibration(classifier, found.train)
    forms: dict[str, Form] = {}
    for precision in dict.fromkeys(("fp32", *precisions)):
        classifier.fast = fast = optimize_as_asked(classifier.network, precision, calibration)
        start = time.perf_counter()
        outcome = evaluate(classifier, found.test, batch_size=64)
        forms[precision] = Form(outcome.predictions, outcome.targets, time.perf_counter() - start, fast.engine)
    num_calibration, wanted = sum(map(len, calibration)), forms["fp32"].predictions
    return [_row(classifier, data, precision, forms[precision], wanted, num_calibration) for precision in precisions]


def _calibration(classifier: Classifier, images: ImageSet) -> list[Tensor]:
    rows = np.linspace(0, len(images) - 1, min(NUM_CALIBRATION, len(images))).astype(np.int64)
    loader = EvaluationLoader(images.take(rows), classifier.preprocessing, batch_size=16)
    return [classifier.preprocessing.normalise(batch.images) for batch in loader]


def _row(
    classifier: Classifier, data: str, precision: str, form: Form, wanted: np.ndarray, num_calibration: int
) -> dict[str, Any]:
    predictions, targets, seconds, engine = form
    n, right, before = len(targets), int((predictions == targets).sum()), int((wanted == targets).sum())
    same = int((predictions == wanted).sum())
    # Of a paired difference: only pictures that one form has right and the other wrong count.
    won, lost = (
        int(((a == targets) & (b != targets)).sum()) for a, b in ((predictions, wanted), (wanted, predictions))
    )
    return {
        "work": f"agreement {precision}", "model": classifier.network.config.name, "data": data, "n": n,
        "image_size": list(classifier.preprocessing.config.image_size), "threads": torch.get_num_threads(),
        "agreement_percent": 100 * same / n, "agreement_interval": list(wilson_percent(same, n)),
        "top1_percent": 100 * right / n, "fp32_top1_percent": 100 * before / n,
        "loss_points": 100 * (before - right) / n, "loss_deviation_points": 100 * math.sqrt(won + lost) / n,
        "num_calibration": num_calibration, "engine": engine, "seconds": seconds,
    }  # fmt: skip
