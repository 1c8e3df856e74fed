"""The report as a browser reads it: whole, escaped, and referring to nothing outside itself."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from coatnet.data.image_sets import ArrayImages, FolderImages, ImageSet
from coatnet.evaluation.metrics import Outcome, summarise
from coatnet.evaluation.report import write_report
from coatnet.evaluation.tables import interval_text

HISTORY = [
    {"step": 10 * i, "epoch": i / 2, "lr": 1e-3, "train_loss": 2 / (i + 1), "images_per_s": 900.0}
    | ({"val_loss": 1 / (i + 1), "val_top1_percent": 50.0 + i} if i % 2 else {})
    for i in range(8)
]
VOID = {"meta", "img", "br", "use", "path", "rect", "link", "input", "hr"}


class Page(HTMLParser):
    """Collect tags, texts and references, and hold every tag to be closed in its turn."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sections: list[str] = []
        self.references: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.source = path.read_text()
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.add(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if "id" in found:
            self.ids.append(found["id"] or "")
        if tag == "section":
            self.sections.append(found["id"] or "")
        if tag == "img":
            self.images.append(found)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def write(path: Path, outcome: Outcome, image_set: ImageSet, **changes: Any) -> Page:
    values: dict[str, Any] = {
        "title": "clothes",
        "config": {"data": "clothes", "model": {"depths": [1, 2], "loss": None}, "seed": 0},
        "history": HISTORY,
        "bad_images": {},
        "facts": {"parameters": 1234567, "training time": "12 min"},
        "model_folder": "runs/my clothes",
    }
    write_report(path, outcome=outcome, summary=summarise(outcome), image_set=image_set, **{**values, **changes})
    return Page(path)


@pytest.fixture
def page(outcome: Outcome, image_set: ArrayImages, tmp_path: Path) -> Page:
    return write(tmp_path / "report.html", outcome, image_set, bad_images={"a<b.png": "empty & void."})


def test_it_refers_to_nothing_outside_itself(page: Page):
    assert page.references
    assert all(reference.startswith(("data:image/", "#")) for reference in page.references)
    assert "http" not in page.source
    assert "url(" not in page.source.replace("url(#", "")
    assert "@import" not in page.source
    assert not page.tags & {"script", "link", "iframe", "object"}


def test_it_tells_the_figures(page: Page, outcome: Outcome):
    summary = summarise(outcome)
    assert f"{summary.top1_percent:.1f} % top-1" in page.text
    assert f"95 % interval {interval_text(summary.top1_interval)} %" in page.source
    assert f"{summary.top5_percent:.1f} %" in page.text
    assert "300 pictures of 7 classes" in page.text
    assert f"{summary.loss:.3f}" in page.text
    assert "1,234,567" in page.text
    assert "12 min" in page.text
    for row in summary.classes:
        assert row.name in page.text
        assert f"{row.recall_percent:.1f}" in page.text


def test_it_has_every_section(page: Page):
    assert page.sections == [
        "training", "classes", "matrix", "confused", "mistakes", "calibration", "bad", "use", "config",
    ]  # fmt: skip
    assert "data" in page.text
    assert "model.depths" in page.text
    assert "[1, 2]" in page.text


def test_names_of_classes_and_files_are_escaped(page: Page):
    assert "b" in page.tags  # ours
    assert "<b>coat</b>" not in page.source
    assert "<b>coat</b>" in page.text
    assert 'bag & "purse"' in page.text
    assert "a<b.png" in page.text
    assert "empty & void." in page.text


def test_a_title_cannot_close_the_head(outcome: Outcome, image_set: ArrayImages, tmp_path: Path):
    page = write(
        tmp_path / "r.html",
        outcome,
        image_set,
        title="</title><script>x",
        facts={"<i>": "</dd><script>"},
        config={"<": "</td>"},
    )
    assert "script" not in page.tags
    assert "</title><script>x" in page.text


def test_pictures_are_inside_the_page(page: Page, outcome: Outcome, image_set: ArrayImages):
    assert 0 < len(page.images) <= 8 * 4 + 24
    first_mistake = page.images[-min(24, int((outcome.predictions != outcome.targets).sum()))]
    wrong = np.flatnonzero(outcome.predictions != outcome.targets)
    worst = wrong[outcome.confidences[wrong].argmax()]
    assert first_mistake["alt"] == outcome.names[worst]
    head, data = (first_mistake["src"] or "").split(",")
    assert head == "data:image/png;base64"
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), image_set.read(int(worst)))


