"""What `coatnet study` does with what was typed: the runs, the findings, the record, the report."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from coatnet.data.sources import open_data
from coatnet.errors import ConfigError
from coatnet.layout import count
from coatnet.plan.estimate import H100_TFLOPS, UTILISATION
from coatnet.ranks import find_device
from coatnet.record import write_record
from coatnet.studies.catalogue import STUDIES, find
from coatnet.studies.findings import find as find_answers
from coatnet.studies.findings import group
from coatnet.studies.progress import Shown
from coatnet.studies.runs import Cell, cells_of, do_all, is_done, read_result, shard_of
from coatnet.studies.scales import DATA_WANTED, SCALES, Scale, ScaleName
from coatnet.studies.study import Study

FORWARD_AND_BACKWARD = 3  # times the multiply-adds of a forward pass


def run_study(
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
    """Do what is left of a study and return its record, or None where other shards still have runs to do.

    Raises: ConfigError for what is unknown or missing; Stopped; what `train` raises.
    """
    study, scale = find(name), _scale(scale_name, data)
    _check_packages()
    trainings = study.trainings(scale)
    cells = cells_of(trainings, num_seeds, _num_classes)
    mine = cells if shard is None else shard_of(cells, *shard)
    console.print(f"{study.title}: {study.question} ({study.source})")
    left = [cell for cell in mine if not is_done(out, cell)]
    console.print(f"{len(cells)} runs, {len(mine)} of them here, {len(mine) - len(left)} done. {cost(left)}")
    with Shown(console, len(mine)) as shown:
        for cell in do_all(mine, out, str(find_device(device)), shown.listener):
            shown.done(cell, read_result(out, cell))
    missing = [cell for cell in cells if not is_done(out, cell)]
    if missing:
        console.print(
            f"{len(missing)} runs of other shards are missing. Bring them into {out / 'runs'}, and ask again."
        )
        return None
    return _conclude(study, scale, cells, num_seeds, out, console)


def _scale(name: ScaleName, data: str | None) -> Scale:
    scale = SCALES[name]
    if data is not None:
        return scale.on(data)
    if scale.usual.data == DATA_WANTED:
        raise ConfigError(f"--scale {name} needs --data, a folder of pictures like ImageNet's.")
    return scale


def _check_packages() -> None:
    if find_spec("scipy") is None:  # before hours of training, not after
        raise ConfigError("A study needs SciPy. Install it with: pip install 'coatnet[studies]'")


@cache
def _num_classes(data: str) -> int:
    return len(open_data(data).class_names)


def _conclude(
    study: Study, scale: Scale, cells: Sequence[Cell], num_seeds: int, out: Path, console: Console
) -> dict[str, Any]:
    """Write record, page and picture of a study whose runs are all there."""
    from coatnet.studies.report import write_page, write_picture

    results = {cell.key: read_result(out, cell) for cell in cells}
    findings = find_answers(study, scale, group(cells, lambda cell: results[cell.key]))
    figures = {
        "study": study.name,
        "scale": scale.name,
        "data": sorted({cell.config.data for cell in cells}),
        **findings,
        "runs": [{"row": cell.training.row, "setting": cell.training.setting, **results[cell.key]} for cell in cells],
    }
    if study.measures_costs:
        from coatnet.studies.costs import measure_costs

        figures["costs"] = measure_costs(study.trainings(scale))
    path = out / f"{study.name}.json"
    seconds = sum(result["seconds"] for result in results.values())
    record = write_record(
        path, kind="study", figures=figures, seeds=list(range(num_seeds)), n=len(cells), seconds=seconds
    )
    write_picture(path.with_suffix(".png"), study, record)
    write_page(path.with_suffix(".html"), study, record)
    show_answers(record, console)
    console.print(f"report: {path.with_suffix('.html')}")
    return record


def show_answers(record: dict[str, Any], console: Console) -> None:
    """Print the table and the answers."""
    table = Table("row", "setting", "parameters", "M multiply-adds", "top-1 %", "training loss")
    for row in record["figures"]["table"]:
        top1 = row["top1_percent"]
        table.add_row(
            row["row"], row["setting"], f"{row['num_params']:,}", f"{1000 * row['gmacs']:.1f}",
            f"{top1['mean']:.2f}" + ("" if top1["deviation"] is None else f" +- {top1['deviation']:.2f}"),
            f"{row['train_loss']['mean']:.4f}",
        )  # fmt: skip
    console.print(table)
    for answer in record["figures"]["answers"]:
        console.print(f"{answer['claim']} ({answer['setting']}, {answer['measure']}): {answer['verdict']}")


def cost(cells: Sequence[Cell]) -> str:
    """Say what the runs cost in multiply-adds, and in hours of a GPU by the assumptions of `coatnet plan`."""
    macs = sum(training_macs(cell) for cell in cells)
    hours = 2 * macs / (UTILISATION * H100_TFLOPS * 1e12) / 3600
    return (
        f"{macs:.2g} multiply-adds: {hours:.2g} hours of an H100 at {UTILISATION:.0%} of its bf16 products."
        if cells
        else ""
    )


def training_macs(cell: Cell) -> float:
    """Return the multiply-adds of a training."""
    config = cell.config
    data = _opened(config.data, config.holdout_percent, config.train_percent)
    return FORWARD_AND_BACKWARD * 1e9 * count(config.model).gmacs * config.num_epochs * data
