"""The panels of a study's figure, each drawn on one pair of axes from the record alone.

They are drawn in the colours of a white page; what stands for these on a page that may be dark is `PAGE_COLOURS`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from coatnet.evaluation.plots import FAINT as FAINT_IN_STYLE
from coatnet.evaluation.plots import INK as INK_IN_STYLE
from coatnet.evaluation.plots import STYLE
from coatnet.studies.statistics import allowed
from coatnet.studies.study import Measure, Relation, Study, chain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.typing import RcKeyType

INK, MUTED, FAINT = "#1b1f24", "#5c6570", "#dfe3e8"
VERDICTS = {"holds": "#2166ac", "does not hold": "#d6601f", "cannot tell": MUTED}
LAYOUTS = ("CCCC", "CCCT", "CCTT", "CTTT", "ViT_rel")  # in the first colours: cold is convolution, warm attention
PALETTE = (  # told apart with any kind of colour vision (after Okabe and Ito): on white, on a dark page
    ("#0072b2", "#4aa8e0"),
    ("#3fa3de", "#9ad4f6"),
    ("#009e73", "#2cc79a"),
    ("#e69f00", "#f2b632"),
    ("#d55e00", "#f27a2a"),
    ("#cc79a7", "#e294c2"),
    ("#6b7280", "#a3acb8"),
)
OTHERS = (0, 4, 2, 5, 3, 1, 6)  # the colours of rows that are no layout, in their order
MARKERS = "osD^vPX"
PAGE_COLOURS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    FAINT: "var(--line)",
    VERDICTS["holds"]: "var(--good)",
    VERDICTS["does not hold"]: "var(--bad)",
    **{light: f"var(--row-{i})" for i, (light, _) in enumerate(PALETTE)},
}
_SWAPPED = {INK_IN_STYLE: MUTED, FAINT_IN_STYLE: FAINT}
PANEL_STYLE: dict[RcKeyType, Any] = {
    **{key: _SWAPPED.get(value, value) if isinstance(value, str) else value for key, value in STYLE.items()},
    "text.color": INK,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "legend.fontsize": 9.5,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
}
WRAP = 24  # letters of a row's name in a line
LINE_PT = 12.0
STEPS: dict[Relation, float] = {"~": 0, ">=": 0.5, ">": 1, ">>": 2.5}  # in the picture of an order
UNITS: dict[Measure, str] = {"top1_percent": "points", "train_loss": "nats"}

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One pair of axes of the figure."""

    title: str
    height_in: float  # that it needs
    draw: Callable[[Axes], None]


@dataclass(frozen=True, slots=True)
class Dot:
    """One row of a dot plot."""

    row: str
    mean: float
    interval: tuple[float, float] | None = None
    seeds: Sequence[float] = ()
    digits: int = 1  # behind the point, of the mean


def result_panels(study: Study, record: Row) -> list[Panel]:
    """Return what the runs gave, in the form of the paper's figure, and the paper's figures where it prints them."""
    figures = record["figures"]
    names = rows_of(figures)
    if study.plot == "data":
        found = [Panel(title="Accuracy against data", height_in=4.4, draw=partial(_draw_data, figures, names))]
    else:
        over = f", 95 % intervals over {len(record['seeds'])} seeds" if len(record["seeds"]) > 1 else ""
        found = [_dots(f"Final top-1{over}", _our_dots(figures), names)]
    if study.plot == "curves":
        curves = Panel(
            title="Accuracy against training loss", height_in=4.4, draw=partial(_draw_curves, figures, names)
        )
        found.insert(0, curves)
    if study.paper_top1:
        digits = max(len(f"{percent:g}".partition(".")[2]) for _, _, percent in study.paper_top1)
        groups = dict[str, list[Dot]]()
        for setting, row, percent in study.paper_top1:
            groups.setdefault(setting, []).append(Dot(row, percent, digits=digits))
        its_names = list(dict.fromkeys(row for _, row, _ in study.paper_top1))
        if set(its_names) <= set(names):
            its_names = names
        # else another size has other names, in the same order (Table 7)
        found.append(_dots(f"The paper's top-1 ({study.source})", groups, its_names))
    if study.paper_order:
        draw = partial(_draw_order, study.paper_order, names)
        found.append(Panel(title=f"The paper's order ({study.source})", height_in=1.2 + 0.44 * len(names), draw=draw))
    if figures.get("speed"):
        found.append(Panel(title="Accuracy against speed", height_in=4.4, draw=partial(_draw_speed, figures, names)))
    return found