def test_large_pictures_are_shrunk_and_lost_ones_are_told(outcome: Outcome, tmp_path: Path):
    names = tuple(f"{i}.jpg" for i in range(len(outcome.targets)))
    wrong = np.flatnonzero(outcome.predictions != outcome.targets)
    for i in wrong[::2]:
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)).save(
            tmp_path / names[i]
        )
    image_set = FolderImages(tmp_path, names, outcome.targets, outcome.class_names)
    page = write(tmp_path / "report.html", outcome, image_set)
    assert "no longer readable" in page.text
    for image in page.images:
        head, data = (image["src"] or "").split(",")
        assert head == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (160, 120)


def test_snippets_can_be_pasted(page: Page):
    assert "coatnet predict 'runs/my clothes' photo.jpg" in page.text
    assert "coatnet eval 'runs/my clothes' DATA" in page.text
    start = page.text.index("import coatnet")
    compile(page.text[start : page.text.index("Settings")], "snippet", "exec")


def test_a_perfect_model_without_a_history(outcome: Outcome, image_set: ArrayImages, tmp_path: Path):
    logits = 20 * np.eye(len(outcome.class_names), dtype=np.float32)[outcome.targets]
    page = write(tmp_path / "r.html", replace(outcome, logits=logits), image_set, history=[], config={}, facts={})
    assert page.sections == ["classes", "matrix", "mistakes", "calibration", "use"]
    assert "None: all 300 pictures are named right." in page.text
    assert not page.images


def test_a_history_without_evaluations_or_finite_losses(outcome: Outcome, image_set: ArrayImages, tmp_path: Path):
    rows = [{"epoch": i, "train_loss": loss} for i, loss in enumerate((1.0, float("nan"), float("inf"), 0.5))]
    assert "training" in write(tmp_path / "r.html", outcome, image_set, history=rows).sections
    assert "training" not in write(tmp_path / "r.html", outcome, image_set, history=rows[1:3]).sections


def test_a_long_history_stays_small(outcome: Outcome, image_set: ArrayImages, tmp_path: Path):
    rng = np.random.default_rng(0)
    rows = [{"epoch": i / 1000, "train_loss": float(rng.random())} for i in range(50_000)]
    page = write(tmp_path / "r.html", outcome, image_set, history=rows)
    assert len(page.source) < 300_000


def test_many_classes_show_the_most_confused_only(tmp_path: Path):
    num_classes, n = 100, 1000
    rng = np.random.default_rng(0)
    names = tuple(f"kind {i}" for i in range(num_classes))
    image_set = ArrayImages(np.zeros((n, 4, 4), np.uint8), rng.integers(0, num_classes, n), names, "test", np.arange(n))
    outcome = Outcome(
        logits=rng.normal(size=(n, num_classes)).astype(np.float32),
        targets=image_set.targets,
        positions=np.arange(n),
        names=[""] * n,
        class_names=names,
        bad_images={},
    )
    page = write(tmp_path / "r.html", outcome, image_set)
    assert "of 100 classes that are confused most" in page.text
    matrix = page.source[page.source.index('id="matrix"') : page.source.index('id="confused"')]
    assert 20 <= matrix.count('scope="col"') <= 30


def test_many_bad_files_are_counted_and_the_first_listed(outcome: Outcome, image_set: ArrayImages, tmp_path: Path):
    page = write(tmp_path / "r.html", outcome, image_set, bad_images={f"{i}.jpg": "empty." for i in range(1000)})
    assert "1,000 in all" in page.text
    assert page.text.count("empty.") == 200


def test_the_same_outcome_gives_the_same_bytes(outcome: Outcome, image_set: ArrayImages, tmp_path: Path):
    assert (
        write(tmp_path / "1.html", outcome, image_set).source == write(tmp_path / "2.html", outcome, image_set).source
    )


def test_plots_take_the_pages_colours_and_share_no_id(page: Page):
    assert "#0102" not in page.source
    assert "var(--good)" in page.source
    plots = page.source[page.source.index("<main>") :]
    assert plots.count('<svg class="plot" role="img"') == 3
    assert "DejaVu" not in plots


def test_matplotlib_is_loaded_only_to_draw():
    code = "import sys, coatnet.evaluation.report; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
