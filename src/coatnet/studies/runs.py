"""The trainings of a study, one run folder each, done once: by this process, by others beside it, on other machines.

OUT/runs/KEY/             the run folder that `coatnet.train` leaves
OUT/runs/KEY.json         what the study keeps of it; it is written last, so where it is the run is done
OUT/runs/KEY.json.lock    held by the process that trains it

KEY follows from the config without names, the seed, and what the run starts from: studies that train the same network
share its run, and a training that was changed is another one. Folders OUT of several machines merge by copying their
runs together.
"""

from __future__ import annotations

import base64
import hashlib
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from coatnet.classifier import load
from coatnet.config import TrainConfig
from coatnet.data.sources import DataSet, open_data
from coatnet.errors import ConfigError, TrainingError
from coatnet.evaluation.metrics import evaluate
from coatnet.files import read_json, write_json
from coatnet.ranks import find_device, is_first_rank, join
from coatnet.studies.cost import images_seen
from coatnet.studies.study import Training
from coatnet.training import run_folder
from coatnet.training.choices import num_workers_for
from coatnet.training.loop import train
from coatnet.training.run import Progress

WAIT_S = 2.0  # between looks at runs that other processes are doing
Bits = NDArray[np.bool_]


@dataclass(frozen=True)
class Cell:
    """One run of a study: a training with a seed."""

    training: Training
    config: TrainConfig  # whole but for folder and machine
    seed: int
    key: str
    start: Cell | None  # whose weights it starts from

    @property
    def name(self) -> str:
        return f"{self.training.row}, {self.training.setting}, seed {self.seed}"


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """Somebody asked a training to stop; what is done is kept."""

    def __init__(self, by: signal.Signals) -> None:
        super().__init__(by.name)
        self.by = by


@cache
def opened(data: str) -> DataSet:
    """Return a data set, nothing set apart."""
    return open_data(data, holdout_percent=None)


def cells_of(trainings: Sequence[Training], num_seeds: int) -> list[Cell]:
    """Return the runs, all rows of a seed before those of the next.

    Raises: DataError for pictures that are not there; ConfigError where none could be set apart to look at.
    """
    found = dict[tuple[str, str, int], Cell]()
    for seed in range(num_seeds):
        for training in trainings:
            start = None if training.after is None else found[training.row, training.after, seed]
            config = replace(_fitted(training.config), seed=seed)
            key = _key(config, start)
            found[training.row, training.setting, seed] = Cell(training, config, seed, key, start)
    return list(found.values())


def _fitted(config: TrainConfig) -> TrainConfig:
    """Fit a training to its pictures: their classes, and a warm-up that ends well before the run does."""
    data = opened(config.data)
    if data.val is None and data.test is None and config.holdout_percent is None:
        raise ConfigError(f"{config.data} has neither val/ nor test/ beside train/, and this scale sets none apart.")
    num_steps = images_seen(config, len(data.train)) / config.global_batch_size
    optimizer = config.optimizer
    if optimizer.warmup_steps > num_steps / 2:
        optimizer = replace(optimizer, warmup_steps=int(num_steps / 10))
    return replace(config, optimizer=optimizer, model=replace(config.model, num_classes=len(data.class_names)))


def _key(config: TrainConfig, start: Cell | None) -> str:
    nameless = replace(config, model=replace(config.model, name="")).to_dict()
    digest = hashlib.sha256(json.dumps([nameless, start.key if start else None], sort_keys=True).encode()).hexdigest()
    return f"{config.model.layout}-{config.preprocessing.image_size[0]}px-seed{config.seed}-{digest[:10]}"


def shard_of(cells: Sequence[Cell], index: int, count: int) -> list[Cell]:
    """Return the index-th of count shares of the runs, index from 1; a run lies with the one that it starts from."""
    roots = list(dict.fromkeys(_root(cell).key for cell in cells))
    mine = set(roots[index - 1 :: count])
    return [cell for cell in cells if _root(cell).key in mine]


def _root(cell: Cell) -> Cell:
    return cell if cell.start is None else _root(cell.start)


def result_path(out: Path, cell: Cell) -> Path:
    """Return where the result of a run is, or will be."""
    return out / "runs" / f"{cell.key}.json"


def is_done(out: Path, cell: Cell) -> bool:
    return result_path(out, cell).is_file()


def read_result(out: Path, cell: Cell) -> dict[str, Any]:
    """Return the result of a run that is done. Raises: ModelFileError."""
    return read_json(result_path(out, cell))


