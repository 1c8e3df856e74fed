"""The table of what was measured on a card, from the records of `coatnet bench` and tools/gpu_session.py."""

from __future__ import annotations

from itertools import product
from typing import Any

Row = dict[str, Any]
# What the project set out to reach against the best of timm, eager and compiled; the share of the card's bf16 products.
RATIOS = {"inference": 1.4, "training": 1.5}
SHARES = {("training", "coatnet_2", 384): 45}
NETWORKS, SIZES = ("coatnet_0", "coatnet_2"), (224, 384)
HEADINGS = ("on a GPU, bf16", "px", "batch", "coatnet", "best peer", "ratio (by round)", "to reach", "% of products")


def gpu_section(records: list[dict[str, Any]]) -> str:
    """Return a line for each piece of work; what has no record is "not run"."""
    found = {key: (row, record) for record in records for row in _rows(record) if (key := _key(row))}
    lines = [_line(*HEADINGS, "to reach", "record"), _line(*["---"] * (len(HEADINGS) + 2))]
    lines += [_work_line(key, *found.get(key, (None, None))) for key in product(RATIOS, NETWORKS, SIZES)]
    return "\n\n".join(["\n".join(lines), *sorted({_card(record) for _, record in found.values()})])


def _card(record: dict[str, Any]) -> str:
    host = record["host"]
    return (
        f"`results/{record['file']}`: {host['gpu']}, {host['gpu_memory_gib']} GiB, driver {host['gpu_driver']}, "
        f"CUDA {host['cuda']}, torch {record['versions']['torch']}."
    )


def is_of_a_card(row: Row) -> bool:
    """Whether a row was measured on a card; earlier records, of processors alone, do not say."""
    return row.get("device", "cpu") != "cpu"


def _rows(record: dict[str, Any]) -> list[Row]:
    rows = record["figures"]["rows"] if record["kind"] in ("bench infer", "bench train") else []
    return [row for row in rows if is_of_a_card(row)]


def _key(row: Row) -> tuple[str, str, int] | None:
    work, precision = row["work"].split()
    return (work, row["model"], row["image_size"][0]) if precision == "bf16" and row["ratio"] else None


def _work_line(key: tuple[str, str, int], row: Row | None, record: dict[str, Any] | None) -> str:
    work, network, size = key
    share = SHARES.get(key, "-")
    title = f"{work} `{network}`"
    if row is None or record is None:
        return _line(title, size, "-", *["not run"] * 3, f"{RATIOS[work]:.2f}", "not run", share, "not run")
    best, ratio = row["best_peer"], row["ratio"]
    return _line(
        title, size, row["batch"], f"{row['images_per_s']['coatnet']:.0f} images/s",
        f"{best}: {row['images_per_s'][best]:.0f} images/s",
        f"**{ratio['median']:.2f}** ({ratio['low']:.2f} to {ratio['high']:.2f})", f"{RATIOS[work]:.2f}",
        f"{row['percent_of_limit']['coatnet']:.0f}", share, f"`results/{record['file']}`",
    )  # fmt: skip


def _line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
