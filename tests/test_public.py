"""The package's face: the names that must hold, and that looking at it loads no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import coatnet
from coatnet.training import finish
from training.tiny import CLASSES, config_of, write_pictures

NAMES = {"Classifier", "TrainConfig", "choose_config", "create_model", "list_models", "load", "optimize", "train"}


def test_public_names():
    assert set(coatnet.__all__) == NAMES | {"__version__"}
    for name in NAMES:
        assert getattr(coatnet, name).__doc__, f"coatnet.{name} says nothing of itself"


def test_unknown_name():
    with pytest.raises(AttributeError, match="module 'coatnet' has no attribute 'trian'"):
        _ = coatnet.trian


@pytest.mark.parametrize("code", ["import coatnet; coatnet.__version__", "import coatnet; coatnet.list_models()"])
def test_looking_loads_no_torch(code: str):
    check = f"{code}; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_train_and_load_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`coatnet.train(config)` with a progress callback, then `coatnet.load(run).predict`."""
    monkeypatch.setattr(finish, "write_report", lambda file, **_facts: file.write_text("report"))
    data = write_pictures(tmp_path / "pictures")
    steps: list[int] = []
    result = coatnet.train(
        config_of(data, tmp_path / "run", num_epochs=6), progress=lambda tick: steps.append(tick.step)
    )
    assert steps[-1] == 27
    assert result.summary is not None
    classifier = coatnet.load(result.run)
    files = sorted(data.glob("*/000.png"))
    answers = classifier.predict(files, k=3)
    assert [answer[0].label for answer in answers] == list(CLASSES)
    assert all(sum(best.probability for best in answer) == pytest.approx(1) for answer in answers)
    ((best, *_),) = classifier.predict(str(files[0]))
    assert best.label == CLASSES[0]
    assert best.probability == pytest.approx(answers[0][0].probability, abs=1e-6)
    assert len(classifier.predict(np.zeros((5, 5, 3), np.uint8), k=2)[0]) == 2


def test_config_is_chosen_from_python(tmp_path: Path):
    data = write_pictures(tmp_path / "pictures", per_class=3)
    config, reasons = coatnet.choose_config(str(data), str(tmp_path / "run"), {"num_epochs": 1.0})
    assert isinstance(config, coatnet.TrainConfig)
    assert (config.num_epochs, config.model.num_classes) == (1.0, 3)
    assert all(isinstance(reason, str) and reason for reason in reasons)
