"""What `coatnet study` does: the runs, the findings, the record, the page and the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from coatnet.data.sources import DataSet, open_data
from coatnet.errors import ConfigError
from coatnet.ranks import find_device, is_first_rank
from coatnet.record import write_record
from coatnet.studies import catalogue
from coatnet.studies.cost import in_words, total_macs
from coatnet.studies.progress import Shown
from coatnet.studies.runs import Cell, cells_of, do_all, is_done, read_result, shard_of
from coatnet.studies.scales import DATA_WANTED, SCALES, Scale, ScaleName
from coatnet.studies.study import Study
from coatnet.training.allocator import keep_freed_memory


def do_study(
    name: str,
    *,
    data: str | None,
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
    study, scale = catalogue.find(name), _find_scale(scale_name, data)
    if find_spec("scipy") is None:  # said before hours of training, not after
        raise ConfigError("A study needs SciPy. Install it with: pip install 'coatnet[studies]'")
    keep_freed_memory()
    cells = cells_of(study.trainings(scale), num_seeds, lambda data: len(_opened(data).class_names))
    mine = cells if shard is None else shard_of(cells, *shard)
    left = [cell for cell in mine if not is_done(out, cell)]
    console.print(f"{study.title} ({study.source}): {study.question}")
    console.print(f"{len(cells)} runs, {len(mine)} of them here, {len(mine) - len(left)} done")
    if left:
        cost = total_macs((cell.config for cell in left), lambda data: len(_opened(data).train))
        console.print(f"to do: {in_words(cost)}")
    with Shown(console, len(mine)) as shown:
        for cell in do_all(mine, out, str(find_device(device)), shown.listener):
            shown.done(cell, read_result(out, cell))
    missing = sum(not is_done(out, cell) for cell in cells)
    if missing:
        what = "run" if missing == 1 else "runs"
        console.print(f"{missing} {what} of other shares missing. Copy them into {out / 'runs'}, and ask again.")
        return None
    return _conclude(study, scale, cells, out, device, console) if is_first_rank() else None


def _find_scale(name: ScaleName, data: str | None) -> Scale:
    scale = SCALES[name]
    if data is not None:
        return scale.on(data)
    if scale.usual.data == DATA_WANTED:
        raise ConfigError(f"--scale {name} needs --data, a folder of pictures like ImageNet's.")
    return scale


@cache
def _opened(data: str) -> DataSet:
    return open_data(data, holdout_percent=None)


def _conclude(
    study: Study, scale: Scale, cells: Sequence[Cell], out: Path, device: str, console: Console
) -> dict[str, Any]:
    """Write record, page and picture of a study whose runs are all there."""
    from coatnet.studies.findings import find_answers, group
    from coatnet.studies.page import write_page
    from coatnet.studies.picture import write_picture

    results = {cell.key: read_result(out, cell) for cell in cells}
    figures = {
        "study": study.name,
        "scale": scale.name,
        "data": sorted({cell.config.data for cell in cells}),
        **find_answers(study, scale, group(cells, lambda cell: results[cell.key])),
        "runs": [{"row": cell.training.row, "setting": cell.training.setting, **results[cell.key]} for cell in cells],
    }
    if study.measures_speed:
        from coatnet.studies.speed import measure_speed

        whole = [replace(cell.training, config=replace(cell.config, device=device)) for cell in cells]
        figures["speed"] = measure_speed(whole[: len(study.trainings(scale))])  # one seed's
    path = out / f"{study.name}.json"
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
    answers = Table(
        "the paper says", "setting", "measured by", "difference", "95 % interval", "answer", "seeds to tell"
    )
    for answer in figures["answers"]:
        difference = answer["difference"]
        interval = "one seed" if difference["low"] is None else f"{difference['low']:+.2f} to {difference['high']:+.2f}"
        seeds = "" if answer["verdict"] != "cannot tell" else answer["seeds_that_would_tell"] or "over 1000"
        answers.add_row(
            answer["claim"], answer["setting"], answer["measure"], f"{difference['mean']:+.2f}", interval,
            answer["verdict"], str(seeds),
        )  # fmt: skip
    console.print(answers)
