"""The confusion matrix and the figures of each class as HTML tables."""

from __future__ import annotations

from html import escape

import numpy as np

from coatnet.evaluation.gallery import most_confused
from coatnet.evaluation.metrics import ClassSummary, Counts, Interval

MAX_MATRIX_CLASSES = 30  # more cannot be read on a page
STRONG_RIGHT, STRONG_WRONG = 0.55, 0.35  # share of a row from which a cell's letters must stand out


def confusion_matrix(confusion: Counts, names: tuple[str, ...]) -> str:
    """Return a heat map of the confusion matrix; of many classes only those that are confused most."""
    shown = _shown_classes(confusion)
    supports = confusion.sum(axis=1)
    head = "".join(f'<th scope="col"><span title="{escape(names[i])}">{escape(names[i])}</span></th>' for i in shown)
    rows = [
        f'<tr><th scope="row" title="{escape(names[true])}">{escape(names[true])}</th>'
        + "".join(_cell(int(confusion[true, column]), int(supports[true]), true == column) for column in shown)
        + "</tr>"
        for true in shown
    ]
    part = f"The {len(shown)} of {len(names)} classes that are confused most. " if len(shown) < len(names) else ""
    return (
        f'<p class="note">{part}Rows are true classes, columns the answers; the stronger the colour of a cell, the '
        "larger its share of the row. Numbers are pictures.</p>"
        f'<div class="scroll"><table class="matrix" style="--classes:{len(shown)}">'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _shown_classes(confusion: Counts) -> list[int]:
    if len(confusion) <= MAX_MATRIX_CLASSES:
        return list(range(len(confusion)))
    shown: dict[int, None] = {}
    for pair in most_confused(confusion):
        if len(shown.keys() | set(pair)) > MAX_MATRIX_CLASSES:
            break
        shown.update(dict.fromkeys(pair))
    return sorted(shown or range(MAX_MATRIX_CLASSES))


def _cell(count: int, support: int, right: bool) -> str:
    if not count:
        return "<td></td>"
    share = count / support
    css = ("right" if right else "wrong") + (" strong" if share > (STRONG_RIGHT if right else STRONG_WRONG) else "")
    return f'<td class="{css}" style="--share:{share:.3f}" title="{100 * share:.1f} % of the row">{count}</td>'


def class_table(classes: tuple[ClassSummary, ...]) -> str:
    """Return one row a class, the lowest F1 first, classes without one last."""
    order = sorted(classes, key=lambda row: np.inf if row.f1_percent is None else row.f1_percent)
    rows = [
        f'<tr><th scope="row">{escape(row.name)}</th><td class="number">{row.support:,}</td>'
        + _share(row.recall_percent, row.recall_interval)
        + _share(row.precision_percent, row.precision_interval)
        + _share(row.f1_percent, row.f1_interval)
        + "</tr>"
        for row in order
    ]
    return (
        '<p class="note">Weakest class first. Recall: of its pictures, how many are found. Precision: of the answers '
        "with this class, how many are right. F1 balances the two. Brackets and small figures are 95 % intervals.</p>"
        '<div class="scroll tall"><table class="classes"><thead><tr><th scope="col">class</th>'
        '<th scope="col" class="number">pictures</th><th scope="col">recall %</th><th scope="col">precision %</th>'
        f'<th scope="col">F1 %</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _share(percent: float | None, interval: Interval | None) -> str:
    if percent is None or interval is None:
        return '<td class="share"><span class="note">undefined</span></td>'
    return (
        f'<td class="share">{percent:.1f} <small>{interval_text(interval)}</small>{range_bar(percent, interval)}</td>'
    )


def interval_text(interval: Interval, digits: int = 1) -> str:
    """Return "90.7 to 91.9", short."""
    return f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"


def range_bar(percent: float, interval: Interval) -> str:
    """Return a bar from 0 to the figure on a track up to 100 %, with a bracket for the interval."""
    low, high = interval
    return f'<span class="range" style="--low:{low:.2f}%;--width:{high - low:.2f}%;--at:{percent:.2f}%"></span>'
