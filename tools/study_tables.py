"""The tables of docs/findings.md, from the records of `coatnet study`."""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]
NOT_RUN = "Not run.\n"
MIN_SEEDS = 3


def study_records(records: list[Record]) -> dict[str, Record]:
    """Return the records of studies by the study's name."""
    return {record["figures"]["study"]: record for record in records if record["kind"] == "study"}


def study_tables(record: Record | None) -> str:
    """Return what a study found as Markdown: the answers, the rows, where and at what cost.

    Raises: ValueError for fewer than three seeds, which answer nothing.
    """
    if record is None:
        return NOT_RUN
    if len(record["seeds"]) < MIN_SEEDS:
        raise ValueError(f"{record['file']} has {len(record['seeds'])} seeds. Documents take {MIN_SEEDS} or more.")
    figures = record["figures"]
    parts = [_answers(figures["answers"]), _rows(figures["table"]), _cost(record)]
    return "\n".join(parts)


def _line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _table(headings: tuple[str, ...], lines: list[str]) -> str:
    return "\n".join([_line(*headings), _line(*["---"] * len(headings)), *lines]) + "\n"


def _answers(answers: list[dict[str, Any]]) -> str:
    headings = ("ordering", "setting", "difference (95 % over seeds)", "spread over pictures", "answer")
    lines = [
        _line(
            answer["claim"], answer["setting"], _difference(answer), _over_pictures(answer), f"**{_verdict(answer)}**"
        )
        for answer in answers
    ]
    return _table(headings, lines)


def _difference(answer: dict[str, Any]) -> str:
    found, digits = answer["difference"], _digits(answer["measure"])
    unit = "points" if answer["measure"] == "top1_percent" else "nats of training loss"
    return f"{found['mean']:+.{digits}f} ({found['low']:+.{digits}f} to {found['high']:+.{digits}f}) {unit}"


def _over_pictures(answer: dict[str, Any]) -> str:
    return "-" if answer["over_pictures"] is None else f"± {answer['over_pictures']:.2f}"


def _verdict(answer: dict[str, Any]) -> str:
    if answer["verdict"] != "cannot tell":
        return answer["verdict"]
    seeds = answer["seeds_that_would_tell"]
    return f"cannot tell; {seeds} seeds would" if seeds else "cannot tell; 1000 seeds would not"


def _digits(measure: str) -> int:
    return 2 if measure == "top1_percent" else 3


def _rows(table: list[dict[str, Any]]) -> str:
    headings = ("row", "setting", "parameters", "M multiply-adds", "top-1 %", "95 %", "training loss", "held-out loss")
    lines: list[str] = []
    for row in table:
        top1 = row["top1_percent"]
        held_out = "-" if row["val_loss"] is None else f"{row['val_loss']['mean']:.3f}"
        lines.append(
            _line(
                row["row"], row["setting"], f"{row['num_params']:,}", f"{1000 * row['gmacs']:.1f}",
                f"{top1['mean']:.2f}", f"{top1['low']:.2f} to {top1['high']:.2f}", f"{row['train_loss']['mean']:.3f}",
                held_out,
            )
        )  # fmt: skip
    return _table(headings, lines)


def _cost(record: Record) -> str:
    figures, runs = record["figures"], record["figures"]["runs"]
    hosts = sorted({f"{run['host']['cpu']}, {run['host']['torch_threads']} thread(s) a run" for run in runs})
    commits = sorted({(run["commit"] or "none")[:10] for run in runs})
    pictures = sorted({f"{row['n']:,} {row['part']} pictures" for row in figures["table"]})
    hours, seeds = record["seconds"] / 3600, ", ".join(map(str, record["seeds"]))
    return (
        f"{len(runs)} runs, seeds {seeds}, on {', '.join(figures['data'])} ({', '.join(pictures)}); {hours:.1f} hours "
        f"of training ({'; '.join(hosts)}), commits {', '.join(commits)}. Record: `results/{record['file']}`.\n"
    )
