"""The run folder: what a training writes, and who may write where.

RUN/config.json      the whole config           RUN/split.json      how an unsplit folder was divided
RUN/start.json       what it was begun with     RUN/run_manifest.json   the SHA-256 of these
RUN/metrics.jsonl    a row an evaluation        RUN/checkpoints/    to resume from
RUN/microbatch.json  where memory ran out: pictures at once since then
RUN/model/           what `coatnet.load` opens  RUN/report.html, evaluation.json, record.json   the result
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

from coatnet.config import TrainConfig
from coatnet.data.sources import TABLE_PREFIX, DataSet, fingerprint
from coatnet.errors import DataError, ModelFileError, TrainingError
from coatnet.files import read_json, verify_folder, write_atomic, write_json, write_manifest
from coatnet.ranks import job_id
from coatnet.record import environment
from coatnet.weights import check_size

CONFIG, SPLIT, START, MICROBATCH = "config.json", "split.json", "start.json", "microbatch.json"
RUN_MANIFEST = "run_manifest.json"  # of the first three
Start = Literal["new", "overwrite", "resume"]


def check(config: TrainConfig, start: Start) -> bool:
    """Return whether there is a run to go on with.

    Raises: TrainingError where a run is there already and nobody said what to do with it, or none to resume.
    """
    run = Path(config.out)
    if start == "resume" and not is_cut_off(run):
        read_config(run)
        return True
    if is_cut_off(run):
        return False
    if _is_taken(run) and not _is_run(run):
        raise TrainingError(f"{run} is there already and is no run folder, so it is left alone. Give another --out.")
    if _is_taken(run) and start == "new":
        raise TrainingError(
            f"{run} is there already. Give --resume to go on with it, --overwrite to replace it, or another --out."
        )
    if _is_taken(run):
        for needed in (config.data, config.init):
            if needed and Path(needed.removeprefix(TABLE_PREFIX)).resolve().is_relative_to(run.resolve()):
                raise TrainingError(f"{needed} lies in {run}, which is to be overwritten. Give another --out.")
    return False


def begin(config: TrainConfig, data: DataSet, num_ranks: int) -> None:
    """Make the folder of a new run, in the place of the run that may be there; `check` it before."""
    run = Path(config.out)
    if _is_taken(run):
        shutil.rmtree(run)
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / CONFIG, config.to_dict())  # first: it tells whose folder this is; the manifest is last
    if data.split is not None:
        write_json(run / SPLIT, {part: list(names) for part, names in data.split.items()})
    write_json(
        run / START, {**environment(), "job": job_id(), "num_ranks": num_ranks, "data_sha256": fingerprint(data)}
    )
    write_manifest(run, [name for name in (CONFIG, SPLIT, START) if (run / name).is_file()], RUN_MANIFEST)


def _is_taken(run: Path) -> bool:
    return run.exists() and (not run.is_dir() or any(run.iterdir()))


def _is_run(folder: Path) -> bool:
    """Return whether a folder is one of ours: other programs name files config.json too."""
    try:
        values = read_json(folder / CONFIG)
    except ModelFileError:
        return False
    return isinstance(values, dict) and {"data", "out", "model", "optimizer"} <= values.keys()


def read_config(run: Path) -> TrainConfig:
    """Return the config of a run. Raises: TrainingError if there is none, ModelFileError if it is not its weights'."""
    if not _is_run(run):
        raise TrainingError(f"{run} holds no run. Name one with --out, or start one without --resume.")
    verify_folder(run, (CONFIG, START), RUN_MANIFEST)
    config = TrainConfig.from_dict(read_json(run / CONFIG))
    if num_bytes := sum(file.stat().st_size for file in run.rglob("*.safetensors")):  # none before the first checkpoint
        check_size(config.model, num_bytes, run / CONFIG)
    return config


def is_begun(run: Path) -> bool:
    """Return whether there is a run to go on with."""
    return _is_run(run) and not is_cut_off(run)


def is_of_this_job(run: Path) -> bool:
    """Return whether the very job that this process is part of has begun the run: then a restart may go on with it."""
    return is_begun(run) and job_id() is not None and read_start(run).get("job") == job_id()


def is_cut_off(run: Path) -> bool:
    """Return whether a run was ended at its very first moment, before anything was trained."""
    return _is_run(run) and not any((run / name).exists() for name in (RUN_MANIFEST, "checkpoints", "model"))


def read_start(run: Path) -> dict[str, Any]:
    """Return what a run was begun with: versions, threads, ranks, the pictures' hash."""
    return read_json(run / START)


def check_data(run: Path, data: DataSet) -> None:
    """Raise DataError unless the pictures are those the run was begun with: names, classes, sizes of files."""
    if read_start(run)["data_sha256"] != fingerprint(data):
        raise DataError(
            f"The pictures are not those that {run} was begun with: some were added, removed or changed. "
            "Bring them back, or begin anew with --overwrite."
        )


def write_microbatch_size(run: Path, size: int) -> None:
    """Note how many pictures fit at once, for the pieces of the run to come."""
    write_json(run / MICROBATCH, {"microbatch_size": size})


def read_microbatch_size(run: Path) -> int | None:
    """Return what was noted when memory ran out, if it has."""
    return read_json(run / MICROBATCH)["microbatch_size"] if (run / MICROBATCH).is_file() else None


def newest_run(runs: Path) -> Path:
    """Return the run that was last written to. Raises: TrainingError if there is none."""
    found = [path.parent for path in runs.glob("*/config.json") if _is_run(path.parent)]
    if not found:
        raise TrainingError(f"There is no run below {runs}/. Name one with --out.")
    return max(found, key=lambda run: run.stat().st_mtime)


def read_split(run: Path) -> dict[str, list[str]] | None:
    """Return how the run's folder was divided, if it was divided by the run."""
    return read_json(run / SPLIT) if (run / SPLIT).is_file() else None


def write_history(run: Path, history: list[dict[str, Any]]) -> None:
    """Write the metrics, a JSON object a line. They hold no times, so that equal runs give equal files."""
    write_atomic(run / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))