def answer_panels(record: Row) -> list[Panel]:
    """Return the orderings as differences with intervals, a panel a measure."""
    answers, found = record["figures"]["answers"], list[Panel]()
    titles: dict[Measure, str] = {
        "top1_percent": "Do the orderings hold? By top-1",
        "train_loss": "Do the orderings hold? By training loss",
    }
    for measure, title in titles.items():
        mine = [answer for answer in answers if answer["measure"] == measure]
        if mine:
            lines = sum(_claim_label(answer, mine).count("\n") + 1 for answer in mine)
            height = 1.3 + 0.14 * lines + 0.22 * len(mine)
            found.append(Panel(title=title, height_in=height, draw=partial(_draw_answers, mine, measure)))
    return found


def rows_of(figures: Row) -> list[str]:
    """Return the names of the rows in their order."""
    return list(dict.fromkeys(row["row"] for row in figures["table"]))


def look(name: str, names: Sequence[str]) -> dict[str, Any]:
    """Return colour and marker of a row: a layout's are the same in every study."""
    others = [other for other in names if other not in LAYOUTS]
    index = LAYOUTS.index(name) if name in LAYOUTS else OTHERS[others.index(name) % len(OTHERS)]
    return {"color": PALETTE[index][0], "marker": MARKERS[index]}


def _interval(found: Row) -> tuple[float, float] | None:
    return None if found["low"] is None else (found["low"], found["high"])


def runs_of(figures: Row, row: Row) -> list[Row]:
    """Return the runs behind a row of the table, by seed."""
    return [run for run in figures["runs"] if (run["row"], run["setting"]) == (row["row"], row["setting"])]


# Curves: Figure 1.


def _draw_curves(figures: Row, names: Sequence[str], axes: Axes) -> None:
    """Draw held-out accuracy against training loss along the runs: means bold, each seed faint."""
    for row in figures["table"]:
        colour = look(row["row"], names)["color"]
        for run in runs_of(figures, row):
            axes.plot(*_points(run["history"]), color=colour, linewidth=0.9, alpha=0.35)
    for curve in figures["curves"]:
        colour, marker = look(curve["row"], names).values()
        xs, ys = _points(curve["points"])
        axes.plot(xs, ys, color=colour, linewidth=2.4)
        axes.plot(xs[-1:], ys[-1:], color=colour, marker=marker, markersize=6.5)
        axes.plot([], [], color=colour, marker=marker, linewidth=2.4, label=curve["row"])
    axes.invert_xaxis()
    axes.set_xlabel("training loss (nats), falling to the right as in the paper")
    axes.set_ylabel("held-out top-1 (%)")
    axes.legend(loc="upper left")


def _points(history: Iterable[Row]) -> tuple[list[float], list[float]]:
    pairs = [(row.get("train_loss"), row.get("val_top1_percent")) for row in history]
    known = [(loss, percent) for loss, percent in pairs if loss is not None and percent is not None]
    return [loss for loss, _ in known], [percent for _, percent in known]


# Dots with whiskers: accuracy by row.


def _our_dots(figures: Row) -> dict[str, list[Dot]]:
    groups = dict[str, list[Dot]]()
    for row in figures["table"]:
        top1, seeds = row["top1_percent"], [run["top1_percent"] for run in runs_of(figures, row)]
        groups.setdefault(row["setting"], []).append(Dot(row["row"], top1["mean"], _interval(top1), seeds))
    return groups


