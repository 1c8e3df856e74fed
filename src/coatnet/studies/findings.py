"""What the runs of a study say: a table with intervals, an answer to each ordering of the paper, and the curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from coatnet.errors import DataError
from coatnet.studies.runs import Bits, Cell, unpack
from coatnet.studies.scales import Scale
from coatnet.studies.statistics import Estimate, estimate, judge, seeds_that_would_tell, spread_over_pictures
from coatnet.studies.study import Claim, Study

Result = Mapping[str, Any]
Group = list[Result]  # the runs of one row in one setting, by seed
Groups = dict[tuple[str, str], Group]  # (row, setting) -> its runs


def group(cells: Sequence[Cell], read: Callable[[Cell], Result]) -> Groups:
    """Return the results of all runs by row and setting, seeds in order."""
    found: Groups = {}
    for cell in sorted(cells, key=lambda cell: cell.seed):
        found.setdefault((cell.training.row, cell.training.setting), []).append(read(cell))
    _check_same_pictures(found)
    return found


def _check_same_pictures(groups: Groups) -> None:
    """Raise DataError where runs that are to be compared were trained on different pictures under one name."""
    met = dict[tuple[Any, ...], str]()
    for run in (run for runs in groups.values() for run in runs):
        config = run["config"]
        asked = (config["data"], run["seed"], config["holdout_percent"], config["train_percent"])
        if met.setdefault(asked, run["data_sha256"]) != run["data_sha256"]:
            raise DataError(
                f"Runs of seed {run['seed']} saw different pictures under the name {config['data']}: other fonts, or "
                "files that came or went. Do the study on one and the same set, with another --out."
            )


def find_answers(study: Study, scale: Scale, groups: Groups) -> dict[str, Any]:
    """Return the findings as plain JSON data."""
    return {
        "table": [_row(name, setting, runs) for (name, setting), runs in groups.items()],
        "answers": [_answer(claim, groups) for claim in study.claims(scale)],
        "curves": [
            {"row": name, "setting": setting, "points": _curve(runs)} for (name, setting), runs in groups.items()
        ],
    }


def _row(name: str, setting: str, runs: Group) -> dict[str, Any]:
    top1 = estimate([run["top1_percent"] for run in runs])
    losses = [run["val_loss"] for run in runs if run["val_loss"] is not None]
    return {
        "row": name,
        "setting": setting,
        "num_params": runs[0]["num_params"],
        "gmacs": runs[0]["gmacs"],
        "top1_percent": _plain(top1),
        "train_loss": _plain(estimate([run["train_loss"] for run in runs])),
        "val_loss": _plain(estimate(losses)) if losses else None,
        "n": runs[0]["n"],
        "part": runs[0]["part"],
        "seeds": [run["seed"] for run in runs],
        "data": runs[0]["config"]["data"],
        "train_percent": runs[0]["config"]["train_percent"] or 100.0,
        "passes": runs[0]["config"]["num_epochs"],
        "image_size": runs[0]["image_size"],
        "images": runs[0]["images"],
        "seconds": sum(run["seconds"] for run in runs),
    }


def _answer(claim: Claim, groups: Groups) -> dict[str, Any]:
    """Return the difference of two rows, paired by seed, and what it says of the ordering."""
    first, second = groups[claim.first, claim.setting], groups[claim.second, claim.setting]
    by_seed = {run["seed"]: run for run in second}
    sign = 1 if claim.measure == "top1_percent" else -1  # a lower loss is better
    pairs = [(run, by_seed[run["seed"]]) for run in first if run["seed"] in by_seed]
    difference = estimate([sign * (one[claim.measure] - other[claim.measure]) for one, other in pairs])
    over_pictures = None
    if claim.measure == "top1_percent":
        over_pictures = spread_over_pictures(_bits([one for one, _ in pairs]), _bits([other for _, other in pairs]))
    verdict = judge(difference, claim.relation, claim.measure)
    return {
        "claim": claim.text,
        **asdict(claim),
        "difference": _plain(difference),
        "over_pictures": over_pictures,
        "verdict": verdict,
        "seeds_that_would_tell": seeds_that_would_tell(difference, claim.relation, claim.measure),
    }


def _bits(runs: Sequence[Result]) -> list[Bits]:
    """Return (S, N) for the test pictures, which all seeds share; (1, N) for each seed's own held-out ones."""
    bits = [unpack(run["correct"], run["n"]) for run in runs]
    return [np.stack(bits)] if runs[0]["part"] == "test" else [each[None] for each in bits]


def _curve(runs: Group) -> list[dict[str, float]]:
    """Return the means over the seeds at each evaluation."""
    histories = [run["history"] for run in runs]
    points = list[dict[str, float]]()
    for rows in zip(*histories, strict=False):
        keys = [
            key for key in ("epoch", "train_loss", "val_loss", "val_top1_percent") if all(key in row for row in rows)
        ]
        points.append({key: float(np.mean([row[key] for row in rows])) for key in keys})
    return points


def _plain(found: Estimate) -> dict[str, Any]:
    """Return an estimate as JSON data: what is not finite is null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in asdict(found).items()
    }
