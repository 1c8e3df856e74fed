"""Measure the peak memory of training on the CPU beside what `coatnet plan` foretells, and write the record.

    python tools/measure_plan.py --out results/plan_memory.json

Each case is a process of its own: the readable network (`for_training` is not called) is built and updated twice, and
the highest resident memory is taken, less what was resident before, after an update of a tiny network had loaded every
library. Freed maps go back to the system at once (MALLOC_MMAP_THRESHOLD_), so that what is resident is what is used.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from coatnet.bench.memory import peak_mib
from coatnet.bench.train import make_update
from coatnet.config import ModelConfig
from coatnet.model.network import CoAtNet
from coatnet.plan.memory import Setting, peak_bytes
from coatnet.plan.tape import record
from coatnet.record import write_record
from coatnet.zoo import find

Case = dict[str, Any]
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
NUM_UPDATES = 2  # the second one also holds the optimizer's averages


def main() -> None:
    """Measure every case, print it, and write the record."""
    args = read_arguments()
    if args.case:
        print(json.dumps(measure_here(json.loads(args.case))))
        return
    start = time.perf_counter()
    rows = [measure(case) for case in cases(args)]
    figures = {"rows": rows, "largest_error_percent": max(abs(row["error_percent"]) for row in rows)}
    if args.out:
        write_record(
            args.out, kind="plan memory", figures=figures, seeds=[], n=len(rows), seconds=time.perf_counter() - start
        )
    print(json.dumps(figures) if args.json else f"largest error {figures['largest_error_percent']:.1f} %")


def read_arguments() -> argparse.Namespace:
    """Read what was typed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the record")
    parser.add_argument("--models", nargs="+", default=["coatnet_0", "coatnet_1", "coatnet_2"])
    parser.add_argument("--sizes", nargs="+", type=parse_case_size, default=[(128, 24), (224, 8)], metavar="PX:BATCH")
    parser.add_argument("--precisions", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


def parse_case_size(text: str) -> tuple[int, int]:
    """Return (px, batch) of "224:8"."""
    px, batch = text.split(":")
    return int(px), int(batch)


def cases(args: argparse.Namespace) -> list[Case]:
    """Return each network at each size, in each precision, with and without activation checkpointing."""
    found = itertools.product(args.models, args.sizes, args.precisions, (False, True))
    return [
        {"model": model, "image_size": px, "batch": batch, "precision": precision, "checkpointed": checkpointed}
        | {"threads": args.threads}
        for model, (px, batch), precision, checkpointed in found
    ]


def measure(case: Case) -> Case:
    """Return the case with what was planned and what a process of its own measured, in MiB."""
    config = replace(find(case["model"]).config, image_size=(case["image_size"],) * 2)
    tapes = record(config, case["precision"], "cpu")
    planned = sum(peak_bytes(tapes, case["batch"], Setting(checkpointed=case["checkpointed"])).values()) / 2**20
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **MALLOC})
    if done.returncode:
        sys.exit(f"{case} could not be measured: {done.stderr.strip().splitlines()[-1]}")
    measured = json.loads(done.stdout)
    error = 100 * (planned / measured - 1)
    row = {
        **case,
        "planned_mib": round(planned, 1),
        "measured_mib": round(measured, 1),
        "error_percent": round(error, 2),
    }
    print(" ".join(f"{name} {value}" for name, value in row.items()), file=sys.stderr, flush=True)
    return row


def measure_here(case: Case) -> float:
    """Return by how many MiB this process grew at its highest while a network was built and updated."""
    torch.set_num_threads(case["threads"])
    update(find("coatnet_pico").config, 2, case, num_updates=1)
    config = replace(find(case["model"]).config, image_size=(case["image_size"],) * 2)
    peak = peak_mib(lambda: update(config, case["batch"], case, num_updates=NUM_UPDATES), torch.device("cpu"))
    if peak is None:
        sys.exit("this system does not tell a process's peak of memory")
    return peak


def update(config: ModelConfig, batch: int, case: Case, *, num_updates: int) -> None:
    """Build a network and update it."""
    network = CoAtNet(config)
    network.activation_checkpointing = case["checkpointed"]
    call = make_update(network, config, batch, case["precision"], torch.device("cpu"))
    for _ in range(num_updates):
        call()


if __name__ == "__main__":
    main()
