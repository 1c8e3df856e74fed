"""The page of a study: one HTML file in the report's look with answers, figure, table, cost and command."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from coatnet.evaluation.report import page_of, section
from coatnet.files import write_atomic
from coatnet.studies.panels import PALETTE, UNITS, look, rows_of, runs_of
from coatnet.studies.picture import learned, looked_at, svg_panels
from coatnet.studies.study import ABOUT_EQUAL, MUCH, Measure, Study
from coatnet.training.finish import in_words

SIGNS = {"holds": "&#10003;", "does not hold": "&#10007;", "cannot tell": "?"}
DIGITS: dict[Measure, int] = {"top1_percent": 2, "train_loss": 4}
Row = dict[str, Any]


def write_page(path: Path, study: Study, record: Row) -> None:
    """Write the page atomically; every figure on it is the record's."""
    figures = record["figures"]
    sections = [
        section("figure", "Here, and in the paper", _figure(study, record)),
        section("table", "All rows", _table(figures) + _matches(figures["table"])),
        section("speed", "Speed and memory", _speed(figures["speed"]) if figures.get("speed") else ""),
        section("cost", "What it cost", _cost(record)),
        section("command", "Do it again", _command(study, record)),
    ]
    head = _headline(study, record) + _answers(figures["answers"])
    write_atomic(path, page_of(f"{study.title}: {figures['scale']} scale", head, sections, _css()))


def _css() -> str:
    """Return the rows' colours for light and dark pages, and the rules of this page."""
    light, dark = ("".join(f"--row-{i}: {pair[shade]}; " for i, pair in enumerate(PALETTE)) for shade in range(2))
    colours = f":root {{ {light}}}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}\n"
    return colours + files("coatnet.studies").joinpath("study.css").read_text(encoding="utf-8")


def _headline(study: Study, record: Row) -> str:
    figures, seeds = record["figures"], record["seeds"]
    facts = [
        f"{figures['scale']} scale", learned(figures), looked_at(figures),
        f"seeds {', '.join(map(str, seeds))}", record["date"][:10],
    ]  # fmt: skip
    return (
        f'<header><p class="title">coatnet study {escape(study.name)} &middot; {escape(study.source)}</p>'
        f"<h1>{escape(study.title)}</h1><p>{escape(study.question)}</p>"
        f'<p class="note">{escape(" · ".join(facts))}</p></header>'
    )


# Answers.


def _answers(answers: Sequence[Row]) -> str:
    cards = "".join(_answer(answer) for answer in answers)
    margins = "; ".join(
        f"by {_measured(measure)}, {ABOUT_EQUAL[measure]:g} {UNITS[measure]} count as about equal and "
        f"{MUCH[measure]:g} as much"
        for measure in dict.fromkeys(answer["measure"] for answer in answers)
    )
    return (
        f'<dl class="cards answers">{cards}</dl>'
        '<p class="note">An ordering <b>holds</b> where the whole 95 % interval of the difference, paired by seed and '
        "signed so that more is in favour of the first, lies inside what the ordering allows; it <b>does not hold</b> "
        "where all of it lies outside; else, and with fewer than 3 seeds, the runs <b>cannot tell</b>. Fixed before "
        f"any run: {margins}. Intervals are not corrected for many comparisons: each of these {len(answers)} stands "
        "for itself, and with twenty of them one may well miss by chance.</p>"
    )


def _answer(answer: Row) -> str:
    verdict, measure = answer["verdict"], answer["measure"]
    write, unit = _writer(measure), UNITS[measure]
    difference = answer["difference"]
    lines = [f"{write(difference['mean'])} {unit} by {_measured(measure)}"]
    if difference["low"] is not None:
        lines.append(f"95 % interval {write(difference['low'])} to {write(difference['high'])}")
    if answer["over_pictures"] is not None:
        lines.append(f"choice of test pictures: &plusmn; {answer['over_pictures']:.2f}")
    if verdict == "cannot tell":
        lines.append(_seeds(answer))
    css = verdict.replace(" ", "-")
    return (
        f'<div class="{css}"><dt><b>{escape(answer["claim"])}</b> <span>{escape(answer["setting"])}</span></dt>'
        f'<dd><span class="sign">{SIGNS[verdict]}</span> {verdict}'
        + "".join(f"<small>{line}</small>" for line in lines)
        + "</dd></div>"
    )


def _seeds(answer: Row) -> str:
    """Say how many seeds would tell, if anything is known of it."""
    if answer["difference"]["deviation"] is None:
        return "one seed: no interval"
    count = answer["seeds_that_would_tell"]
    return f"{count} seeds would tell" if count else "over 1000 seeds would be needed"


def _measured(measure: Measure) -> str:
    return "top-1" if measure == "top1_percent" else "training loss"


def _writer(measure: Measure) -> Callable[[float], str]:
    return lambda value: _number(value, DIGITS[measure], "+")


def _number(value: float, digits: int, sign: str = "") -> str:
    return f"{value:{sign}.{digits}f}".replace("-", "\N{MINUS SIGN}")


# Figure.


def _figure(study: Study, record: Row) -> str:
    said = "".join(f"<li>{escape(line)}</li>" for line in study.paper)
    paper = f'<div class="paper"><h3>What the paper found ({escape(study.source)})</h3><ul>{said}</ul></div>'
    return f'<div class="plots panels">{"".join(svg_panels(study, record))}{paper}</div>'


# Table.


