"""The run folder: what a training writes, and who may write where.

RUN/config.json    the whole config          RUN/split.json      how an unsplit folder was divided
RUN/metrics.jsonl  a row an evaluation       RUN/checkpoints/    to resume from
RUN/model/         what `coatnet.load` opens RUN/report.html, evaluation.json, record.json   the result
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

from coatnet.config import TrainConfig
from coatnet.errors import TrainingError
from coatnet.files import read_json, write_atomic, write_json

Start = Literal["new", "overwrite", "resume"]


def prepare(config: TrainConfig, start: Start) -> None:
    """Make the run folder ready.

    Raises: TrainingError where a run is there already and nobody said what to do with it, or none is there to resume.
    """
    run = Path(config.out)
    taken = run.exists() and (not run.is_dir() or any(run.iterdir()))
    if start == "resume":
        if not (run / "config.json").is_file():
            raise TrainingError(f"{run} holds no run to resume (no config.json). Start it without --resume.")
        return
    if taken and start == "new":
        raise TrainingError(
            f"{run} is there already. Give --resume to go on with it, --overwrite to replace it, or another --out."
        )
    if taken and not (run / "config.json").is_file():
        raise TrainingError(f"{run} is no run folder (no config.json), so it is not overwritten. Give another --out.")
    if taken:
        shutil.rmtree(run)
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "config.json", config.to_dict())


def read_config(run: Path) -> TrainConfig:
    """Return the config of a run. Raises: TrainingError if there is none."""
    if not (run / "config.json").is_file():
        raise TrainingError(f"{run} holds no run (no config.json).")
    return TrainConfig.from_dict(read_json(run / "config.json"))


def newest_run(runs: Path) -> Path:
    """Return the run that was last written to. Raises: TrainingError if there is none."""
    found = [path.parent for path in runs.glob("*/config.json")]
    if not found:
        raise TrainingError(f"There is no run below {runs}/. Name one with --out.")
    return max(found, key=lambda run: run.stat().st_mtime)


def read_split(run: Path) -> dict[str, list[str]] | None:
    """Return how the run's folder was divided, if it was divided by the run."""
    return read_json(run / "split.json") if (run / "split.json").is_file() else None


def write_history(run: Path, history: list[dict[str, Any]]) -> None:
    """Write the metrics, a JSON object a line. They hold no times, so that equal runs give equal files."""
    write_atomic(run / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))
