"""The documents say what is so: their commands run, their tables are current, their links lead somewhere."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def fences(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with PICTURES/{dark,bright}/*.png and new/*.jpg."""
    top = tmp_path_factory.mktemp("readme")
    rng = np.random.default_rng(0)
    for name, low in (("dark", 0), ("bright", 156)):
        (top / "PICTURES" / name).mkdir(parents=True)
        for index in range(12):
            pixels = rng.integers(low, low + 100, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(top / "PICTURES" / name / f"{index}.png")
    (top / "new").mkdir()
    Image.fromarray(rng.integers(0, 100, (40, 30, 3), dtype=np.uint8)).save(top / "new" / "a.jpg")
    Image.fromarray(rng.integers(0, 100, (9, 9, 3), dtype=np.uint8)).save(top / "a.jpg")
    Image.fromarray(rng.integers(0, 100, (9, 9, 3), dtype=np.uint8)).save(top / "b.png")
    return top


def test_the_readmes_commands_and_snippet_run(folder: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # where other work is about, two threads wait for each other
    lines = [line for fence in fences(ROOT / "README.md", "") for line in fence.splitlines()]
    commands = [line for line in lines if line.startswith("coatnet ")]
    assert len(commands) >= 2, f"the README shows {commands}"
    for command in commands:
        words = command.replace("coatnet", f"{sys.executable} -m coatnet", 1)
        done = subprocess.run(
            words, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
    (snippet,) = fences(ROOT / "README.md", "python")
    done = subprocess.run([sys.executable, "-c", snippet], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"the README's Python: {done.stderr}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", document.read_text())
    missing = [to for to in targets if "://" not in to and not (document.parent / to).exists()]
    assert not missing, f"{document.name} links to {missing}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_are_there(document: Path) -> None:
    named = set(re.findall(r"`((?:src|tests|tools|docs|results)/[\w./-]+)`", document.read_text()))
    missing = [name for name in sorted(named) if not (ROOT / name).exists()]
    assert not missing, f"{document.name} names {missing}"


def test_generated_tables_are_current() -> None:
    done = subprocess.run(
        [sys.executable, "tools/write_results.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_table_of_small_rows_says_by_how_much_one_is_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    speed_tables = importlib.import_module("speed_tables")
    accuracy = {
        "work": "accuracy", "model": "coatnet_pico", "peer": "resnet10t", "minutes": 2.0,
        "images": {"coatnet_pico": 900, "resnet10t": 600},
        "top1_percent": {"coatnet_pico": [94.0, 94.5, 94.7], "resnet10t": [94.0, 94.1, 94.2]},
    }  # fmt: skip
    inference = {
        "work": "inference bf16", "model": "coatnet_pico", "best_peer": "openvino",
        "images_per_s": {"coatnet_pico": 30.0, "openvino": 20.0},
        "timings": {name: {"median_s": 1.0, "low_s": 1.0, "high_s": 1.0} for name in ("coatnet_pico", "openvino")},
        "ratio": {"median": 1.5, "low": 1.4, "high": 1.6},
    }  # fmt: skip
    record = {
        "kind": "bench small", "file": "bench_small.json", "figures": {"rows": [accuracy, inference]},
        "host": {"cpu": "one", "cores": 2, "torch_threads": 2, "gpu": None}, "versions": {}, "command": ["coatnet"],
        "commit": None, "seconds": 1.0,
    }  # fmt: skip
    (line,) = (
        line for line in speed_tables.speed_section([record]).splitlines() if line.startswith("| `coatnet_pico`")
    )
    assert "| 2 | 94.00 94.50 94.70 | 94.40 | 94.00 94.10 94.20 | 94.10 | **+0.30** (+0.00 to +0.50) |" in line, line
    assert "**1.50** (1.40 to 1.60)" in line, line


def test_nothing_of_one_machine_is_told() -> None:
    """No path of a machine, no address of a package registry, in anything that git tracks."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    halves = (("pypi", r"\.org"), ("python", "hosted"), ("npm", r"js\.org"), (r"deb\.", "debian"))
    hosts = "|".join(first + second for first, second in halves)
    told = [
        name
        for name in tracked.split("\0")
        if name
        and (ROOT / name).suffix in {".py", ".md", ".txt", ".toml", ".json", ".css", ""}
        and re.search(hosts, (ROOT / name).read_text(errors="replace"))
    ]
    assert not told, f"addresses of package registries in {told}"


@pytest.mark.slow
def test_the_readmes_make_lines_run_in_a_clean_clone(tmp_path: Path) -> None:
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tmp_path / "clone")], check=True)
    done = subprocess.run(["make", "demo"], cwd=tmp_path / "clone", capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "clone" / "demo" / "run" / "report.html").is_file(), "make demo left no report"