def _table(figures: Row) -> str:
    names = rows_of(figures)
    heads = [
        "row", "setting", "parameters", "M multiply-adds", "top-1 %", "each seed", "training loss", "held-out loss",
        "generalisation gap", "pictures seen", "seconds",
    ]  # fmt: skip
    rows = [_line(row, runs_of(figures, row), names) for row in figures["table"]]
    note = (
        '<p class="note">Means over the seeds; small figures are 95 % intervals over them. The training loss is that '
        "of the last stretch of training, as it is trained: with augmentation and smoothed targets where the study has "
        "them. The generalisation gap is held-out loss minus training loss. Seconds are those of all seeds.</p>"
    )
    return note + _html_table(heads, rows, num_words=2)


def _line(row: Row, runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    each = " ".join(f"{run['top1_percent']:.2f}" for run in runs)
    train, held_out = row["train_loss"], row["val_loss"]
    colour = [light for light, _ in PALETTE].index(look(row["row"], names)["color"])
    return [
        f'<i class="dot" style="background: var(--row-{colour})"></i>{escape(row["row"])}',
        escape(row["setting"]),
        f"{row['num_params']:,}",
        f"{1000 * row['gmacs']:,.1f}",
        _estimate(row["top1_percent"], 2),
        f'<span class="seeds">{each}</span>',
        _estimate(train, 4),
        "" if held_out is None else _estimate(held_out, 4),
        "" if held_out is None else _number(held_out["mean"] - train["mean"], 4, "+"),
        f"{row['images']:,}",
        f"{row['seconds']:,.0f}",
    ]


def _estimate(found: Row, digits: int) -> str:
    mean = _number(found["mean"], digits)
    if found["low"] is None:
        return mean
    return f"{mean}<small>{_number(found['low'], digits)} to {_number(found['high'], digits)}</small>"


def _html_table(heads: Sequence[str], rows: Iterable[Sequence[str]], num_words: int) -> str:
    """Return a table; the first `num_words` columns are words, all others numbers. Cells are HTML already."""
    kinds = ["" if i < num_words else ' class="number"' for i in range(len(heads))]
    head = "".join(f'<th scope="col"{kind}>{name}</th>' for name, kind in zip(heads, kinds, strict=True))
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(row[1:], kinds[1:], strict=True))
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table class="rows"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _matches(table: Sequence[Row]) -> str:
    """Say how well the rows of each setting match in size and work."""
    lines = list[str]()
    for setting in dict.fromkeys(row["setting"] for row in table):
        rows = [row for row in table if row["setting"] == setting]
        params, macs = (
            max(row[key] for row in rows) / min(row[key] for row in rows) for key in ("num_params", "gmacs")
        )
        lines.append(f"{escape(setting)}: parameters {params:.3f}, multiply-adds {macs:.3f}")
    shown = "; ".join(lines)
    return (
        f'<p class="note below">How well rows match, largest over smallest: {shown}. The paper compares equal sizes in '
        "Figure 1: there 1.05 and 1.15 are wanted here, at most.</p>"
    )


def _speed(speeds: Sequence[Row]) -> str:
    heads = ["row", "training images/s", "memory of an update, MiB", "inference images/s"]
    rows = [
        [
            escape(speed["row"]),
            _rate(speed["images_per_s"]),
            "not told" if speed["training_mib"] is None else f"{speed['training_mib']:,.0f}",
            _rate(speed["inference_images_per_s"]),
        ]
        for speed in speeds
    ]
    how = "; ".join(
        dict.fromkeys(f"batch {speed['batch']:,}, {speed['precision']}, {speed['device']}" for speed in speeds)
    )
    return (
        f'<p class="note">{escape(how)}. All rows in turns in one process; medians, and between which figures the '
        "middle half of the calls lies. The memory is beyond what is there before.</p>"
        + _html_table(heads, rows, num_words=1)
    )


def _rate(rate: Row) -> str:
    return f"{rate['median']:,.0f}<small>{rate['low']:,.0f} to {rate['high']:,.0f}</small>"


# Cost and command.


def _cost(record: Row) -> str:
    runs = record["figures"]["runs"]
    facts = {
        "time of all runs": in_words(record["seconds"]),
        "runs": f"{record['n']:,}",
        "machines": _all(_machine(run["host"]) for run in runs),
        "torch": _all(run["versions"]["torch"] for run in runs),
        "coatnet": _all(run["versions"]["coatnet"] for run in runs),
        "commits": _all((run["commit"] or "unknown")[:10] for run in runs),
        "pictures": _all(f"{run['config']['data']}, SHA-256 {run['data_sha256'][:10]}" for run in runs),
    }
    rows = "".join(f'<tr><th scope="row">{name}</th><td>{escape(value)}</td></tr>' for name, value in facts.items())
    return f'<div class="scroll"><table class="facts">{rows}</table></div>'


def _machine(host: Row) -> str:
    num_threads = host["torch_threads"]
    return f"{host['gpu'] or host['cpu'] or 'unknown'} ({num_threads} thread{'s' * (num_threads > 1)})"


def _all(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(values))


def _command(study: Study, record: Row) -> str:
    command = escape(shlex.join(record["command"]))
    return (
        f"<pre><code>{command}</code></pre>"
        '<p class="note below">What is done is not done again: the same command goes on after any end, and several of '
        f"them divide the work. The record of every figure here is {escape(study.name)}.json beside this page.</p>"
    )
