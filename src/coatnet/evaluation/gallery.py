"""Pictures that the classifier got wrong, as thumbnails inside the page."""

from __future__ import annotations

import base64
import io
from html import escape

import numpy as np
from PIL import Image

from coatnet.data.image_sets import ImageSet
from coatnet.errors import BadImageError
from coatnet.evaluation.metrics import Counts, Outcome

THUMBNAIL_PX = 160  # longer side; shown at half of it, for screens with two dots a pixel
TINY_PX = 64  # up to here pictures stay as they are, lossless, and are enlarged without blur
MAX_PAIRS, MAX_PICTURES_A_PAIR, MAX_MISTAKES = 8, 4, 24


def confused_pairs(outcome: Outcome, confusion: Counts, image_set: ImageSet) -> str:
    """Return cards of the class pairs most often confused, each with its most confident mistakes; "" without any."""
    cards: list[str] = []
    for true, predicted in most_confused(confusion)[:MAX_PAIRS]:
        count, support = confusion[true, predicted], confusion[true].sum()
        wrong = np.flatnonzero((outcome.targets == true) & (outcome.predictions == predicted))
        shown = _most_confident(outcome, wrong)[:MAX_PICTURES_A_PAIR]
        names = escape(outcome.class_names[true]), escape(outcome.class_names[predicted])
        cards.append(
            f'<article class="pair"><h3>{names[0]} <span class="arrow" title="taken for">&rarr;</span> {names[1]}</h3>'
            f'<p class="note">{count:,} of {support:,} ({100 * count / support:.1f} %)</p><div class="row">'
            + "".join(_thumbnail(outcome, int(i), image_set) for i in shown)
            + "</div></article>"
        )
    return f'<div class="pairs">{"".join(cards)}</div>' if cards else ""


def worst_mistakes(outcome: Outcome, image_set: ImageSet) -> str:
    """Return the wrong answers of the highest confidence, most confident first; "" without any."""
    wrong = np.flatnonzero(outcome.targets != outcome.predictions)
    figures = [
        f"<figure>{_thumbnail(outcome, int(i), image_set)}<figcaption>"
        f'<b class="wrong">{escape(outcome.class_names[outcome.predictions[i]])}</b><br>'
        f"{100 * outcome.confidences[i]:.1f} %, is {escape(outcome.class_names[outcome.targets[i]])}"
        f'<span class="file" title="{escape(outcome.names[i])}">{escape(outcome.names[i].rpartition("/")[2])}</span>'
        "</figcaption></figure>"
        for i in _most_confident(outcome, wrong)[:MAX_MISTAKES]
    ]
    return f'<div class="mistakes">{"".join(figures)}</div>' if figures else ""


def most_confused(confusion: Counts) -> list[tuple[int, int]]:
    """Return the (true, predicted) pairs of wrong answers, most frequent first."""
    wrong = confusion - np.diag(np.diagonal(confusion))
    rows, columns = np.nonzero(wrong)
    order = np.argsort(-wrong[rows, columns], kind="stable")
    return list(zip(rows[order].tolist(), columns[order].tolist(), strict=True))


def _most_confident(outcome: Outcome, indices: Counts) -> Counts:
    return indices[np.argsort(-outcome.confidences[indices], kind="stable")]


def _thumbnail(outcome: Outcome, index: int, image_set: ImageSet) -> str:
    """Return the picture as an `<img>` that holds its own bytes; a note if it cannot be read any more."""
    name = escape(outcome.names[index])
    try:
        pixels = image_set.read(int(outcome.positions[index]), min_side=THUMBNAIL_PX)
    except BadImageError:
        return f'<span class="gone" title="{name}">no longer readable</span>'
    picture = Image.fromarray(pixels)
    tiny = max(picture.size) <= TINY_PX
    buffer = io.BytesIO()
    if tiny:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
        picture.save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    kind, css = ("png", ' class="tiny"') if tiny else ("jpeg", "")
    return f'<img{css} alt="{name}" title="{name}" loading="lazy" src="data:image/{kind};base64,{data}">'
