"""Inject the faults that a run is to survive, and write what was met as a record: docs/results.md shows it.

python tools/measure_promises.py --out results/promises.json              all, some 25 minutes of 2 cores
python tools/measure_promises.py --only stall,flips --out promises.json   some; the others stay as the file has them
"""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from coatnet.config import OptimizerConfig
from coatnet.record import write_record
from coatnet.training import checkpoint
from coatnet.training.optimizer import make_optimizers
from coatnet.training.saver import Saver
from coatnet.training.start import build
from coatnet.zoo import find

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from training.process import HARD, command, finish, kill_after  # noqa: E402
from training.tiny import assert_same_end, write_pictures  # noqa: E402

NUM_KILLS, NUM_FLIPS, NUM_SAVES = 50, 200, 5
Figures = dict[str, Any]


def kills(folder: Path) -> Figures:
    """Kill a run at random moments, half of them in fp32 and half in bf16, and count the runs that end alike."""
    data, met = write_pictures(folder / "pictures"), dict[str, int]()
    for precision in ("fp32", "bf16"):
        flags = (*HARD, "--precision", precision, "--epochs", "60", "--resume")
        assert finish(command(data, folder / f"whole-{precision}", *flags)).returncode == 0
        rng, run, count = random.Random(precision), folder / precision, 0
        while count < NUM_KILLS // 2:
            how = kill_after(command(data, run, *flags), run, rng.uniform(0, 5))
            count += how == -signal.SIGKILL
            if how == 0:  # the end came before the kill: the same once more from the start, the kills count on
                assert_same_end(run, folder / f"whole-{precision}")
                subprocess.run(["rm", "-r", run], check=True)
        assert finish(command(data, run, *flags)).returncode == 0
        assert_same_end(run, folder / f"whole-{precision}")
        met[precision] = count
    return {"kills": sum(met.values()), "by_precision": met, "equal_sha256": True}


def flips(folder: Path) -> Figures:
    """Flip bits of a checkpoint and of a model folder, one at a time, and count those that are noticed."""
    from coatnet.classifier import load
    from coatnet.errors import ModelFileError

    data, run = write_pictures(folder / "pictures"), folder / "run"
    assert finish(command(data, run, *HARD, "--epochs", "2")).returncode == 0
    newest, _ = checkpoint.find_newest(run)
    assert newest is not None
    places: dict[str, tuple[Path, Callable[[], bool]]] = {
        "checkpoint": (newest, lambda: checkpoint.find_newest(run)[0] != newest),
        "model": (run / "model", lambda: _raises(lambda: load(run / "model"), ModelFileError)),
    }
    found = dict.fromkeys(places, 0)
    rng = random.Random(0)
    for name, (part, is_noticed) in places.items():
        files = sorted(file for file in part.rglob("*") if file.is_file())
        for _ in range(NUM_FLIPS):
            file = rng.choice(files)
            whole = file.read_bytes()
            damaged = bytearray(whole)
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            file.write_bytes(damaged)
            found[name] += is_noticed()
            file.write_bytes(whole)
    return {"flips": NUM_FLIPS, "found": found}


def _raises(call: Callable[[], object], kind: type[Exception]) -> bool:
    try:
        call()
    except kind:
        return True
    return False


def stall(folder: Path) -> Figures:
    """Compare how long a save holds up training with how long it takes, for 275 M parameters and their optimizer."""
    config = find("coatnet_4").config
    network = build(config, 0)
    optimizers = make_optimizers(network, OptimizerConfig())
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers[0].step()
    state = checkpoint.State(network, optimizers, None, step=1)
    whole_s, stall_s = list[float](), list[float]()
    saver = Saver(folder, checkpoint.Retention(num_last=1), print)
    for step in range(NUM_SAVES + 1):
        state.step = step
        start_s = time.perf_counter()
        saver.save(state, at_once=True)
        stalled_s = time.perf_counter()
        saver.wait()
        if step:  # the first also takes the memory for the copies, once a run
            stall_s.append(stalled_s - start_s)
            whole_s.append(time.perf_counter() - start_s)
    saver.close()
    params = sum(parameter.numel() for parameter in network.parameters())
    stalled, whole = statistics.median(stall_s), statistics.median(whole_s)
    return {
        "params_m": params / 1e6, "gib": 3 * 4 * params / 2**30, "saves": NUM_SAVES, "stall_s": stalled,
        "synchronous_s": whole, "percent": 100 * stalled / whole,
    }  # fmt: skip


def _test_figures(test: str, pattern: str) -> list[float]:
    """Run a slow test that prints its figures; return them."""
    words = [sys.executable, "-m", "pytest", "-q", "-s", f"tests/distributed/test_lost.py::{test}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    found = re.search(pattern, done.stdout)
    if done.returncode or not found:
        raise RuntimeError(done.stdout[-3000:])
    return [float(number) for number in found.groups()]


RANK = "test_a_rank_that_is_gone_costs_no_more_than_a_restart"


def restart(folder: Path) -> Figures:  # noqa: ARG001 - the test has its own
    """Kill, and hold still, one of two ranks; cut off one of two hosts; measure until training goes on."""
    told = r"was reached ([\d.]+) s after the loss"
    cut = r"noticed after (\d+) s, going on (\d+) s after it was back"
    noticed_s, back_s = _test_figures("test_a_host_cut_off_and_brought_back", cut)
    return {
        "killed_s": _test_figures(f"{RANK}[killed]", told)[0],
        "standing_still_s": _test_figures(f"{RANK}[standing still]", told)[0],
        "host_cut_off_noticed_s": noticed_s,
        "host_back_s": back_s,
    }


MEASURED: dict[str, Callable[[Path], Figures]] = {"kills": kills, "flips": flips, "stall": stall, "restart": restart}


def main() -> None:
    """Measure what is asked for and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default=",".join(MEASURED))
    asked = parser.parse_args()
    figures = json.loads(asked.out.read_text())["figures"] if asked.out.is_file() else {}
    start_s = time.perf_counter()
    for name in asked.only.split(","):
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = MEASURED[name](Path(folder))
        print(name, figures[name], flush=True)
        num = sum(figures.get(kind, {}).get(kind, 0) for kind in ("kills", "flips"))
        seconds = time.perf_counter() - start_s
        write_record(asked.out, kind="promises", figures=figures, seeds=[0], n=num, seconds=seconds)


if __name__ == "__main__":
    main()
