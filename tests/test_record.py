"""Records: whole, JSON, and silent about whose machine it was."""

from __future__ import annotations

import getpass
import json
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import coatnet
from coatnet import record
from coatnet.record import environment, make_record, write_record


def test_environment_names_versions_command_and_host(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/coatnet", "train", "pictures"])
    found = environment()
    assert found["versions"]["coatnet"] == coatnet.__version__
    assert found["versions"]["python"] == platform.python_version()
    assert all(found["versions"][name] for name in ("torch", "torchvision", "numpy"))
    assert found["command"] == ["coatnet", "train", "pictures"]
    assert found["date"].endswith("+00:00")
    assert found["host"]["cores"] >= 1
    assert found["host"]["torch_threads"] >= 1
    assert json.loads(json.dumps(found)) == found


def test_environment_tells_no_host_user_or_machine_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys,
        "argv",
        ["/opt/x/coatnet", f"{tmp_path}/inside/run", "/data/secret/flowers", f"--out={home}/out", "--lr=0.1", "~/pets"],
    )
    found = environment()
    assert found["command"] == ["coatnet", "inside/run", "flowers", "--out=home/out", "--lr=0.1", "home/pets"]
    text = json.dumps(found)
    assert platform.node() not in text
    assert getpass.getuser() not in [part for value in found["command"] for part in Path(value).parts]
    assert str(tmp_path) not in text


def test_a_tilde_alone_is_a_sign_and_no_home():
    figures = {"relation": "~", "claim": "A ~ B", "data": "~/pets"}
    found = make_record(kind="study", figures=figures, seeds=[0], n=1, seconds=1.0)["figures"]
    assert (found["relation"], found["claim"]) == ("~", "A ~ B")
    assert "~" not in found["data"]


def test_commit_is_the_running_codes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """An installed copy inside another repository has no commit to tell."""
    package = tmp_path / "lib" / "coatnet"
    package.mkdir(parents=True)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.setattr(record, "__file__", str(package / "record.py"))
    assert environment()["commit"] is None


def test_commit_of_a_checkout_tells_changed_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    file = tmp_path / "src" / "coatnet" / "record.py"
    file.parent.mkdir(parents=True)
    result = tmp_path / "result.json"
    file.write_text("old")
    result.write_text("{}")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    monkeypatch.setattr(record, "__file__", str(file))
    assert environment()["commit"] == head
    result.write_text("[]")
    assert environment()["commit"] == head, "no code of ours changed"
    file.write_text("new")
    assert environment()["commit"] == f"{head}-dirty"


def test_no_git_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment()["commit"] is None


def test_write_record_holds_everything_in_json(tmp_path: Path):
    path = tmp_path / "results" / "run.json"
    write_record(
        path,
        kind="study",
        figures={"top1_percent": np.float32(91.5), "losses": (1.0, float("nan")), "best": float("inf")},
        seeds=[0, 1, 2],
        n=10_000,
        seconds=1.23456,
        config={"data": "/data/secret/flowers", "size": (28, 28)},
    )
    found = json.loads(path.read_text())
    assert found["kind"] == "study"
    assert found["figures"] == {"top1_percent": 91.5, "losses": [1.0, None], "best": None}
    assert (found["seeds"], found["n"], found["seconds"]) == ([0, 1, 2], 10_000, 1.235)
    assert found["config"] == {"data": "flowers", "size": [28, 28]}
    assert {"date", "command", "commit", "host", "versions"} <= found.keys()
    assert [file.name for file in path.parent.iterdir()] == ["run.json"]


def test_record_imports_no_torch():
    code = "import sys, coatnet.record; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
