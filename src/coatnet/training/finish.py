"""What a run leaves behind: the last look at the pictures set apart, the report and the record."""

from __future__ import annotations

import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from coatnet.classifier import Classifier, load
from coatnet.data.image_sets import ImageSet
from coatnet.data.sources import name_of
from coatnet.evaluation.metrics import Outcome, Summary, summarise
from coatnet.evaluation.report import write_report
from coatnet.files import write_json
from coatnet.layout import count
from coatnet.record import write_record
from coatnet.training.run import Run
from coatnet.training.stop import StopAsked


@dataclass(frozen=True)
class Result:
    """What a training gave."""

    run: Path
    classifier: Classifier
    part: str | None  # what `summary` was measured on: "test", "val"; None where nothing was looked at
    summary: Summary | None  # on rank 0 alone, where something was looked at
    seconds: float  # of training
    num_bad_images: int
    stopped_by: signal.Signals | None  # Ctrl-C or SIGTERM, where the run is not done

    @property
    def was_interrupted(self) -> bool:
        """Whether there is something left to train."""
        return self.stopped_by is not None


def finish(run: Run) -> Result:
    """Evaluate the model that was kept, on test where there is one, else on val; write report and record.

    An interrupted run does not look at test, and at nothing where SIGTERM ended it. Where there is nothing to look at
    there is a record without accuracy, and no report.
    """
    folder = Path(run.config.out)
    classifier = load(folder / "model", device=run.ranks.device)
    bad_images = run.ranks.union(run.loader.bad_images)
    stopped_by = None if run.is_over else run.stop.asked
    part = "val" if run.data.test is None or stopped_by else "test"
    image_set = run.data.val if part == "val" else run.data.test
    if stopped_by == signal.SIGTERM:
        image_set = None
    summary: Summary | None = None
    if run.ranks.is_first and image_set is not None:
        run.tell(f"looking at {len(image_set)} {part} pictures")
        with suppress(StopAsked):  # the run is done and saved: --resume makes the report
            outcome = run.look_at(classifier, image_set)
            summary = summarise(outcome)
            bad_images |= outcome.bad_images
            _write_record(run, part, summary, bad_images)
            _write_evaluation(run, part, image_set, outcome, summary, bad_images)
    elif run.ranks.is_first:
        _write_record(run, None, None, bad_images)
    return Result(
        run=folder,
        classifier=classifier,
        part=None if image_set is None else part,
        summary=summary,
        seconds=run.state.elapsed_s,
        num_bad_images=len(bad_images),
        stopped_by=stopped_by,
    )


def _write_evaluation(
    run: Run, part: str, image_set: ImageSet, outcome: Outcome, summary: Summary, bad_images: dict[str, str]
) -> None:
    """Write the figures as JSON and as the report."""
    folder, config = Path(run.config.out), run.config
    write_json(folder / "evaluation.json", {"part": part, "bad_images": bad_images, **summary.to_dict()})
    write_report(
        folder / "report.html",
        title=f"{config.model.name} on {name_of(config.data)}",
        config=config.to_dict(),
        history=run.state.history,
        outcome=outcome,
        summary=summary,
        image_set=image_set,
        bad_images=bad_images,
        facts={
            "measured on": f"{part} part",
            "parameters": f"{count(config.model).num_params / 1e6:.2f} M",
            "training time": in_words(run.state.elapsed_s),
            "epochs": f"{run.epoch:.3g}",
        },
        model_folder=config.out,
    )


def _write_record(run: Run, part: str | None, summary: Summary | None, bad_images: dict[str, str]) -> None:
    config, state, counts = run.config, run.state, count(run.config.model)
    write_record(
        Path(config.out) / "record.json",
        kind="train",
        figures={
            "part": part,
            "top1_percent": summary.top1_percent if summary else None,
            "top1_interval": list(summary.top1_interval) if summary else None,
            "loss": summary.loss if summary else None,
            "epochs": run.epoch,
            "steps": state.step,
            "images_per_s": state.step * config.global_batch_size / max(1e-9, state.elapsed_s),
            "num_ranks": run.ranks.size,
            "num_skipped": state.num_skipped,
            "microbatch_size": run.microbatch_size,
            "num_params": counts.num_params,
            "gmacs": counts.gmacs,
            "bad_images": bad_images,
        },
        seeds=[config.seed],
        n=summary.n if summary else 0,
        seconds=state.elapsed_s,
        config=config.to_dict(),
    )


def in_words(seconds: float) -> str:
    """Write a duration for people: "48 s", "12 min 5 s", "3 h 20 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
