"""The family as people read it: what `coatnet models` prints. No torch."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from coatnet.config import Size
from coatnet.layout import count
from coatnet.zoo import ZOO, Row


def rows(image_size: Size | None) -> list[dict[str, Any]]:
    """Return a row a network, counted at the size given, or at each network's own."""
    return [_row(row, image_size or row.config.image_size) for row in ZOO.values()]


def _row(row: Row, size: Size) -> dict[str, Any]:
    counts = count(replace(row.config, image_size=size))
    return {
        "name": row.name,
        "from": "this project" if row.ours else "paper",
        "image_size": list(size),
        "num_params": counts.num_params,
        "gmacs": round(counts.gmacs, 4),
        "paper_top1_percent": {"224": row.top1_percent[0], "384": row.top1_percent[1], "512": row.top1_percent[2]},
        "paper_top1_extra_percent": row.top1_extra_percent,
        "extra_data": row.extra_data,
    }


def show(found: list[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(caption="top-1: the paper's, ImageNet-1K. Multiply-adds: convolutions, linear layers, attention.")
    table.add_column("model")
    for heading in ("px", "parameters", "G multiply-adds", "top-1 % 224 / 384 / 512", "with more data, 512"):
        table.add_column(heading, justify="right")
    for row in found:
        height, width = row["image_size"]
        alone = row["paper_top1_percent"].values()
        extra = row["paper_top1_extra_percent"]
        table.add_row(
            row["name"],
            str(height) if height == width else f"{height}x{width}",
            f"{row['num_params'] / 1e6:.2f} M",
            f"{row['gmacs']:.2f}" if row["gmacs"] >= 1 else f"{row['gmacs']:.3f}",
            "ours, for small pictures"
            if row["from"] != "paper"
            else " / ".join("-" if top1 is None else f"{top1:.1f}" for top1 in alone),
            "" if extra is None else f"{extra:.2f} ({row['extra_data']})",
        )
    Console(width=None if sys.stdout.isatty() else 1000).print(table)  # off a terminal nothing is cut
