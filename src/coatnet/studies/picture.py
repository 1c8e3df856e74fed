"""The figure of a study: one PNG for a paper's appendix, and its panels one by one as SVG for the page."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coatnet.evaluation.plots import as_svg
from coatnet.files import write_atomic
from coatnet.studies.panels import PAGE_COLOURS, PANEL_STYLE, Panel, answer_panels, result_panels
from coatnet.studies.study import Study

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

WIDTH_IN, DPI = 12.0, 150  # 1800 px: readable at half of it
LINE_IN = 0.22
LETTERS = 150  # in a line as wide as the picture
SVG_WIDTH_IN = 4.9  # narrower than in the picture: on a telephone letters are then about 9 px high


def write_picture(path: Path, study: Study, record: dict[str, Any]) -> None:
    """Write the figure as PNG: results above, the paper's orderings below, and what the paper found in words."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    upper, lower = result_panels(study, record), answer_panels(record)
    heights = [max(panel.height_in for panel in row) for row in (upper, lower)]
    head, foot = _head(study, record), _foot(study)
    top_in, bottom_in = 0.75 + LINE_IN * len(head), 0.6 + LINE_IN * len(foot)
    height_in = top_in + sum(heights) + bottom_in
    buffer = io.BytesIO()
    with rc_context(PANEL_STYLE):
        layout = ConstrainedLayoutEngine(rect=(0.015, bottom_in / height_in, 0.97, sum(heights) / height_in))
        figure = Figure(figsize=(WIDTH_IN, height_in), dpi=DPI, facecolor="white", layout=layout)
        parts: Any = figure.subfigures(2, height_ratios=heights)
        _fill(parts[0], upper)
        _fill(parts[1], lower)
        figure.text(0.02, 1 - 0.45 / height_in, study.title, fontsize=17, fontweight="bold")
        figure.text(0.02, 1 - 0.6 / height_in, "\n".join(head), va="top", linespacing=1.5)
        figure.text(0.02, (bottom_in - 0.25) / height_in, "What the paper found", va="top", fontweight="bold")
        figure.text(0.02, (bottom_in - 0.5) / height_in, "\n".join(foot), va="top", linespacing=1.5)
        figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def _fill(part: SubFigure, panels: list[Panel]) -> None:
    """Draw panels side by side."""
    for axes, panel in zip(part.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.set_title(panel.title)
        panel.draw(axes)


def _head(study: Study, record: dict[str, Any]) -> list[str]:
    figures, seeds = record["figures"], record["seeds"]
    intervals = "whiskers and bands are 95 % intervals over them" if len(seeds) > 1 else "so there are no intervals"
    return [
        f"{study.source[0].upper()}{study.source[1:]}: {study.question}",
        *textwrap.wrap(f"{figures['scale']} scale: {learned(figures)}", LETTERS),
        f"{looked_at(figures)}; {len(seeds)} seed{'s' * (len(seeds) > 1)}, {intervals}",
    ]


def learned(figures: dict[str, Any]) -> str:
    """Say what was learned, setting by setting where they differ: "fashion-mnist, 10 % of it, 16 passes, 28 px"."""
    said = {row["setting"]: _training(row) for row in figures["table"]}
    if len(set(said.values())) == 1:
        return next(iter(said.values()))
    return "; ".join(f"{setting}: {words}" for setting, words in said.items())


def _training(row: dict[str, Any]) -> str:
    share = f"{row['train_percent']:.3g} % of it, " if row["train_percent"] < 100 else ""
    passes = "1 pass" if row["passes"] == 1 else f"{row['passes']:.4g} passes"
    return f"{row['data']}, {share}{passes}, {row['image_size'][0]} px"


def looked_at(figures: dict[str, Any]) -> str:
    """Say how many pictures the accuracies are of: "10,000 test pictures"."""
    parts = {"test": "test", "val": "held-out"}
    counts = dict.fromkeys((row["n"], parts[row["part"]]) for row in figures["table"])
    return " or ".join(f"{n:,} {part} pictures" for n, part in counts)


def _foot(study: Study) -> list[str]:
    """Return what the paper found, in lines that fit."""
    return [line for said in study.paper for line in textwrap.wrap(said, LETTERS, subsequent_indent="    ")]


def svg_panels(study: Study, record: dict[str, Any]) -> list[str]:
    """Return the same panels as `<svg>` elements in the page's colours."""
    return [_svg(panel, record) for panel in (*result_panels(study, record), *answer_panels(record))]


def _svg(panel: Panel, record: dict[str, Any]) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(PANEL_STYLE):
        figure = Figure(figsize=(SVG_WIDTH_IN, panel.height_in), layout="constrained")
        axes = figure.subplots()
        axes.set_title(panel.title)
        panel.draw(axes)
        return as_svg(figure, f"{panel.title}: {record['figures']['study']}", PAGE_COLOURS)
