"""The picture of a study: its size, that something is on it, and that it is the same each time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from coatnet.studies import catalogue
from coatnet.studies.panels import LAYOUTS, PALETTE, Panel, answer_panels, look, result_panels
from coatnet.studies.picture import write_picture

Make = Callable[..., dict[str, Any]]


def drawn(path: Path, name: str, make: Make, num_seeds: int = 3) -> np.ndarray:
    write_picture(path, catalogue.find(name), make(name, num_seeds=num_seeds))
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def has_colour(pixels: np.ndarray, colour: str) -> bool:
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return bool((pixels == wanted).all(axis=2).any())


@pytest.mark.parametrize("name", ["generalisation", "details", "attention-scope", "data-scale"])
def test_it_is_a_wide_picture_on_white(name: str, make: Make, tmp_path: Path):
    pixels = drawn(tmp_path / "a.png", name, make)
    height, width, _ = pixels.shape
    assert width == 1800
    assert 900 <= height <= 1800, f"{name} is {height} px high"
    edges = (pixels[:12], pixels[-12:], pixels[:, :12], pixels[:, -12:])
    assert all((edge == 255).all() for edge in edges), "something is drawn over the edge"
    assert len(set(map(bytes, pixels[::3, ::3].reshape(-1, 3)))) > 100


def test_every_layout_has_its_colour(make: Make, tmp_path: Path):
    pixels = drawn(tmp_path / "a.png", "generalisation", make)
    missing = [name for name, (light, _) in zip(LAYOUTS, PALETTE, strict=False) if not has_colour(pixels, light)]
    assert not missing


def test_the_same_record_gives_the_same_bytes(make: Make, tmp_path: Path):
    record = make("blocks")
    for name in ("a.png", "b.png"):
        write_picture(tmp_path / name, catalogue.find("blocks"), record)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".png"]


def test_one_seed_has_no_intervals_to_draw(make: Make, tmp_path: Path):
    assert drawn(tmp_path / "a.png", "lineage", make, num_seeds=1).shape[1] == 1800


@pytest.mark.parametrize(
    ("name", "titles"),
    [
        ("capacity", ["Accuracy against training loss", "Final top-1", "The paper's order", "By top-1", "By training"]),
        ("relative-attention", ["Final top-1", "The paper's top-1 (Table 6; Eq. 3)", "By top-1"]),
        ("attention-scope", ["Final top-1", "Accuracy against speed", "By top-1"]),
        ("data-scale", ["Accuracy against data", "By top-1"]),
    ],
)
def test_panels_are_those_of_the_study(name: str, titles: list[str], make: Make):
    record = make(name)
    panels = [*result_panels(catalogue.find(name), record), *answer_panels(record)]
    assert len(panels) == len(titles)
    assert all(title in panel.title for title, panel in zip(titles, panels, strict=True))


def axes_of(panel: Panel) -> Axes:
    axes = Figure().subplots()
    panel.draw(axes)
    return axes


def test_loss_falls_to_the_right_and_lines_are_the_records(make: Make):
    record = make("generalisation", num_looks=5)
    axes = axes_of(result_panels(catalogue.find("generalisation"), record)[0])
    left, right = axes.get_xlim()
    assert left > right
    (bold,) = [line for line in axes.lines if line.get_linewidth() > 2 and len(line.get_xdata()) == 5][:1]
    points = record["figures"]["curves"][0]["points"]
    assert list(bold.get_xdata()) == [point["train_loss"] for point in points]
    assert list(bold.get_ydata()) == [point["val_top1_percent"] for point in points]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(LAYOUTS)


def test_a_dot_has_its_rows_interval(make: Make):
    record = make("lineage")
    (dots,) = result_panels(catalogue.find("lineage"), record)
    lines = [list(map(float, line.get_xdata())) for line in axes_of(dots).lines]
    for row in record["figures"]["table"]:
        top1 = row["top1_percent"]
        assert [top1["low"], top1["high"]] in lines
        assert [top1["mean"]] in lines


def test_a_layout_looks_the_same_in_every_study():
    assert look("CTTT", LAYOUTS) == look("CTTT", ("CCTT", "CTTT"))
    others = [look(name, ("a", "b", "c"))["color"] for name in ("a", "b", "c")]
    assert len(set(others)) == 3


def test_where_the_paper_prints_no_numbers_its_order_is_drawn(make: Make):
    """Worse is left of better: CCTT ~ CTTT > ViT_rel > CCCT > CCCC."""
    panels = result_panels(catalogue.find("capacity"), make("capacity"))
    axes = Figure().subplots()
    next(panel for panel in panels if panel.title == "The paper's order (Figure 1b)").draw(axes)
    places = dict(zip(LAYOUTS, (float(line.get_xdata()[0]) for line in axes.lines), strict=True))  # pyright: ignore
    assert places["CCTT"] == places["CTTT"] > places["ViT_rel"] > places["CCCT"] > places["CCCC"], places
