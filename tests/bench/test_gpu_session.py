"""tools/gpu_session.py rehearsed on a processor, as a card's machine has it: no kernels, no command line, no peers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
NOT_THERE = ("cyclopts", "simplejpeg", "openvino", "onnxruntime", "onnx", "nncf", "matplotlib")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source tree without kernels, and a start-up file that hides packages."""
    top = tmp_path_factory.mktemp("bare")
    shutil.copytree(ROOT / "src", top / "src", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(ROOT / "tools", top / "tools")
    hide = "".join(f"sys.modules[{name!r}] = None\n" for name in NOT_THERE)
    (top / "sitecustomize.py").write_text(f"import sys\n{hide}")
    return top


def python(top: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"PYTHONPATH": f"{top / 'src'}{os.pathsep}{top}"}
    return subprocess.run([sys.executable, *words], cwd=top, env=environ, capture_output=True, text=True, timeout=900)


def test_the_package_runs_without_kernels_and_optional_packages(bare: Path):
    program = (
        "import torch, coatnet, coatnet.bench.infer, coatnet.bench.train, coatnet.bench.show\n"
        "from coatnet import native\n"
        "from coatnet.fast.training import for_training\n"
        "assert native.missing('fp32') == 'the package was installed without a C++ compiler'\n"
        "model = coatnet.create_model('coatnet_pico', num_classes=3).eval()\n"
        "x = torch.randn(2, model.config.in_channels, *model.config.image_size)\n"
        "fast = coatnet.fast.engines.optimize_at_once(model)\n"
        "torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)\n"
        "for_training(model)(x).sum().backward()\n"
        "print(fast.engine)\n"
    )
    done = python(bare, "-c", program)
    assert done.stdout == "plain\n", done.stderr


def test_a_step_that_fails_is_told_of_and_the_next_one_runs(bare: Path, tmp_path: Path):
    words = ["--device", "cpu", "--networks", "coatnet_9", "coatnet_8", "--sizes", "32", "--steps", "infer"]
    done = python(bare, "tools/gpu_session.py", str(tmp_path), *words)
    assert done.returncode == 1
    log = (tmp_path / "log.txt").read_text()
    assert "There is no model 'coatnet_9'" in log, log
    assert "There is no model 'coatnet_8'" in log, log
    assert "not done: infer coatnet_8 32 px, batch 64; infer coatnet_9 32 px, batch 64" in log
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.slow
def test_it_leaves_a_record_for_each_kind_of_step(bare: Path, tmp_path: Path):
    words = ["--device", "cpu", "--networks", "coatnet_0", "--sizes", "32", "64", "--batch", "2", "--rounds", "1"]
    done = python(bare, "tools/gpu_session.py", str(tmp_path), *words, "--against", "none", "--steps", "train", "infer")
    assert done.returncode == 0, (tmp_path / "log.txt").read_text()
    for kind, work in (("train", "training bf16"), ("infer", "inference bf16")):
        record = json.loads((tmp_path / f"gpu_{kind}.json").read_text())
        rows = record["figures"]["rows"]
        assert [(row["work"], row["image_size"], row["device"]) for row in rows] == [
            (work, [side, side], "cpu") for side in (64, 32)
        ]
        assert record["n"] == sum(row["timings"]["coatnet"]["num_calls"] for row in rows)
