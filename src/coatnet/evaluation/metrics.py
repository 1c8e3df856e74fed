"""What a classifier gets right on a set of pictures, each figure with its 95 % interval.

Every interval has a closed form, so that the same answers always give the same figures:

- a share (top-1, top-5, precision, recall) is a binomial proportion: Wilson's score interval;
- F1 is 2J / (1 + J), where J = TP / (TP + FP + FN) is a share as well: Wilson's interval for J, carried over;
- the loss and the calibration error are means over pictures: mean +- 1.96 standard errors, cut at 0. The calibration
  error is biased upwards in small sets; its interval tells the spread, not that bias.

The intervals speak of pictures drawn as these were. They know nothing of another seed or another source of pictures.
"""

# N pictures, K classes

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from coatnet.classifier import Classifier
from coatnet.data.image_sets import ImageSet
from coatnet.data.loader import EvaluationLoader
from coatnet.errors import DataError, SpoiltModelError

Z95 = 1.959963984540054  # standard normal quantile of a two-sided 95 % interval
NUM_CALIBRATION_BINS = 15  # of equal width, as in arXiv:1706.04599

Interval = tuple[float, float]
Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A classifier's answers for every picture of a set that could be read, in the set's order."""

    logits: NDArray[np.float32]  # (N, K)
    targets: Counts  # (N,) index into class_names
    positions: Counts  # (N,) index into the image set
    names: list[str]  # of the N pictures
    class_names: tuple[str, ...]  # K, the model's order
    loss: Literal["softmax", "sigmoid"] = "softmax"  # how logits become probabilities
    bad_images: dict[str, str]  # name -> why it could not be read; not among the N

    @cached_property
    def probabilities(self) -> NDArray[np.float32]:
        """Return (N, K) float32: rows that sum to 1 for softmax, independent answers for sigmoid."""
        if self.loss == "sigmoid":
            return np.exp(-np.logaddexp(0, -self.logits))
        powers = np.exp(self.logits - self.logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    @cached_property
    def predictions(self) -> Counts:
        """Return (N,) int64, the most probable class; the first one of equals."""
        return self.logits.argmax(axis=1)

    @cached_property
    def confidences(self) -> NDArray[np.float32]:
        """Return (N,) float32, the probability of the predicted class."""
        return self.probabilities.max(axis=1)


@dataclass(frozen=True, kw_only=True)
class ClassSummary:
    """One class. A figure is None where it has no meaning: no such picture, or none called so."""

    name: str
    support: int  # pictures of this class
    num_predicted: int  # pictures called so
    precision_percent: float | None
    precision_interval: Interval | None
    recall_percent: float | None
    recall_interval: Interval | None
    f1_percent: float | None  # 0 if every picture of the class is missed; None only without pictures and predictions
    f1_interval: Interval | None


@dataclass(frozen=True, kw_only=True)
class CalibrationBin:
    """The pictures whose confidence lies in one fifteenth of 0 .. 100 %."""

    low_percent: float
    count: int
    confidence_percent: float | None  # mean; None in an empty bin
    accuracy_percent: float | None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The figures of one evaluation; intervals are 95 % and in the unit of their figure."""

    n: int  # pictures
    top1_percent: float
    top1_interval: Interval
    top5_percent: float | None  # None with five classes or fewer, where it says nothing
    top5_interval: Interval | None
    loss: float  # nats: cross-entropy; for sigmoid binary cross-entropy summed over the classes, as in training
    loss_interval: Interval | None  # None for a single picture
    ece_percent: float  # expected calibration error
    ece_interval: Interval | None
    macro_f1_percent: float  # mean of the classes' F1
    classes: tuple[ClassSummary, ...]
    calibration: tuple[CalibrationBin, ...]
    confusion: Counts  # (K, K): row = true class, column = predicted class

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data; of the confusion matrix the cells above 0 as [true, predicted, count]."""
        rows, columns = np.nonzero(self.confusion)
        cells = zip(rows.tolist(), columns.tolist(), self.confusion[rows, columns].tolist(), strict=True)
        return {**asdict(self), "confusion": [list(cell) for cell in cells]}


def evaluate(
    classifier: Classifier,
    image_set: ImageSet,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Outcome:
    """Ask the classifier about every picture of a set; `progress` hears how many are done, bad files too.

    Raises: DataError if the set's classes are not the model's, or no picture can be read. Their order may differ.
            SpoiltModelError if the model's answers are not finite numbers.
    """
    model_index = _match_classes(classifier.labels, image_set.class_names)
    loader = EvaluationLoader(image_set, classifier.preprocessing, batch_size=batch_size, num_workers=num_workers)
    logits: list[NDArray[np.float32]] = []
    positions: list[Counts] = []
    done = 0
    for batch in loader:
        logits.append(classifier.logits(batch.images).cpu().numpy())
        positions.append(batch.positions.numpy())
        done += len(batch)
        if progress is not None:
            progress(done + len(loader.bad_images))
    if not done:
        first = next(iter(loader.bad_images.values()), "it is empty")
        raise DataError(f"None of the set's {len(image_set)} pictures can be read. The first: {first}")
    order = np.concatenate(positions)
    outcome = Outcome(
        logits=np.concatenate(logits),
        targets=model_index[image_set.targets[order]],
        positions=order,
        names=[image_set.name(int(position)) for position in order],
        class_names=classifier.labels,
        loss=classifier.loss,
        bad_images=dict(loader.bad_images),
    )
    _check_finite(outcome)
    return outcome


def _match_classes(labels: tuple[str, ...], class_names: tuple[str, ...]) -> Counts:
    """Return (K,) int64: the model's index of each of the set's classes."""
    missing = sorted(set(labels) - set(class_names))
    foreign = sorted(set(class_names) - set(labels))
    if missing or foreign:
        raise DataError(
            f"The set has other classes than the model's {len(labels)}:"
            + (f" it lacks {_some(missing)};" if missing else "")
            + (f" the model does not know {_some(foreign)};" if foreign else "")
            + " give a set with the same class names."
        )
    return np.array([labels.index(name) for name in class_names], dtype=np.int64)


def _some(names: list[str]) -> str:
    more = len(names) - 5
    return ", ".join(map(repr, names[:5])) + (f" and {more} more" if more > 0 else "")


def _check_finite(outcome: Outcome) -> None:
    broken = np.flatnonzero(~np.isfinite(outcome.logits).all(axis=1))
    if len(broken):
        raise SpoiltModelError(
            f"The model's answers for {len(broken)} of {len(outcome.targets)} pictures are not finite numbers, "
            f"{outcome.names[broken[0]]} first. Its weights are spoilt: take an earlier checkpoint, or train again."
        )


def summarise(outcome: Outcome) -> Summary:
    """Reduce the answers to figures. Raises: DataError if there is no picture."""
    n, num_classes = outcome.logits.shape
    if not n:
        raise DataError("There is no picture to evaluate.")
    ranks = _ranks(outcome.logits, outcome.targets)
    num_top1, num_top5 = int((ranks < 1).sum()), int((ranks < 5).sum())
    with_top5 = num_classes > 5
    losses = _losses(outcome)
    calibration, gaps = _calibrate(outcome.confidences, outcome.predictions == outcome.targets)
    cells = outcome.targets * num_classes + outcome.predictions
    confusion = np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)
    classes = _summarise_classes(confusion, outcome.class_names)
    return Summary(
        n=n,
        top1_percent=100 * num_top1 / n,
        top1_interval=wilson_percent(num_top1, n),
        top5_percent=100 * num_top5 / n if with_top5 else None,
        top5_interval=wilson_percent(num_top5, n) if with_top5 else None,
        loss=float(losses.mean()),
        loss_interval=_mean_interval(losses),
        ece_percent=float(gaps.mean()),
        ece_interval=_mean_interval(gaps),
        macro_f1_percent=float(np.mean([row.f1_percent for row in classes if row.f1_percent is not None])),
        classes=classes,
        calibration=calibration,
        confusion=confusion,
    )


def wilson_percent(hits: int, trials: int) -> Interval:
    """Return Wilson's 95 % score interval of a share, in percent. Source: Wilson 1927; trials must be 1 or more."""
    share, spread = hits / trials, Z95**2 / trials
    centre = share + spread / 2
    half = Z95 * (share * (1 - share) / trials + spread / (4 * trials)) ** 0.5
    low, high = (centre - half) / (1 + spread), (centre + half) / (1 + spread)
    return 100 * max(low, 0.0), 100 * min(high, 1.0)


