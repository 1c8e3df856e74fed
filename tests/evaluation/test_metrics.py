"""Figures against scikit-learn, against cases done by hand, and against what must hold for any answers."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn import metrics as reference
from torch.nn import functional as F

from coatnet.classifier import Classifier
from coatnet.config import ModelConfig, PreprocessingConfig
from coatnet.data.image_sets import ArrayImages, FolderImages
from coatnet.data.transforms import Preprocessing
from coatnet.errors import DataError, ModelFileError
from coatnet.evaluation.metrics import Outcome, evaluate, summarise, wilson_percent
from coatnet.model.network import CoAtNet


def make_outcome(logits: Any, targets: Any, **changes: Any) -> Outcome:
    logits, targets = np.asarray(logits, dtype=np.float32), np.asarray(targets, dtype=np.int64)
    n, num_classes = logits.shape
    made = Outcome(
        logits=logits,
        targets=targets,
        positions=np.arange(n),
        names=[f"{i}.png" for i in range(n)],
        class_names=tuple(f"class {i}" for i in range(num_classes)),
        bad_images={},
    )
    return replace(made, **changes)


# -------------------------------------------------------------------------------------------------------- summarise


def test_figures_are_scikit_learns(outcome: Outcome):
    found = summarise(outcome)
    labels = list(range(len(outcome.class_names)))
    assert found.top1_percent == pytest.approx(100 * reference.accuracy_score(outcome.targets, outcome.predictions))
    top5 = reference.top_k_accuracy_score(outcome.targets, outcome.logits, k=5, labels=labels)
    assert found.top5_percent == pytest.approx(100 * top5)
    probabilities = outcome.probabilities.astype(np.float64)
    probabilities /= probabilities.sum(axis=1, keepdims=True)  # scikit-learn wants float64's idea of 1
    assert found.loss == pytest.approx(reference.log_loss(outcome.targets, probabilities, labels=labels), rel=1e-5)
    confusion = reference.confusion_matrix(outcome.targets, outcome.predictions, labels=labels)
    np.testing.assert_array_equal(found.confusion, confusion)
    precision, recall, f1, support = reference.precision_recall_fscore_support(
        outcome.targets, outcome.predictions, labels=labels
    )
    for i, row in enumerate(found.classes):
        assert row.name == outcome.class_names[i]
        assert row.support == support[i]
        assert row.precision_percent == pytest.approx(100 * precision[i])
        assert row.recall_percent == pytest.approx(100 * recall[i])
        assert row.f1_percent == pytest.approx(100 * f1[i])
    assert found.macro_f1_percent == pytest.approx(100 * f1.mean())


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_loss_and_probabilities_are_torchs(outcome: Outcome, loss: Any):
    outcome = replace(outcome, loss=loss)
    logits, targets = torch.from_numpy(outcome.logits).double(), torch.from_numpy(outcome.targets)
    if loss == "softmax":
        want, probabilities = F.cross_entropy(logits, targets), logits.softmax(dim=1)
    else:
        one_hot = F.one_hot(targets, logits.shape[1]).double()
        want = F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none").sum(dim=1).mean()
        probabilities = logits.sigmoid()
    assert summarise(outcome).loss == pytest.approx(float(want), rel=1e-5)
    np.testing.assert_allclose(outcome.probabilities, probabilities.numpy(), rtol=1e-5)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_huge_logits_neither_overflow_nor_warn(loss: Any):
    found = summarise(make_outcome([[1e4, -1e4], [-1e4, 1e4]], [0, 0], loss=loss))
    assert found.loss == pytest.approx(1e4)
    assert found.top1_percent == 50


def test_a_case_done_by_hand():
    """Four pictures of a, called a a a b; one of b, called a; none of c or d, d never an answer."""
    logits = np.log([[0.7, 0.1, 0.1, 0.1]] * 3 + [[0.1, 0.7, 0.1, 0.1]] + [[0.7, 0.1, 0.1, 0.1]])
    found = summarise(make_outcome(logits, [0, 0, 0, 0, 1]))
    assert found.n == 5
    assert found.top1_percent == pytest.approx(60)
    assert found.top5_percent is None
    assert found.loss == pytest.approx(-(3 * np.log(0.7) + 2 * np.log(0.1)) / 5)
    assert found.ece_percent == pytest.approx(10, abs=1e-4)  # 70 % sure, 60 % right
    np.testing.assert_array_equal(found.confusion[:2, :2], [[3, 1], [1, 0]])
    a, b, c, _ = found.classes
    assert (a.precision_percent, a.recall_percent, a.f1_percent) == (75, 75, pytest.approx(75))
    assert (b.precision_percent, b.recall_percent, b.f1_percent) == (0, 0, 0)
    assert (c.precision_percent, c.recall_percent, c.f1_percent, c.f1_interval) == (None, None, None, None)
    assert found.macro_f1_percent == pytest.approx(37.5)
    assert [row.count for row in found.calibration if row.count] == [5]


def test_a_class_that_is_never_an_answer_has_no_precision_but_an_f1_of_0():
    (_, missed) = summarise(make_outcome([[1, 0], [1, 0]], [0, 1])).classes
    assert (missed.precision_percent, missed.recall_percent, missed.f1_percent) == (None, 0, 0)


def test_the_first_of_equals_wins_everywhere():
    found = summarise(make_outcome(np.zeros((7, 7)), range(7)))
    assert found.confusion[:, 0].sum() == 7
    assert found.top1_percent == pytest.approx(100 / 7)
    assert found.top5_percent == pytest.approx(500 / 7)


def test_one_picture_has_no_interval_for_a_mean():
    found = summarise(make_outcome([[1, 0]], [0]))
    assert found.loss_interval is None
    assert found.ece_interval is None
    assert found.top1_interval[0] < 100 == found.top1_interval[1]


def test_no_picture_is_an_error():
    with pytest.raises(DataError, match="no picture to evaluate"):
        summarise(make_outcome(np.zeros((0, 2)), []))


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_what_holds_for_any_answers(n: int, num_classes: int, seed: int):
    rng = np.random.default_rng(seed)
    found = summarise(make_outcome(rng.normal(size=(n, num_classes)) * 5, rng.integers(0, num_classes, n)))
    assert found.confusion.sum() == found.n == n
    assert sum(row.support for row in found.classes) == sum(row.num_predicted for row in found.classes) == n
    assert sum(row.count for row in found.calibration) == n
    rows = [(row.recall_percent, row.recall_interval) for row in found.classes]
    rows += [(row.precision_percent, row.precision_interval) for row in found.classes]
    rows += [(row.f1_percent, row.f1_interval) for row in found.classes]
    for percent, interval in [
        *rows,
        (found.top1_percent, found.top1_interval),
        (found.top5_percent, found.top5_interval),
    ]:
        assert (percent is None) == (interval is None)
        if percent is not None and interval is not None:
            assert 0 <= interval[0] <= percent + 1e-9
            assert percent - 1e-9 <= interval[1] <= 100
    if found.loss_interval and found.ece_interval:
        assert found.loss_interval[0] <= found.loss <= found.loss_interval[1]
        assert found.ece_interval[0] <= found.ece_percent + 1e-9 <= found.ece_interval[1] + 2e-9
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["n"] == n


def test_calibration_error_is_the_plain_sum_over_bins(outcome: Outcome):
    confidences, right = outcome.confidences.astype(np.float64), outcome.predictions == outcome.targets
    edges = np.linspace(0, 1, 16)
    want = 0.0
    for low, high in pairwise(edges):
        inside = (confidences > low) & (confidences <= high)
        if inside.any():
            want += inside.mean() * abs(confidences[inside].mean() - right[inside].mean())
    assert summarise(outcome).ece_percent == pytest.approx(100 * want, rel=1e-4)


def test_wilson_of_known_cases():
    """Source: Newcombe 1998, Table I, method 3 (score interval without continuity correction)."""
    for hits, trials, low, high in (
        (81, 263, 25.53, 36.62),
        (15, 148, 6.24, 16.05),
        (0, 20, 0.0, 16.11),
        (1, 29, 0.61, 17.18),
    ):
        assert wilson_percent(hits, trials) == pytest.approx((low, high), abs=0.01)


def test_intervals_hold_what_they_should_in_95_of_100_sets():
    """Draw many sets from a known truth and count how often each interval holds it."""
    rng = np.random.default_rng(0)
    confidence, rounds, n = 0.8, 300, 400
    wrong_rate = 0.3
    held = np.zeros(4)
    truth_f1 = 100 * (1 - wrong_rate)  # both classes equally frequent and equally often wrong
    truth_loss = -(0.7 * np.log(confidence) + 0.3 * np.log(1 - confidence))
    for _ in range(rounds):
        targets = rng.integers(0, 2, n)
        answers = np.where(rng.random(n) < wrong_rate, 1 - targets, targets)
        shares = np.full((n, 2), 1 - confidence)
        shares[np.arange(n), answers] = confidence
        found = summarise(make_outcome(np.log(shares), targets))
        truths = (
            (100 - 100 * wrong_rate, found.top1_interval),
            (truth_f1, found.classes[0].f1_interval),
            (truth_loss, found.loss_interval),
            (100 * (confidence - 1 + wrong_rate), found.ece_interval),
        )
        held += [interval is not None and interval[0] <= truth <= interval[1] for truth, interval in truths]
    assert (held / rounds >= 0.915).all(), held / rounds
    assert (held / rounds <= 0.985).all(), held / rounds


def test_to_dict_lists_the_cells_above_0(outcome: Outcome):
    found = summarise(outcome)
    again = np.zeros_like(found.confusion)
    for true, predicted, count in found.to_dict()["confusion"]:
        again[true, predicted] = count
    np.testing.assert_array_equal(again, found.confusion)


# --------------------------------------------------------------------------------------------------------- evaluate

LABELS = ("cat", "dog", "owl")


def make_classifier(labels: tuple[str, ...] = LABELS) -> Classifier:
    torch.manual_seed(0)
    config = ModelConfig(
        depths=(1,) * 5, widths=(4, 4, 4, 8, 8), head_dim=4, image_size=(32, 32), num_classes=len(labels), in_channels=1
    )
    preprocessing = Preprocessing(PreprocessingConfig(image_size=(32, 32), mean=(0.5,), std=(0.25,)))
    return Classifier(network=CoAtNet(config).eval(), preprocessing=preprocessing, labels=labels)


def make_images(class_names: tuple[str, ...] = LABELS, n: int = 10) -> ArrayImages:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (n, 32, 32), dtype=np.uint8)
    return ArrayImages(pixels, rng.integers(0, len(class_names), n), class_names, "test", np.arange(n))


def test_evaluate_asks_about_every_picture_in_order():
    classifier, image_set = make_classifier(), make_images()
    heard: list[int] = []
    found = evaluate(classifier, image_set, batch_size=4, progress=heard.append)
    assert heard == [4, 8, 10]
    assert found.names == [f"test/{i}" for i in range(10)]
    np.testing.assert_array_equal(found.targets, image_set.targets)
    for i, predictions in enumerate(classifier.predict([image_set.read(i) for i in range(10)], k=1)):
        assert predictions[0].label == found.class_names[found.predictions[i]]
        assert predictions[0].probability == pytest.approx(found.confidences[i], abs=1e-5)


def test_another_order_of_the_same_classes_changes_no_figure():
    classifier = make_classifier()
    image_set = make_images()
    turned = ArrayImages(
        image_set.pixels, np.array([2, 0, 1])[image_set.labels], ("dog", "owl", "cat"), "test", image_set.rows
    )
    found, want = summarise(evaluate(classifier, turned)), summarise(evaluate(classifier, image_set))
    assert found.to_dict() == want.to_dict()


@pytest.mark.parametrize(
    ("class_names", "message"),
    [
        (("cat", "dog"), r"other classes than the model's 3: it lacks 'owl'; give"),
        (("cat", "dog", "owl", "yak"), r"3: the model does not know 'yak'; give"),
        (("cat", "dog", "Owl"), r"it lacks 'owl'; the model does not know 'Owl'"),
        (("cat", "dog", "owl", *(f"x{i}" for i in range(9))), r"'x0', 'x1', 'x2', 'x3', 'x4' and 4 more"),
    ],
)
def test_other_classes_are_refused_with_their_difference(class_names: tuple[str, ...], message: str):
    with pytest.raises(DataError, match=message):
        evaluate(make_classifier(), make_images(class_names))


def test_bad_files_are_left_out_and_named(tmp_path: Path):
    image_set = make_images(n=4)
    names = tuple(f"{i}.png" for i in range(4))
    for i, name in enumerate(names):
        Image.fromarray(np.asarray(image_set.read(i))).save(tmp_path / name)
    (tmp_path / "1.png").write_bytes(b"no picture")
    found = evaluate(make_classifier(), FolderImages(tmp_path, names, image_set.targets, LABELS), batch_size=2)
    assert found.names == ["0.png", "2.png", "3.png"]
    np.testing.assert_array_equal(found.positions, [0, 2, 3])
    np.testing.assert_array_equal(found.targets, image_set.targets[[0, 2, 3]])
    assert list(found.bad_images) == ["1.png"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match="None of the set's 4 pictures can be read"):
        evaluate(make_classifier(), FolderImages(tmp_path, names, image_set.targets, LABELS))


def test_weights_that_give_no_numbers_are_told():
    classifier = make_classifier()
    torch.nn.init.constant_(classifier.network.classifier.bias, float("nan"))
    with pytest.raises(ModelFileError, match=r"10 of 10 pictures are not finite numbers, test/0 first"):
        evaluate(classifier, make_images())
