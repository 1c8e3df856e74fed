"""Everything that only a card can show, in one call: the tests on CUDA, attention alone, training, inference.

    PYTHONPATH=src python tools/gpu_session.py OUT
    PYTHONPATH=src python tools/gpu_session.py OUT --steps train --networks coatnet_2 --sizes 384

It runs from the source tree and needs torch, timm, rich and pytest, and no network. OUT (or $OUT) gets log.txt and a
record for each kind of step, written anew after every step, so that what was measured is kept whatever comes after. A
step that fails is told of and the next one runs; a batch that does not fit is halved. Compiling takes most of the time:
after `--minutes` what is left is not begun.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("tests", "attention", "train", "infer")
TESTS = ("tests/fast/test_flex_attention.py", "tests/fast/test_cuda.py")
# Images that keep a card busy and, at 384 px, fit three networks' updates into 80 GB.
TRAIN_BATCH = {("coatnet_0", 224): 128, ("coatnet_0", 384): 48, ("coatnet_2", 224): 64, ("coatnet_2", 384): 24}
INFER_BATCH = 64
SHORTEST_S = 40  # less is not worth beginning a step for


@dataclass(frozen=True, kw_only=True)
class Step:
    """One process of its own, and the record that it adds to."""

    kind: str
    network: str = ""
    image_size: int = 0
    batch: int = 0

    @property
    def title(self) -> str:
        return f"{self.kind} {self.network} {self.image_size} px, batch {self.batch}" if self.network else self.kind


def main() -> int:
    wanted = _arguments()
    if wanted.only:
        measure(Step(**json.loads(wanted.only)), wanted)
        return 0
    wanted.out.mkdir(parents=True, exist_ok=True)
    end, failed = time.monotonic() + 60 * wanted.minutes, list[str]()
    for step in _steps(wanted):
        if end - time.monotonic() < SHORTEST_S:
            _tell(wanted.out, f"== {step.title}: no time left")
            failed.append(step.title)
        elif not _run(step, wanted, end):
            failed.append(step.title)
    _tell(wanted.out, f"== not done: {'; '.join(failed)}" if failed else "== all done")
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out = os.environ.get("OUT")
    parser.add_argument("out", type=Path, nargs="?" if out else None, default=Path(out) if out else None)
    parser.add_argument("--steps", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--networks", nargs="+", default=("coatnet_0", "coatnet_2"))
    parser.add_argument("--sizes", nargs="+", type=int, default=(224, 384), help="px")
    parser.add_argument("--batch", type=int, help="images at once, instead of what fits each network")
    parser.add_argument("--against", choices=("timm", "none"), default="timm")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda", help="cpu to rehearse")
    parser.add_argument("--minutes", type=float, default=9.5, help="of everything together")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # one step, as this program calls itself
    return parser.parse_args()


def _steps(wanted: argparse.Namespace) -> Iterator[Step]:
    for kind in wanted.steps:
        if kind in ("tests", "attention"):
            yield Step(kind=kind)
            continue
        for network in reversed(wanted.networks):  # the largest first: it is what has a goal of its own
            for size in sorted(wanted.sizes, reverse=True):
                usual = TRAIN_BATCH.get((network, size), 32) if kind == "train" else INFER_BATCH
                yield Step(kind=kind, network=network, image_size=size, batch=wanted.batch or usual)


def _run(step: Step, wanted: argparse.Namespace, end: float) -> bool:
    """Run one step and add what it measured to its record; return whether it ended well."""
    part, start = wanted.out / "part.json", time.monotonic()
    part.unlink(missing_ok=True)
    _tell(wanted.out, f"== {step.title}")
    said = _call(_command(step, wanted, part), end - start)
    (wanted.out / "log.txt").open("a").write(said)
    seconds = time.monotonic() - start
    if part.is_file():
        _add(json.loads(part.read_text()), wanted.out / f"gpu_{step.kind}.json")
        part.unlink()
    if not said.endswith("(exit 0)\n"):
        _tell(wanted.out, f"== {step.title}: failed after {seconds:.0f} s\n" + "\n".join(said.splitlines()[-15:]))
        too_large = "out of memory" in said and step.batch > 1 and end - time.monotonic() > SHORTEST_S
        return too_large and _run(replace(step, batch=step.batch // 2), wanted, end)
    _tell(wanted.out, "\n".join(said.splitlines()[-25:]) + f"\n== {step.title}: {seconds:.0f} s")
    return True


def _command(step: Step, wanted: argparse.Namespace, part: Path) -> list[str]:
    if step.kind == "tests":
        return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    only = json.dumps({"kind": step.kind, "network": step.network, "image_size": step.image_size, "batch": step.batch})
    options = ["--against", wanted.against, "--rounds", str(wanted.rounds), "--device", wanted.device]
    return [sys.executable, str(Path(__file__).resolve()), str(part.resolve()), *options, "--only", only]


def _call(command: list[str], timeout_s: float) -> str:
    """Run a program; return what it said and, last, how it ended."""
    environ = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    }
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout_s,
            check=False, text=True, errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
        return (said.decode(errors="replace") if isinstance(said, bytes) else said) + "\n(its time ran out)\n"
    return f"{done.stdout}\n(exit {done.returncode})\n"


def _add(record: dict[str, Any], path: Path) -> None:
    """Add a record's rows to the record of its kind."""
    if path.is_file():
        earlier = json.loads(path.read_text())
        record["figures"]["rows"] = earlier["figures"]["rows"] + record["figures"]["rows"]
        record["n"] += earlier["n"]
        record["seconds"] += earlier["seconds"]
    path.write_text(json.dumps(record, indent=2) + "\n")


def _tell(out: Path, text: str) -> None:
    print(text, flush=True)
    if text.startswith("=="):
        (out / "log.txt").open("a").write(text.splitlines()[0] + "\n")


def measure(step: Step, wanted: argparse.Namespace) -> None:
    """Run one step in this process and write its record."""
    import torch

    from coatnet.bench.show import measure as run_and_show
    from coatnet.ranks import find_device
    from coatnet.zoo import find

    torch.set_float32_matmul_precision("highest")
    device, libraries = find_device(wanted.device), ["timm"] if wanted.against == "timm" else []

    def rows() -> list[dict[str, Any]]:
        if step.kind == "attention":
            from gpu_attention import compare

            return compare(device, wanted.rounds)
        config = replace(find(step.network).config, image_size=(step.image_size, step.image_size))
        if step.kind == "train":
            from coatnet.bench.train import bench_train

            return [
                bench_train(
                    config, batch=step.batch, precision="bf16", libraries=libraries, device=device, rounds=wanted.rounds
                )
            ]
        from coatnet.bench.infer import bench_infer

        return bench_infer(
            config, batches=[step.batch], precisions=["bf16"], libraries=libraries, device=device, rounds=wanted.rounds
        )

    run_and_show(step.kind, rows, threads=0, out=wanted.out, quiet=False)


if __name__ == "__main__":
    sys.exit(main())