def do_all(cells: Sequence[Cell], out: Path, device: str, listener: Callable[[Cell], Progress]) -> Iterator[Cell]:
    """Do the runs that nobody has done and yield each when it is there; processes with one OUT divide them.

    `listener` gives what hears of a run's updates. Raises: Stopped, and what `train` raises.
    """
    left = list(cells)
    while left:
        waiting = list[Cell]()
        for cell in left:
            if _try_one(cell, out, device, listener):
                yield cell
            else:
                waiting.append(cell)
        if len(waiting) == len(left):
            time.sleep(WAIT_S)
        left = waiting


class _State(IntEnum):
    """What rank 0 finds of a run, and tells the others."""

    DONE = 0
    BUSY = 1  # another process is at it, or the run that it starts from is not done
    OURS = 2


def _try_one(cell: Cell, out: Path, device: str, listener: Callable[[Cell], Progress]) -> bool:
    """Do a run that is nobody's; return whether it is done."""
    with ExitStack() as lock:
        state = _claim(cell, out, lock) if is_first_rank() else _State.BUSY
        with join(device) as ranks:
            state = _State(int(ranks.first_says(state)))
        if state == _State.OURS:
            _do(cell, out, device, listener(cell))
        return state != _State.BUSY


def _claim(cell: Cell, out: Path, lock: ExitStack) -> _State:
    """Return how a run stands; one that is ours is locked until the stack closes."""
    if is_done(out, cell):
        return _State.DONE
    if cell.start is not None and not is_done(out, cell.start):
        return _State.BUSY
    path = result_path(out, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.enter_context(FileLock(f"{path}.lock", timeout=0))
    except Timeout:
        return _State.BUSY
    return _State.DONE if is_done(out, cell) else _State.OURS


def _do(cell: Cell, out: Path, device: str, progress: Progress) -> None:
    """Train, from the newest checkpoint where one is left, and write the result."""
    folder = out / "runs" / cell.key
    config = replace(
        cell.config,
        out=str(folder),
        device=device,
        num_workers=num_workers_for(find_device(device)),
        init=None if cell.start is None else str(out / "runs" / cell.start.key),
    )
    result = train(config, start="resume" if run_folder.is_begun(folder) else "new", progress=progress)
    if result.stopped_by is not None:
        raise Stopped(result.stopped_by)
    with join(device) as ranks:
        if ranks.is_first:
            write_json(result_path(out, cell), _summarise(folder, cell, ranks.device))


def _summarise(folder: Path, cell: Cell, device: torch.device) -> dict[str, Any]:
    """Return what a study keeps of a run: its curve, its accuracy, and which pictures it names right."""
    data = open_data(cell.config.data, seed=cell.seed, holdout_percent=cell.config.holdout_percent)
    part, correct = _last_look(folder, data, device)
    record, history = read_json(folder / "record.json"), read_history(folder)
    return {
        "model": cell.config.model.name,
        "image_size": list(cell.config.preprocessing.image_size),
        "seed": cell.seed,
        "data_sha256": run_folder.read_start(folder)["data_sha256"],
        "part": part,
        "n": len(correct),
        "top1_percent": 100 * float(correct.mean()),
        "correct": pack(correct),
        "train_loss": history[-1]["train_loss"],
        "val_loss": history[-1].get("val_loss"),
        "history": history,
        "num_params": record["figures"]["num_params"],
        "gmacs": record["figures"]["gmacs"],
        "images": round(record["figures"]["steps"] * cell.config.global_batch_size),
        "num_bad_images": len(record["figures"]["bad_images"]),
        "num_skipped": record["figures"]["num_skipped"],
        "seconds": record["seconds"],
        "commit": record["commit"],
        "host": record["host"],
        "versions": record["versions"],
        "config": record["config"],
    }


def _last_look(folder: Path, data: DataSet, device: torch.device) -> tuple[str, Bits]:
    """Return the part looked at, test where there is one, and which of its pictures are named right, in its order.

    One that cannot be read is not, so that all networks are asked as many.
    """
    part, images = ("test", data.test) if data.test is not None else ("val", data.val)
    if images is None:
        raise TrainingError(f"{data.name} has no picture apart from those for training. Give a larger set.")
    outcome = evaluate(load(folder / "model", device=device), images)
    correct = np.zeros(len(images), dtype=np.bool_)
    correct[outcome.positions] = outcome.predictions == outcome.targets
    return part, correct


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics, one an evaluation."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def pack(bits: Bits) -> str:
    """Write (N,) bool as base64, eight a byte, the first in the highest place."""
    return base64.b64encode(np.packbits(bits).tobytes()).decode()


def unpack(text: str, n: int) -> Bits:
    """Read (n,) bool as `pack` writes them."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), dtype=np.uint8), count=n).astype(bool)