def _mean_interval(values: Floats) -> Interval | None:
    """Return mean +- 1.96 standard errors of values (N,) that cannot have a mean below 0."""
    if len(values) < 2:
        return None
    mean, half = float(values.mean()), Z95 * float(values.std(ddof=1)) / len(values) ** 0.5
    return max(mean - half, 0.0), mean + half


def _ranks(logits: NDArray[np.float32], targets: Counts) -> Counts:
    """Return (N,) int64: how many classes come before the true one; of equals the first index wins, as with argmax."""
    own = np.take_along_axis(logits, targets[:, None], axis=1)
    earlier = np.arange(logits.shape[1]) < targets[:, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(axis=1)


def _losses(outcome: Outcome) -> Floats:
    """Return (N,) float64, each picture's loss in nats."""
    logits = outcome.logits
    own = np.take_along_axis(logits, outcome.targets[:, None], axis=1)[:, 0].astype(np.float64)
    if outcome.loss == "sigmoid":
        return np.logaddexp(0, logits, dtype=np.float64).sum(axis=1) - own
    top = logits.max(axis=1, keepdims=True)
    return np.log(np.exp(logits - top).sum(axis=1, dtype=np.float64)) + top[:, 0] - own


def _calibrate(confidences: NDArray[np.float32], right: NDArray[np.bool_]) -> tuple[tuple[CalibrationBin, ...], Floats]:
    """Return the bins, and (N,) float64 gaps in percent whose mean is the expected calibration error.

    A picture's gap is confidence - accuracy, or its negative where its bin as a whole is less sure than right.
    """
    place = np.clip(np.ceil(confidences * NUM_CALIBRATION_BINS).astype(np.int64) - 1, 0, NUM_CALIBRATION_BINS - 1)
    counts = np.bincount(place, minlength=NUM_CALIBRATION_BINS)
    sum_confidence = np.bincount(place, weights=confidences, minlength=NUM_CALIBRATION_BINS)
    sum_right = np.bincount(place, weights=right, minlength=NUM_CALIBRATION_BINS)
    bins = tuple(
        CalibrationBin(
            low_percent=100 * i / NUM_CALIBRATION_BINS,
            count=int(count),
            confidence_percent=float(100 * sum_confidence[i] / count) if count else None,
            accuracy_percent=float(100 * sum_right[i] / count) if count else None,
        )
        for i, count in enumerate(counts)
    )
    signs = np.where(sum_confidence >= sum_right, 100.0, -100.0)
    return bins, signs[place] * (confidences - right.astype(np.float64))


def _summarise_classes(confusion: Counts, names: tuple[str, ...]) -> tuple[ClassSummary, ...]:
    hits = np.diagonal(confusion).tolist()
    supports, predicted = confusion.sum(axis=1).tolist(), confusion.sum(axis=0).tolist()
    rows = zip(names, hits, supports, predicted, strict=True)
    return tuple(_summarise_class(*row) for row in rows)


def _summarise_class(name: str, hits: int, support: int, num_predicted: int) -> ClassSummary:
    either = support + num_predicted - hits  # TP + FP + FN
    return ClassSummary(
        name=name,
        support=support,
        num_predicted=num_predicted,
        precision_percent=100 * hits / num_predicted if num_predicted else None,
        precision_interval=wilson_percent(hits, num_predicted) if num_predicted else None,
        recall_percent=100 * hits / support if support else None,
        recall_interval=wilson_percent(hits, support) if support else None,
        f1_percent=_f1_percent(100 * hits / either) if either else None,
        f1_interval=tuple(map(_f1_percent, wilson_percent(hits, either))) if either else None,  # type: ignore[arg-type]
    )


def _f1_percent(jaccard_percent: float) -> float:
    """Return F1 for J = TP / (TP + FP + FN); it grows with J, so it carries an interval over."""
    return 200 * jaccard_percent / (100 + jaccard_percent)
