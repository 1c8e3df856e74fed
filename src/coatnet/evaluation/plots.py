"""Line and bar plots as inline SVG that take their colours and letters from the page around them."""

from __future__ import annotations

import io
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

    from coatnet.evaluation.metrics import CalibrationBin

# matplotlib draws in these stand-ins; in the SVG they become the page's variables, so that light and dark both work.
INK, FAINT, FIRST, SECOND = "#010203", "#010204", "#010205", "#010206"
PAGE_COLOURS = {INK: "var(--muted)", FAINT: "var(--line)", FIRST: "var(--good)", SECOND: "var(--bad)"}

Points = tuple[Sequence[float], Sequence[float]]  # x and y

STYLE: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and has the page's font
    "svg.hashsalt": "coatnet",  # the same plot gives the same bytes
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "ytick.major.size": 0,
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
}


def loss_curves(training: Points, validation: Points) -> str:
    """Draw both losses against the epoch."""
    with _figure(6, 3.2) as (figure, axes):
        axes.plot(*training, color=FIRST, label="training", alpha=0.9)
        if validation[0]:
            axes.plot(*validation, color=SECOND, label="validation", marker="o", markersize=3.5)
        _count_epochs(axes)
        axes.set_ylabel("loss (nats)")
        axes.legend(loc="upper right")
        return as_svg(figure, "Training and validation loss against the epoch")


def accuracy_curve(validation: Points) -> str:
    """Draw the validation top-1 against the epoch, and mark its best."""
    with _figure(6, 3.2) as (figure, axes):
        epochs, percents = validation
        axes.plot(epochs, percents, color=FIRST, marker="o", markersize=3.5)
        best = max(range(len(percents)), key=lambda i: percents[i])
        axes.plot(epochs[best], percents[best], "o", color=SECOND, markersize=6)
        axes.margins(y=0.15)
        axes.annotate(
            f"best {percents[best]:.1f}",
            (epochs[best], percents[best]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="right" if best > len(percents) / 2 else "left",
        )
        _count_epochs(axes)
        axes.set_ylabel("validation top-1 (%)")
        return as_svg(figure, "Validation top-1 against the epoch")


def reliability_diagram(bins: Sequence[CalibrationBin]) -> str:
    """Draw accuracy against confidence, above the share of pictures in each bin."""
    width = 100 / len(bins)
    middles = [row.low_percent + width / 2 for row in bins]
    total = sum(row.count for row in bins)
    with _figure(6, 4.4, rows=(3, 1)) as (figure, axes, lower):
        axes.bar(middles, [row.accuracy_percent or 0 for row in bins], width * 0.86, color=FIRST, alpha=0.75)
        full = [(m, row.confidence_percent) for m, row in zip(middles, bins, strict=True) if row.count]
        for middle, confidence in full:
            axes.hlines(confidence, middle - width * 0.43, middle + width * 0.43, color=SECOND, linewidth=2.5)
        axes.plot([], [], color=SECOND, linewidth=2.5, label="mean confidence of the bin")
        axes.plot([0, 100], [0, 100], color=INK, linewidth=1, linestyle=(0, (4, 3)), label="perfectly calibrated")
        axes.set_ylim(0, 102)
        axes.set_ylabel("correct (%)")
        axes.tick_params(labelbottom=False)
        axes.legend(loc="upper left")
        lower.bar(middles, [100 * row.count / total for row in bins], width * 0.86, color=INK, alpha=0.5)
        lower.set_xlim(0, 100)
        lower.set_xlabel("confidence (%)")
        lower.set_ylabel("pictures (%)")
        return as_svg(figure, "Share of correct answers against the confidence they were given with")


def _count_epochs(axes: Axes) -> None:
    """Label the x axis in epochs: whole ones as soon as there are a few."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=axes.get_xlim()[1] > 3))


@contextmanager
def _figure(width: float, height: float, rows: Sequence[int] = (1,)) -> Generator[tuple[Any, ...]]:
    """Yield a figure and its axes, one above another, in the page's style; no window, no global state."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        ratios = {"height_ratios": list(rows)}
        axes = figure.subplots(len(rows), squeeze=False, sharex=True, gridspec_kw=ratios)
        yield figure, *axes[:, 0]


def as_svg(figure: Figure, title: str, page_colours: Mapping[str, str] = PAGE_COLOURS) -> str:
    """Return the figure as an `<svg>` element without ids, sizes and addresses that a page would trip over.

    `page_colours` are the colours that it is drawn in and what stands for them on the page.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in page_colours.items():
        text = text.replace(colour, variable)
    text = re.sub(r' (?:id="[\w.]+_\d+"|xmlns(?::\w+)?="[^"]*")', "", text)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r"\s*<style.*?</style>|font-family: [^;]+; ", "", text, flags=re.DOTALL)
    return text.replace("<svg", f'<svg class="plot" role="img" aria-label="{escape(title)}"', 1)
