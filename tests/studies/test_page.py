"""The page of a study as a browser reads it: whole, escaped, alone, and with every figure of the record."""

from __future__ import annotations

import copy
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from coatnet.studies import catalogue
from coatnet.studies.page import write_page

Make = Callable[..., dict[str, Any]]

VOID = {"meta", "use", "path", "rect", "br"}


class Page(HTMLParser):
    """Collect texts, sections and references, and hold every tag to be closed in its turn."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.sections: list[str | None] = []
        self.references: list[str | None] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.add(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag == "section":
            self.sections.append(found["id"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def written(path: Path, record: dict[str, Any]) -> Page:
    write_page(path, catalogue.find(record["figures"]["study"]), record)
    return Page(path)


@pytest.mark.parametrize("name", ["capacity", "details", "attention-scope"])
def test_it_tells_what_the_record_tells(name: str, make: Make, tmp_path: Path):
    record, study = make(name), catalogue.find(name)
    page = written(tmp_path / "a.html", record)
    for said in (study.title, study.question, study.source, *study.paper):
        assert said in page.text
    for row in record["figures"]["table"]:
        top1 = row["top1_percent"]
        for said in (row["row"], row["setting"], f"{row['num_params']:,}", f"{top1['mean']:.2f}"):
            assert said in page.text
        assert f"{top1['low']:.2f} to {top1['high']:.2f}" in page.text
    for answer in record["figures"]["answers"]:
        assert answer["claim"] in page.text
    for run in record["figures"]["runs"]:
        assert f"{run['top1_percent']:.2f}" in page.text
    assert f"coatnet study {name} --out 'my studies'" in page.text
    for said in ("1 h 2 min", "A Processor (2 threads)", "2.15.0", "c0ffeec0ff", "400 test pictures", "seeds 0, 1, 2"):
        assert said in page.text
    assert "not corrected for many comparisons" in page.text


def test_answers_are_the_records(make: Make, tmp_path: Path):
    page = written(tmp_path / "a.html", make("generalisation"))
    # rows are 6 points apart, each worse than the one before
    assert page.source.count('<div class="holds">') == 3
    assert page.source.count('<div class="does-not-hold">') == 1  # CCCC ~ CCCT
    assert "+6.00 points by top-1" in page.text
    assert "0.5 points count as about equal and 2 as much" in page.text


def test_what_cannot_be_told_says_how_many_seeds_would(make: Make, tmp_path: Path):
    record = make("lineage")
    record["figures"]["answers"][0].update(verdict="cannot tell", seeds_that_would_tell=17)
    assert "17 seeds would tell" in written(tmp_path / "a.html", record).text
    record["figures"]["answers"][0].update(seeds_that_would_tell=None)
    assert "over 1000 seeds would be needed" in written(tmp_path / "a.html", record).text


def test_one_seed_has_no_intervals(make: Make, tmp_path: Path):
    page = written(tmp_path / "a.html", make("lineage", num_seeds=1))
    assert "one seed: no interval" in page.text
    assert "None" not in page.text
    assert "nan" not in page.text


def test_the_gap_and_the_match_are_computed_from_the_record(make: Make, tmp_path: Path):
    record = make("lineage")
    first, second = record["figures"]["table"]
    page = written(tmp_path / "a.html", record)
    assert f"{first['val_loss']['mean'] - first['train_loss']['mean']:+.4f}" in page.text
    assert f"parameters {second['num_params'] / first['num_params']:.3f}" in page.text


def test_only_a_study_of_speed_shows_it(make: Make, tmp_path: Path):
    page = written(tmp_path / "a.html", make("attention-scope"))
    assert page.sections == ["figure", "table", "speed", "cost", "command"]
    for said in ("1,000", "950 to 1,050", "batch 64, fp32, cpu", "not told"):
        assert said in page.text
    assert "speed" not in written(tmp_path / "b.html", make("lineage")).sections


def test_names_are_escaped(make: Make, tmp_path: Path):
    record = copy.deepcopy(make("lineage"))
    bad = "</td><script>x"
    record["command"].append(bad)
    record["figures"]["data"] = [bad]
    for run in record["figures"]["runs"]:
        run["host"] = {**run["host"], "cpu": bad}
        run["row"] = bad if run["row"] == "paper" else run["row"]
    for row in record["figures"]["table"]:
        row["row"] = bad if row["row"] == "paper" else row["row"]
    record["figures"]["answers"][0].update(claim=f"{bad} >= listing", first=bad)
    page = written(tmp_path / "a.html", record)
    assert "script" not in page.tags
    assert page.text.count(bad) >= 6


def test_it_refers_to_nothing_outside_itself(make: Make, tmp_path: Path):
    page = written(tmp_path / "a.html", make("data-scale"))
    assert "http" not in page.source
    assert all(reference and reference.startswith("#") for reference in page.references)
    assert "url(" not in page.source.replace("url(#", "")
    assert not page.tags & {"script", "link", "iframe", "object"}
    assert "svg" in page.tags


def test_plots_take_the_pages_colours(make: Make, tmp_path: Path):
    page = written(tmp_path / "a.html", make("generalisation"))
    body = page.source.partition("</style>")[2]
    assert all(f"var(--row-{i})" in body for i in range(5))
    assert not [colour for colour in ("#1b1f24", "#5c6570", "#dfe3e8", "#0072b2") if colour in body]


def test_the_same_record_gives_the_same_page(make: Make, tmp_path: Path):
    record = make("details")
    assert written(tmp_path / "a.html", record).source == written(tmp_path / "b.html", record).source
