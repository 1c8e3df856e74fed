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
from coatnet.data.sources import Split
from coatnet.errors import ModelFileError, TrainingError
from coatnet.files import read_json, write_atomic, write_json
from coatnet.weights import check_size

Start = Literal["new", "overwrite", "resume"]


def check(config: TrainConfig, start: Start) -> None:
    """Raise TrainingError where a run is there already and nobody said what to do with it, or none to resume."""
    run = Path(config.out)
    if start == "resume":
        read_config(run)
    elif _is_taken(run) and not _is_run(run):
        raise TrainingError(f"{run} is there already and is no run folder, so it is left alone. Give another --out.")
    elif _is_taken(run) and start == "new":
        raise TrainingError(
            f"{run} is there already. Give --resume to go on with it, --overwrite to replace it, or another --out."
        )
    elif _is_taken(run):
        for needed in (config.data, config.init):
            if needed and Path(needed).resolve().is_relative_to(run.resolve()):
                raise TrainingError(f"{needed} lies in {run}, which is to be overwritten. Give another --out.")


def begin(config: TrainConfig, split: Split | None) -> None:
    """Make the folder of a new run, in the place of the run that may be there; `check` it before."""
    run = Path(config.out)
    if _is_taken(run):
        shutil.rmtree(run)
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "config.json", config.to_dict())
    if split is not None:
        write_json(run / "split.json", {part: list(names) for part, names in split.items()})


def _is_taken(run: Path) -> bool:
    return run.exists() and (not run.is_dir() or any(run.iterdir()))


def _is_run(folder: Path) -> bool:
    """Return whether a folder is one of ours: other programs name files config.json too."""
    try:
        values = read_json(folder / "config.json")
    except ModelFileError:
        return False
    return isinstance(values, dict) and {"data", "out", "model", "optimizer"} <= values.keys()


def read_config(run: Path) -> TrainConfig:
    """Return the config of a run. Raises: TrainingError if there is none, ModelFileError if it is not its weights'."""
    if not _is_run(run):
        raise TrainingError(f"{run} holds no run. Name one with --out, or start one without --resume.")
    config = TrainConfig.from_dict(read_json(run / "config.json"))
    if num_bytes := sum(file.stat().st_size for file in run.rglob("*.safetensors")):  # none before the first checkpoint
        check_size(config.model, num_bytes, run / "config.json")
    return config


def newest_run(runs: Path) -> Path:
    """Return the run that was last written to. Raises: TrainingError if there is none."""
    found = [path.parent for path in runs.glob("*/config.json") if _is_run(path.parent)]
    if not found:
        raise TrainingError(f"There is no run below {runs}/. Name one with --out.")
    return max(found, key=lambda run: run.stat().st_mtime)


def read_split(run: Path) -> dict[str, list[str]] | None:
    """Return how the run's folder was divided, if it was divided by the run."""
    return read_json(run / "split.json") if (run / "split.json").is_file() else None


def write_history(run: Path, history: list[dict[str, Any]]) -> None:
    """Write the metrics, a JSON object a line. They hold no times, so that equal runs give equal files."""
    write_atomic(run / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))
