"""What runs survive, in docs/results.md, from the records of the tools that inject the faults."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Record = dict[str, Any]


def promise_section(records: list[Record]) -> str:
    """Return the table of promises; a figure without a record is "not run"."""
    rows = [*_faults(_of_kind(records, "promises")), *_images(_of_kind(records, "fuzz images"))]
    rows += _plan(_of_kind(records, "plan memory"))
    lines = [_line("promise", "how it was tried", "met", "record"), _line(*["---"] * 4)]
    lines += [_line(*row) for row in rows]
    return (
        "## What runs survive\n\nFaults injected into real processes; [training.md](training.md) says what is "
        "promised.\n\n" + "\n".join(lines) + "\n"
    )


def _of_kind(records: list[Record], kind: str) -> Record | None:
    return next((record for record in records if record["kind"] == kind), None)


def _faults(record: Record | None) -> Iterator[tuple[str, ...]]:
    figures = record["figures"] if record else {}
    file = f"`results/{record['file']}`" if record else "-"
    kills, flips, stall, restart = (figures.get(name) for name in ("kills", "flips", "stall", "restart"))
    how = "`kill -9` at random moments of runs in fp32 and bf16, with stochastic depth, mixup, EMA"
    met = f"{kills['kills']} kills; weights, optimizer, average and metrics as if unkilled" if kills else "not run"
    yield ("bit-exact resume", how, met, file)
    found = flips and ", ".join(f"{count} of {flips['flips']} in a {name}" for name, count in flips["found"].items())
    yield ("corruption is noticed", "single bits flipped, manifests too", found or "not run", file)
    how, met = "-", "not run"
    if stall:
        how = f"{stall['params_m']:.0f} M parameters with AdamW, {stall['gib']:.1f} GiB, {stall['saves']} saves"
        met = f"{stall['stall_s']:.2f} s of {stall['synchronous_s']:.1f} s, {stall['percent']:.1f} % (allowed 15)"
    yield ("saving does not stop training", how, met, file)
    for what, how, name in (
        ("a rank dies", "one of two ranks killed; until three updates further", "killed_s"),
        ("a rank stands still", "one of two ranks stopped (SIGSTOP); the same", "standing_still_s"),
        (
            "a host comes back",
            "two network namespaces, one cut off; from its return until training goes on",
            "host_back_s",
        ),
    ):
        yield (what, how, f"{restart[name]:.0f} s" if restart else "not run", file)


def _images(record: Record | None) -> Iterator[tuple[str, ...]]:
    how = "mutated JPEG, PNG, WebP, BMP and GIF files through the decoder"
    if record is None:
        yield ("pictures from strangers", how, "not run", "-")
        return
    counts = record["figures"]["counts"].values()
    crashes, hangs, others = (sum(count[name] for count in counts) for name in ("crashes", "hangs", "other_exceptions"))
    met = f"{record['n']:,} files: {crashes} crashes, {hangs} hangs, {others} other exceptions"
    yield ("pictures from strangers", how, met, f"`results/{record['file']}`")


def _plan(record: Record | None) -> Iterator[tuple[str, ...]]:
    met = f"at most {record['figures']['largest_error_percent']:.1f} % off (allowed 10)" if record else "not run"
    file = f"`results/{record['file']}`" if record else "-"
    yield ("memory is planned", "`coatnet plan` against processes on the CPU, three networks, two sizes", met, file)


def _line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