def _dots(title: str, groups: Mapping[str, list[Dot]], names: Sequence[str]) -> Panel:
    lines = len(groups) + sum(_lines(dot.row) for dots in groups.values() for dot in dots)
    num_dots = sum(map(len, groups.values()))
    return Panel(title=title, height_in=1.2 + 0.14 * lines + 0.3 * num_dots, draw=partial(_draw_dots, groups, names))


def _draw_dots(groups: Mapping[str, list[Dot]], names: Sequence[str], axes: Axes) -> None:
    """Draw groups of rows below each other: mean and interval, and under them each seed."""
    labels, places, headings, y = list[str](), list[float](), list[int](), 0.0
    for setting, dots in groups.items():
        headings.append(len(labels))
        labels.append(setting)
        places.append(y)
        for number, dot in enumerate(dots, 1):
            _draw_dot(axes, dot, y + number, look(dot.row, names))
            labels.append(_wrapped(dot.row))
            places.append(y + number)
        y += len(dots) + 1.2
    _label_rows(axes, places, labels, headings)
    axes.set_ylim(y - 0.4, -0.6)
    _along_x(axes, "top-1 (%)")


def _draw_dot(axes: Axes, dot: Dot, y: float, marked: Mapping[str, Any]) -> None:
    if dot.interval is not None:
        axes.plot(dot.interval, [y, y], color=marked["color"], linewidth=1.8)
    axes.plot(dot.seeds, [y + 0.26] * len(dot.seeds), "o", color=marked["color"], markersize=3.2, alpha=0.6)
    axes.plot([dot.mean], [y], **marked, markersize=7)
    _write_above(axes, f"{dot.mean:.{dot.digits}f}", dot.mean, y)


# Order alone: what the paper draws without numbers.


