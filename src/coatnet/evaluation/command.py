"""What `coatnet eval` and `coatnet predict` do with what was typed."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from coatnet.classifier import Classifier, Prediction, load
from coatnet.config import FloatPrecision
from coatnet.data.sources import ImageSet, Split, list_images, open_data
from coatnet.errors import BadImageError, ConfigError, DataError
from coatnet.evaluation.metrics import Interval, Summary, evaluate, summarise
from coatnet.evaluation.tables import interval_text
from coatnet.files import read_json
from coatnet.ranks import find_device

Part = Literal["train", "val", "test"]
NUM_SEEN_AT_ONCE = 64
WORTH_PREPARING = 4  # pictures from which on the fast form saves more than it takes to make


def evaluate_run(
    run: Path,
    data: str,
    *,
    part: Part | None,
    batch_size: int,
    device: str,
    num_workers: int,
    precision: FloatPrecision = "fp32",
) -> tuple[Summary, str, dict[str, str]]:
    """Measure a run's model on a part of the data; return the figures, the part's name and the bad files.

    Without `part` it is test where there is one, else val, else all pictures. The pictures that the run itself set
    aside of this data are its val. Raises: ConfigError, DataError, ModelFileError.
    """
    if batch_size < 1 or num_workers < 0:
        raise ConfigError(f"The batch size is {batch_size}, workers are {num_workers}. Give 1 or more, and 0 or more.")
    classifier = load(run, device=find_device(device))
    classifier.optimize(precision=precision)
    name, image_set = _choose_part(run, data, part)
    stderr = Console(stderr=True)
    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task("looking", total=len(image_set))
        outcome = evaluate(
            classifier,
            image_set,
            batch_size=batch_size,
            num_workers=num_workers,
            progress=lambda num_done: bar.update(task, completed=num_done),
        )
    return summarise(outcome), name, outcome.bad_images


def _choose_part(run: Path, data: str, part: Part | None) -> tuple[str, ImageSet]:
    found = open_data(data, holdout_percent=None)
    split = _split_of(run)
    if split is not None and found.split is not None and _names(split) <= _names(found.split):
        found = open_data(data, split=split)  # the run's own pictures, wherever they lie now
    parts = {"test": found.test, "val": found.val, "train": found.train}
    if part is not None:
        chosen = parts[part]
        if chosen is None:
            there = ", ".join(name for name, images in parts.items() if images is not None)
            raise DataError(f"{data} has no {part} part. It has: {there}.")
        return part, chosen
    name = next(name for name, images in parts.items() if images is not None)
    chosen = parts[name]
    assert chosen is not None
    return ("all" if name == "train" else name), chosen


def _console() -> Console:
    """Show names as they are; off a terminal nothing is cut to a width that nobody sees."""
    width = None if sys.stdout.isatty() else 1000
    return Console(width=width, highlight=False, markup=False, emoji=False)


def _split_of(run: Path) -> Split | None:
    """Return how the run divided its pictures, if it did; `run` may be the run's model folder."""
    for folder in (run, run.parent):
        if (folder / "split.json").is_file() and (folder / "model").is_dir():
            return read_json(folder / "split.json")
    return None


def _names(split: Split) -> set[str]:
    return {name for names in split.values() for name in names}


def show(summary: Summary, part: str, bad_images: dict[str, str]) -> None:
    """Print the figures as text: the headline, then a row a class."""
    console = _console()
    console.print(f"{summary.n} pictures ({part})")
    figures: tuple[tuple[str, float | None, Interval | None, str, int], ...] = (
        ("top-1", summary.top1_percent, summary.top1_interval, " %", 2),
        ("top-5", summary.top5_percent, summary.top5_interval, " %", 2),
        ("loss", summary.loss, summary.loss_interval, "", 4),
        ("calibration error", summary.ece_percent, summary.ece_interval, " %", 2),
    )
    for label, value, interval, unit, digits in figures:
        if value is not None:
            between = "" if interval is None else f"   (95 %: {interval_text(interval, digits)})"
            console.print(f"{label:18}{value:.{digits}f}{unit}{between}")
    table = Table()
    table.add_column("class", overflow="fold")
    for heading in ("pictures", "precision %", "recall %", "F1 %"):
        table.add_column(heading, justify="right")
    for row in summary.classes:
        cells = (row.precision_percent, row.recall_percent, row.f1_percent)
        table.add_row(row.name, str(row.support), *("-" if cell is None else f"{cell:.1f}" for cell in cells))
    console.print(table)
    for name, reason in bad_images.items():
        print(f"could not read {name}: {reason}", file=sys.stderr)


def predict_files(
    run: Path,
    arguments: list[str],
    *,
    k: int,
    output: Literal["table", "csv", "jsonl"],
    device: str,
    precision: FloatPrecision = "fp32",
) -> int:
    """Print the k best labels of each picture as it is seen; return how many files could not be read."""
    paths = list_images(arguments)
    classifier = load(run, device=find_device(device))
    if len(paths) >= WORTH_PREPARING or precision != "fp32":
        classifier.optimize(precision=precision)
    bad: list[BadImageError] = []
    answers = _answers(classifier, paths, k, bad)
    {"table": _print_table, "csv": _print_csv, "jsonl": _print_jsonl}[output](answers)
    for error in bad:
        print(f"could not read {error}", file=sys.stderr)
    return len(bad)


Answers = Iterator[tuple[Path, list[Prediction]]]


def _answers(classifier: Classifier, paths: list[Path], k: int, bad: list[BadImageError]) -> Answers:
    """Yield each readable picture's answer, in order; gather the errors of the others."""
    for start in range(0, len(paths), NUM_SEEN_AT_ONCE):
        chunk = paths[start : start + NUM_SEEN_AT_ONCE]
        try:
            yield from zip(chunk, classifier.predict(chunk, k=k), strict=True)
        except BadImageError:  # one by one, to tell the bad from the good
            for path in chunk:
                try:
                    answer = classifier.predict(path, k=k)[0]
                except BadImageError as error:
                    bad.append(error)
                else:
                    yield path, answer


def _print_table(answers: Answers) -> None:
    table = Table()
    table.add_column("picture", overflow="fold")
    table.add_column("label")
    table.add_column("probability %", justify="right")
    for path, answer in answers:
        for place, best in enumerate(answer):
            table.add_row("" if place else str(path), best.label, f"{100 * best.probability:.1f}")
    _console().print(table)


def _print_csv(answers: Answers) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("picture", "rank", "label", "probability"))
    for path, answer in answers:
        writer.writerows((path, rank, best.label, f"{best.probability:.6f}") for rank, best in enumerate(answer, 1))


def _print_jsonl(answers: Answers) -> None:
    for path, answer in answers:
        best = [{"label": label, "probability": round(probability, 6)} for label, probability in answer]
        print(json.dumps({"picture": str(path), "best": best}), flush=True)
