"""What `coatnet study` does: the runs, the findings, the record, the page and the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table

from coatnet.data.sources import name_of
from coatnet.errors import ConfigError
from coatnet.ranks import find_device, is_first_rank
from coatnet.record import write_record
from coatnet.studies import catalogue
from coatnet.studies.cost import in_words, total_images, total_macs
from coatnet.studies.progress import Shown
from coatnet.studies.runs import Cell, cells_of, do_all, is_done, opened, read_result, shard_of
from coatnet.studies.scales import DATA_WANTED, SCALES, Scale, moved
from coatnet.studies.study import Study, Training
from coatnet.studies.transfer import PRETRAINED
from coatnet.training.allocator import keep_freed_memory
from coatnet.typed import ScaleName


def do_study(
    name: str,
    *,
    data: str | None,
    pretraining_data: str | None,
    scale_name: ScaleName,
    num_seeds: int,
    out: Path,
    shard: tuple[int, int] | None,
    device: str,
    console: Console,
) -> dict[str, Any] | None:
    """Do what is left of a study and return its record, or None where others write it or still have runs to do.

    Raises: ConfigError for what is unknown or missing; Stopped; what `train` raises.
    """
    study = catalogue.find(name)
    if find_spec("scipy") is None:  # said before hours of training, not after
        raise ConfigError("A study needs SciPy. Install it with: pip install 'coatnet[studies]'")
    scale = _find_scale(scale_name, data, pretraining_data)
    trainings = study.trainings(scale)
    _check_data_is_given(trainings, scale)
    keep_freed_memory()
    cells = cells_of(trainings, num_seeds)
    mine = cells if shard is None else shard_of(cells, *shard)
    left = [cell for cell in mine if not is_done(out, cell)]
    console.print(f"{study.title} ({study.source}): {study.question}")
    console.print(f"{len(cells)} runs, {len(mine)} of them here, {len(mine) - len(left)} done")
    if left:
        configs = [cell.config for cell in left]
        console.print(f"to do: {in_words(total_images(configs, _num_images), total_macs(configs, _num_images))}")
    shown = Shown(console, len(mine))
    with shown.bar:
        for cell in do_all(mine, out, str(find_device(device)), shown.listener):
            shown.done(cell, read_result(out, cell))
    missing = sum(not is_done(out, cell) for cell in cells)
    if missing:
        what = "run" if missing == 1 else "runs"
        console.print(f"{missing} {what} of other shares missing. Copy them into {out / 'runs'}, and ask again.")
        return None
    if not is_first_rank():
        return None
    name = "-".join([study.name, scale.name, *([name_of(data)] if data else [])])
    try:
        with FileLock(out / f"{name}.lock", timeout=0):
            return _conclude(study, scale, cells, out / f"{name}.json", device, console)
    except Timeout:
        console.print("Another process writes the report.")
        return None


def _find_scale(name: ScaleName, data: str | None, pretraining_data: str | None) -> Scale:
    """Return the scale on the pictures given, if any were."""
    scale = SCALES[name]
    if data is not None:
        scale = scale.on(data, _num_images(data))
    if pretraining_data is not None:
        first = moved(scale.pretrained, pretraining_data, _num_images(pretraining_data))
        scale = replace(scale, pretrained=first)
    return scale


def _check_data_is_given(trainings: Sequence[Training], scale: Scale) -> None:
    """Raise ConfigError where a scale leaves it to the user which pictures, and nothing was said."""
    wanted = {training.setting == PRETRAINED for training in trainings if training.config.data == DATA_WANTED}
    if False in wanted:
        raise ConfigError(f"--scale {scale.name} needs --data, a folder of pictures like ImageNet's.")
    if wanted:
        raise ConfigError(f"--scale {scale.name} needs --pretraining-data, a folder of pictures like ImageNet-21K's.")


def _num_images(data: str) -> int:
    return len(opened(data).train)


def _conclude(
    study: Study, scale: Scale, cells: Sequence[Cell], path: Path, device: str, console: Console
) -> dict[str, Any]:
    """Write record, page and picture of a study whose runs are all there."""
    from coatnet.studies.findings import find_answers, group
    from coatnet.studies.page import write_page
    from coatnet.studies.picture import write_picture

    results = {cell.key: read_result(path.parent, cell) for cell in cells}
    figures = {
        "study": study.name,
        "scale": scale.name,
        "data": sorted({cell.config.data for cell in cells}),
        **find_answers(study, scale, group(cells, lambda cell: results[cell.key])),
        "runs": [{"row": cell.training.row, "setting": cell.training.setting, **results[cell.key]} for cell in cells],
    }
    if study.measures_speed:
        from coatnet.studies.speed import measure_speed

        configs = {cell.training.row: replace(cell.config, device=device) for cell in cells}
        figures["speed"] = measure_speed(configs)
    record = write_record(
        path,
        kind="study",
        figures=figures,
        seeds=sorted({cell.seed for cell in cells}),
        n=len(cells),
        seconds=sum(result["seconds"] for result in results.values()),
    )
    write_picture(path.with_suffix(".png"), study, record)
    write_page(path.with_suffix(".html"), study, record)
    show_answers(record, console)
    console.print(f"report: {path.with_suffix('.html')}")
    return record


def show_answers(record: dict[str, Any], console: Console) -> None:
    """Print the table and the answers."""
    figures = record["figures"]
    table = Table("row", "setting", "parameters", "M multiply-adds", "top-1 %", "95 % interval", "training loss")
    for row in figures["table"]:
        top1 = row["top1_percent"]
        interval = "one seed" if top1["low"] is None else f"{top1['low']:.2f} to {top1['high']:.2f}"
        table.add_row(
            row["row"], row["setting"], f"{row['num_params']:,}", f"{1000 * row['gmacs']:.1f}",
            f"{top1['mean']:.2f}", interval, f"{row['train_loss']['mean']:.4f}",
        )  # fmt: skip
    console.print(table)
    answers = Table("ordering", "setting", "measured by", "difference", "95 % interval", "answer", "seeds to tell")
    for answer in figures["answers"]:
        difference = answer["difference"]
        digits = 2 if answer["measure"] == "top1_percent" else 4
        mean, low, high = (_signed(difference[key], digits) for key in ("mean", "low", "high"))
        seeds = "" if answer["verdict"] != "cannot tell" else answer["seeds_that_would_tell"] or "over 1000"
        answers.add_row(
            answer["claim"], answer["setting"], answer["measure"], mean, f"{low} to {high}",
            answer["verdict"], str(seeds),
        )  # fmt: skip
    console.print(answers)


def _signed(value: float | None, digits: int) -> str:
    return "unknown" if value is None else f"{value:+.{digits}f}"
