"""One HTML file that tells how good a trained model is: no network, no script, light and dark, screen and paper."""

from __future__ import annotations

import json
import math
import shlex
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from coatnet import __version__
from coatnet.data.image_sets import ImageSet
from coatnet.evaluation.gallery import confused_pairs, worst_mistakes
from coatnet.evaluation.metrics import Interval, Outcome, Summary
from coatnet.evaluation.plots import Points, accuracy_curve, loss_curves, reliability_diagram
from coatnet.evaluation.tables import class_table, confusion_matrix, interval_text, range_bar
from coatnet.files import write_atomic

MAX_CURVE_POINTS = 500
MAX_BAD_IMAGES = 200


def write_report(
    path: Path,
    *,
    title: str,
    config: dict[str, Any],
    history: list[dict[str, Any]],
    outcome: Outcome,
    summary: Summary,
    image_set: ImageSet,
    bad_images: dict[str, str],
    facts: dict[str, str | int | float],
    model_folder: str,
) -> None:
    """Write the report atomically.

    `history` rows hold epoch, train_loss and, after an evaluation, val_loss and val_top1_percent; it may be empty.
    `facts` are further cards, label to value, shown in the order given ("parameters", "training time").
    `bad_images` are all files that could not be read, name to reason; `model_folder` is what `coatnet predict` takes.
    """
    sections = [
        section("training", "Training", _curves(history)),
        section("classes", "Class by class", class_table(summary.classes)),
        section("matrix", "Confusion matrix", confusion_matrix(summary.confusion, outcome.class_names)),
        section("confused", "Most confused", confused_pairs(outcome, summary.confusion, image_set)),
        section("mistakes", "Most confident mistakes", worst_mistakes(outcome, image_set) or _no_mistakes(summary.n)),
        section("calibration", "Can its confidence be trusted?", _calibration(summary)),
        section("bad", "Pictures that could not be read", _bad_images(bad_images)),
        section("use", "Use the model", _usage(model_folder)),
        section("config", "Settings", _config(config)),
    ]
    write_atomic(path, page_of(title, _headline(title, summary) + _cards(summary, facts), sections))


def page_of(title: str, head: str, sections: list[str], more_css: str = "") -> str:
    """Return a whole page in the report's look; `more_css` comes after its own."""
    css = files("coatnet.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>\n<style>\n{css}{more_css}</style></head>\n<body><main>\n"
        + "\n".join([head, *filter(None, sections)])
        + f"\n<footer>Written by coatnet {__version__}. This page is one file; it needs no network.</footer>\n"
        "</main></body></html>\n"
    )


def section(name: str, heading: str, content: str) -> str:
    """Return a section, or nothing if there is nothing to show."""
    return f'<section id="{name}"><h2>{heading}</h2>{content}</section>' if content else ""


def _headline(title: str, summary: Summary) -> str:
    largest = max(row.support for row in summary.classes)
    return (
        f'<header><p class="title">{escape(title)}</p>'
        f'<h1>{summary.top1_percent:.1f}<span class="unit"> % top-1</span></h1>'
        f"{range_bar(summary.top1_percent, summary.top1_interval)}"
        f"<p>of {summary.n:,} pictures of {len(summary.classes):,} classes are named right; 95 % interval "
        f'{interval_text(summary.top1_interval)} %. <span class="note">Always naming the largest class would give '
        f"{100 * largest / summary.n:.1f} %.</span></p></header>"
    )


def _cards(summary: Summary, facts: dict[str, str | int | float]) -> str:
    cards: list[str] = []
    if summary.top5_percent is not None:
        cards.append(_card("top-5", f"{summary.top5_percent:.1f} %", summary.top5_interval, 1))
    cards.append(_card("loss", f"{summary.loss:.3f}", summary.loss_interval, 3))
    cards.append(_card("macro F1", f"{summary.macro_f1_percent:.1f} %", None, 1))
    cards.append(_card("calibration error", f"{summary.ece_percent:.1f} %", summary.ece_interval, 1))
    for label, value in facts.items():
        cards.append(_card(label, value if isinstance(value, str) else f"{value:,}", None, 0))
    return f'<dl class="cards">{"".join(cards)}</dl>'