def _draw_order(order: str, names: Sequence[str], axes: Axes) -> None:
    """Place the rows from worse to better as far apart as the order's words go, which is no scale."""
    claims = chain(order, "")
    places = {claims[0].first: 0.0}
    for claim in claims:
        places[claim.second] = places[claim.first] - STEPS[claim.relation]
    for y, name in enumerate(names):
        axes.plot([places[name]], [y], **look(name, names), markersize=7)
    _label_rows(axes, range(len(names)), [_wrapped(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    _along_x(axes, f"worse to better: an order, no scale\n{order}")
    axes.set_xticks(sorted(set(places.values())), [""] * len(set(places.values())))


def _write_above(axes: Axes, text: str, x: float, y: float) -> None:
    axes.annotate(text, (x, y), xytext=(0, 5), textcoords="offset points", ha="center", va="bottom", fontsize=9)


def _along_x(axes: Axes, label: str) -> None:
    """Let values run along x and rows along y."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.margins(x=0.08)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(label)


def _label_rows(axes: Axes, places: Sequence[float], labels: Sequence[str], headings: Sequence[int] = ()) -> None:
    """Write the names of rows left of the axes, line by line: each then ends there, whatever font the page has."""
    axes.set_yticks(places, [""] * len(places))
    for index, (y, label) in enumerate(zip(places, labels, strict=True)):
        heading = index in headings
        lines = label.split("\n")
        for number, line in enumerate(lines):
            axes.annotate(
                line, (0, y), xycoords=axes.get_yaxis_transform(),
                xytext=(-5, LINE_PT * ((len(lines) - 1) / 2 - number)), textcoords="offset points",
                ha="right", va="center", fontsize=9.5, fontweight="bold" if heading else "normal",
                color=INK if heading else MUTED,
            )  # fmt: skip


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, WRAP))


def _lines(text: str) -> int:
    return _wrapped(text).count("\n") + 1


# Lines: accuracy against the share of the data.


def _draw_data(figures: Row, names: Sequence[str], axes: Axes) -> None:
    """Draw a line a row over settings "1 %", "3 %", ..., with its band."""
    from matplotlib.ticker import NullLocator

    for name in names:
        rows = [row for row in figures["table"] if row["row"] == name]
        shares = [_share_percent(row["setting"]) for row in rows]
        estimates = [row["top1_percent"] for row in rows]
        marked = look(name, names)
        banded = [(share, ends) for share, one in zip(shares, estimates, strict=True) if (ends := _interval(one))]
        lows, highs = [ends[0] for _, ends in banded], [ends[1] for _, ends in banded]
        axes.fill_between([x for x, _ in banded], lows, highs, color=marked["color"], alpha=0.15, linewidth=0)
        axes.plot(shares, [one["mean"] for one in estimates], **marked, markersize=6, label=name)
    axes.set_xscale("log")
    settings = list(dict.fromkeys(row["setting"] for row in figures["table"]))
    axes.set_xticks([_share_percent(setting) for setting in settings], settings)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("share of the training pictures (logarithmic)")
    axes.set_ylabel("top-1 (%), with 95 % intervals")
    axes.legend(loc="best")


def _share_percent(setting: str) -> float:
    return float(setting.removesuffix("%"))


# Accuracy against speed.


def _draw_speed(figures: Row, names: Sequence[str], axes: Axes) -> None:
    for speed in figures["speed"]:
        name, rate = speed["row"], speed["images_per_s"]
        top1 = next(row["top1_percent"] for row in figures["table"] if row["row"] == name)
        marked = look(name, names)
        axes.plot([rate["low"], rate["high"]], [top1["mean"]] * 2, color=marked["color"], linewidth=1.4)
        if ends := _interval(top1):
            axes.plot([rate["median"]] * 2, ends, color=marked["color"], linewidth=1.4)
        axes.plot([rate["median"]], [top1["mean"]], **marked, markersize=7.5, linestyle="none", label=name)
    axes.set_xlim(left=0)
    axes.set_xlabel("training images/s (median, quartiles)")
    axes.set_ylabel("top-1 (%), with 95 % intervals")
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.17), ncols=2, columnspacing=1.2)


# Orderings: differences against what they allow.


def _claim_label(answer: Row, answers: Sequence[Row]) -> str:
    """Return the ordering, with its setting where the answers have several; what is long is broken into lines."""
    setting = f"{answer['setting']}: " if len({other["setting"] for other in answers}) > 1 else ""
    if len(setting + answer["claim"]) <= WRAP:
        return setting + answer["claim"]
    lines = [answer["claim"]]
    if len(answer["claim"]) > WRAP:
        lines = [_wrapped(answer["first"]), _wrapped(f"{answer['relation']} {answer['second']}")]
    return "\n".join([*([setting.strip()] if setting else []), *lines])


def _draw_answers(answers: Sequence[Row], measure: Measure, axes: Axes) -> None:
    """Draw each difference with its interval over a bar of what the ordering allows, its answer beside it."""
    for y, answer in enumerate(answers):
        difference, colour = answer["difference"], VERDICTS[answer["verdict"]]
        if ends := _interval(difference):
            axes.plot(ends, [y, y], color=colour, linewidth=1.8)
        axes.plot([difference["mean"]], [y], "o", color=colour, markersize=6.5)
        axes.text(
            1.02, y, answer["verdict"], color=colour, fontsize=9.5, va="center", transform=axes.get_yaxis_transform()
        )
    axes.margins(x=0.08)
    axes.axvline(0, color=MUTED, linewidth=1)
    left, right = axes.get_xlim()
    for y, answer in enumerate(answers):
        low, high = allowed(answer["relation"], measure)
        low, high = max(low, left), min(high, right)
        axes.barh(y, high - low, 0.62, low, color=FAINT, zorder=0)
    axes.set_xlim(left, right)
    _label_rows(axes, range(len(answers)), [_claim_label(answer, answers) for answer in answers])
    axes.set_ylim(len(answers) - 0.5, -0.5)
    _along_x(axes, f"by how much the first is better ({UNITS[measure]}); grey: allowed")
