"""What a run leaves behind: the last look at the pictures set apart, the report and the record."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from coatnet.classifier import Classifier, load
from coatnet.evaluation.metrics import Summary, evaluate, summarise
from coatnet.evaluation.report import write_report
from coatnet.files import write_json
from coatnet.layout import count
from coatnet.record import write_record
from coatnet.training.run import Run


@dataclass(frozen=True)
class Result:
    """What a training gave."""

    run: Path
    classifier: Classifier
    part: str | None  # what `summary` was measured on: "test", "val", or None where nothing was set apart
    summary: Summary | None  # on rank 0 alone
    seconds: float  # of training
    num_bad_images: int
    was_interrupted: bool


def finish(run: Run, was_interrupted: bool) -> Result:
    """Evaluate the model that was kept, on test where there is one, else on val; write report and record."""
    folder, config = Path(run.config.out), run.config
    seconds = run.elapsed_s()
    classifier = load(folder / "model", device=run.ranks.device)
    part = "test" if run.data.test is not None else "val"
    image_set = run.data.test if run.data.test is not None else run.data.val
    bad_images = dict(run.loader.bad_images)
    if image_set is None or not run.ranks.is_first:
        return Result(folder, classifier, None, None, seconds, len(bad_images), was_interrupted)
    run.tell(f"looking at {len(image_set)} {part} pictures")
    outcome = evaluate(classifier, image_set, num_workers=config.num_workers)
    summary = summarise(outcome)
    bad_images |= outcome.bad_images
    write_json(folder / "evaluation.json", {"part": part, "bad_images": bad_images, **summary.to_dict()})
    counts = count(config.model)
    write_report(
        folder / "report.html",
        title=f"{config.model.name} on {Path(config.data).name}",
        config=config.to_dict(),
        history=run.state.history,
        outcome=outcome,
        summary=summary,
        image_set=image_set,
        bad_images=bad_images,
        facts={
            "measured on": f"{part} ({summary.n} pictures)",
            "parameters": f"{counts.num_params / 1e6:.2f} M",
            "training time": in_words(seconds),
            "epochs": f"{run.epoch:.3g}",
        },
        model_folder=config.out,
    )
    write_record(
        folder / "record.json",
        kind="train",
        figures={
            "part": part,
            "top1_percent": summary.top1_percent,
            "top1_interval": list(summary.top1_interval),
            "loss": summary.loss,
            "epochs": run.epoch,
            "steps": run.state.step,
            "images_per_s": run.state.step * config.global_batch_size / max(1e-9, seconds),
            "num_params": counts.num_params,
            "gmacs": counts.gmacs,
        },
        seeds=[config.seed],
        n=summary.n,
        seconds=seconds,
        config=config.to_dict(),
    )
    return Result(folder, classifier, part, summary, seconds, len(bad_images), was_interrupted)


def in_words(seconds: float) -> str:
    """Write a duration for people: "48 s", "12 min 5 s", "3 h 20 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