def _card(label: str, value: str, interval: Interval | None, digits: int) -> str:
    below = f"<small>{interval_text(interval, digits)}</small>" if interval else ""
    return f"<div><dt>{escape(label)}</dt><dd>{escape(value)}{below}</dd></div>"


def _curves(history: list[dict[str, Any]]) -> str:
    training, validation = _points(history, "train_loss"), _points(history, "val_loss")
    accuracy = _points(history, "val_top1_percent")
    plots = [loss_curves(training, validation)] if training[0] or validation[0] else []
    if accuracy[0]:
        plots.append(accuracy_curve(accuracy))
    note = (
        '<p class="note">Training loss is that of mixed, shifted and smoothed targets; it may lie above validation.</p>'
    )
    return f'{note}<div class="plots">{"".join(plots)}</div>' if plots else ""


def _points(history: list[dict[str, Any]], key: str) -> Points:
    """Return (epochs, values) of the rows that hold a finite value, thinned to what a plot can show."""
    pairs = [(row["epoch"], row[key]) for row in history if row.get(key) is not None and math.isfinite(row[key])]
    thin = pairs[:: max(1, math.ceil(len(pairs) / MAX_CURVE_POINTS))]
    return [epoch for epoch, _ in thin], [value for _, value in thin]


def _no_mistakes(n: int) -> str:
    return f"<p>None: all {n:,} pictures are named right.</p>"


def _calibration(summary: Summary) -> str:
    interval = f" (95 % interval {interval_text(summary.ece_interval)})" if summary.ece_interval else ""
    return (
        f'<div class="plots">{reliability_diagram(summary.calibration)}'
        f'<p class="note">Confidence and accuracy differ by {summary.ece_percent:.1f} percentage points on '
        f"average{interval}. Where a bar ends below its line, the model is surer than it should be.</p></div>"
    )


def _bad_images(bad_images: dict[str, str]) -> str:
    if not bad_images:
        return ""
    rows = [
        f"<tr><td>{escape(name)}</td><td>{escape(reason)}</td></tr>"
        for name, reason in list(bad_images.items())[:MAX_BAD_IMAGES]
    ]
    more = f" The first {MAX_BAD_IMAGES} are listed." if len(bad_images) > MAX_BAD_IMAGES else ""
    return (
        f'<p class="note">{len(bad_images):,} in all; they are in none of the figures above.{more}</p>'
        '<div class="scroll tall"><table><thead><tr><th scope="col">file</th><th scope="col">reason</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _usage(model_folder: str) -> str:
    run = shlex.quote(model_folder)
    python = (
        f"import coatnet\n\nclassifier = coatnet.load({model_folder!r})\n"
        'for label, probability in classifier.predict("photo.jpg")[0]:\n'
        '    print(f"{label}: {probability:.1%}")'
    )
    snippets = [
        ("Name some pictures", f"coatnet predict {run} photo.jpg"),
        ("Evaluate it on another set (DATA/class/picture)", f"coatnet eval {run} DATA"),
        ("From Python", python),
    ]
    return "".join(f"<h3>{heading}</h3><pre><code>{escape(code)}</code></pre>" for heading, code in snippets)


def _config(config: dict[str, Any]) -> str:
    if not config:
        return ""
    rows = [f"<tr><th scope='row'>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in _flatten(config)]
    return f"<details><summary>All {len(rows)} settings of the run</summary><table>{''.join(rows)}</table></details>"


def _flatten(config: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return (dotted name, value as text) of every setting, however deep."""
    rows: list[tuple[str, str]] = []
    for key, value in config.items():
        if isinstance(value, dict):
            rows += _flatten(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)))
    return rows
