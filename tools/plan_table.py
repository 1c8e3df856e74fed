"""The table of planned and measured memory in docs/results.md, from the record of tools/measure_plan.py."""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]
HEADINGS = ("model", "px", "batch", "precision", "checkpointed", "planned MiB", "measured MiB", "error %")
WANTED_PERCENT = 10


def plan_section(records: list[Record]) -> str:
    """Return the section on `coatnet plan`; without a record it is "not run"."""
    parts = ["## Memory planned and measured\n"]
    found = [record for record in records if record["kind"] == "plan memory"]
    if not found:
        return parts[0] + "\nNot run.\n"
    for record in found:
        figures, host = record["figures"], record["host"]
        parts.append(
            "Peak of a training process on the CPU above what it takes without a network, beside `coatnet plan`'s for\n"
            "the readable network there. On GPUs and with several ranks: not run.\n"
        )
        parts.append("\n".join([_line(*HEADINGS), _line(*["---"] * len(HEADINGS)), *map(_row, figures["rows"])]) + "\n")
        parts.append(
            f"Largest error {figures['largest_error_percent']:.1f} %, to reach {WANTED_PERCENT} %. "
            f"`{' '.join(record['command'])}`, commit `{(record['commit'] or 'none')[:10]}`, {host['cpu']}, "
            f"torch {record['versions']['torch']}, {record['seconds']:.0f} s; record `results/{record['file']}`.\n"
        )
    return "\n".join(parts)


def _row(row: dict[str, Any]) -> str:
    return _line(
        f"`{row['model']}`", row["image_size"], row["batch"], row["precision"], "yes" if row["checkpointed"] else "no",
        f"{row['planned_mib']:.0f}", f"{row['measured_mib']:.0f}", f"{row['error_percent']:+.1f}",
    )  # fmt: skip


def _line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
