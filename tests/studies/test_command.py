"""`coatnet study` as it is typed, and every study at toy size."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coatnet import cli
from coatnet.studies.catalogue import STUDIES
from coatnet.studies.findings import find_answers, group
from coatnet.studies.runs import cells_of, do_all, read_result
from coatnet.studies.scales import SCALES
from training.tiny import write_pictures

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # the same bits every time, and no fight for two cores


def words_of(*words: str) -> list[str]:
    return [sys.executable, "-m", "coatnet", "study", *words]


def study(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words_of(*words), cwd=cwd, env=ONE_THREAD, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.fixture(scope="module")
def lineage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder where `coatnet study lineage --scale toy` was typed."""
    folder = tmp_path_factory.mktemp("lineage")
    done = study("lineage", "--scale", "toy", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "report: studies/lineage-toy.html" in done.stdout, done.stdout
    return folder


def test_it_leaves_a_record_a_page_and_a_picture(lineage: Path):
    record = json.loads((lineage / "studies" / "lineage-toy.json").read_text())
    assert record["kind"] == "study"
    assert record["seeds"] == [0, 1, 2]
    assert record["n"] == 6 == len(record["figures"]["runs"])
    (answer,) = record["figures"]["answers"]
    assert answer["claim"] == "paper >= listing"
    assert answer["verdict"] in ("holds", "does not hold", "cannot tell")
    for suffix in (".html", ".png"):
        assert (lineage / "studies" / f"lineage-toy{suffix}").stat().st_size > 10_000


def test_what_is_done_is_not_done_again(lineage: Path):
    runs = sorted((lineage / "studies" / "runs").glob("*.json"))
    before = [run.stat().st_mtime_ns for run in runs]
    done = study("lineage", "--scale", "toy", "--json", cwd=lineage)
    assert done.returncode == 0, done.stderr
    assert "6 done" in done.stderr
    assert json.loads(done.stdout)["figures"]["study"] == "lineage"
    assert [run.stat().st_mtime_ns for run in runs] == before


def test_shares_of_two_machines_merge(lineage: Path, tmp_path: Path):
    for index in (1, 2):
        done = study(
            "lineage", "--scale", "toy", "--seeds", "1", "--shard", f"{index}/2", "--out", f"m{index}", cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        assert "1 run of other shares missing" in done.stdout, done.stdout
    (tmp_path / "both" / "runs").mkdir(parents=True)
    for path in (*(tmp_path / "m1" / "runs").glob("*.json"), *(tmp_path / "m2" / "runs").glob("*.json")):
        path.rename(tmp_path / "both" / "runs" / path.name)
    done = study("lineage", "--scale", "toy", "--seeds", "1", "--out", "both", "--json", cwd=tmp_path)
    assert "2 runs, 2 of them here, 2 done" in done.stderr, done.stderr
    merged = {run["row"]: run["correct"] for run in json.loads(done.stdout)["figures"]["runs"]}
    whole = json.loads((lineage / "studies" / "lineage-toy.json").read_text())["figures"]["runs"]
    assert merged == {run["row"]: run["correct"] for run in whole if run["seed"] == 0}


def test_two_shells_divide_the_work_and_a_kill_loses_nothing_that_is_done(lineage: Path, tmp_path: Path):
    words = words_of("lineage", "--scale", "toy", "--seeds", "2")
    first, second = (
        subprocess.Popen(words, cwd=tmp_path, env=ONE_THREAD, stdout=subprocess.PIPE, text=True) for _ in range(2)
    )
    runs = tmp_path / "studies" / "runs"
    while not list(runs.glob("*.json")):
        assert (first.poll(), second.poll()) == (None, None), "ended before a run was done"
        time.sleep(0.1)
    first.kill()
    first.communicate()
    output, _ = second.communicate(timeout=300)
    assert second.returncode == 0, output
    record = json.loads((tmp_path / "studies" / "lineage-toy.json").read_text())
    met = {(run["row"], run["seed"]): run["correct"] for run in record["figures"]["runs"]}
    whole = json.loads((lineage / "studies" / "lineage-toy.json").read_text())["figures"]["runs"]
    assert met == {(run["row"], run["seed"]): run["correct"] for run in whole if run["seed"] < 2}


def test_under_torchrun_each_training_takes_all_ranks(tmp_path: Path):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "coatnet"]
    done = subprocess.run(
        [*words, "study", "lineage", "--scale", "toy", "--seeds", "1"],
        cwd=tmp_path, env=ONE_THREAD, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2/2  listing") == 1, done.stdout
    records = list((tmp_path / "studies" / "runs").glob("*/record.json"))
    assert [json.loads(record.read_text())["figures"]["num_ranks"] for record in records] == [2, 2]
    assert (tmp_path / "studies" / "lineage-toy.html").is_file()


def test_ctrl_c_says_how_to_go_on(tmp_path: Path):
    running = subprocess.Popen(
        words_of("data-scale", "--scale", "toy", "--seeds", "1"),
        cwd=tmp_path, env=ONE_THREAD, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not list((tmp_path / "studies" / "runs").glob("*/metrics.jsonl")):
        assert running.poll() is None, "ended before a training began"
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 130, output
    assert "The same command goes on." in output


@pytest.mark.parametrize("name", ["transfer", "blocks", "details", "attention-scope"])
def test_a_study_runs_at_toy_size(name: str, tmp_path: Path):
    found, scale = STUDIES[name], SCALES["toy"]
    cells = cells_of(found.trainings(scale), 1)
    done = {cell.key: read_result(tmp_path, cell) for cell in do_all(cells, tmp_path, "cpu", lambda _: lambda _: None)}
    findings = find_answers(found, scale, group(cells, lambda cell: done[cell.key]))
    assert len(findings["table"]) == len(cells)
    assert {answer["verdict"] for answer in findings["answers"]} == {"cannot tell"}, "one seed tells nothing"


@pytest.mark.slow
def test_a_study_of_speed_reports_it(tmp_path: Path):
    done = study("attention-scope", "--scale", "toy", "--seeds", "1", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {row["row"] for row in json.loads(done.stdout)["figures"]["speed"]} == {
        f"{scope}, {place}" for scope in ("global", "window", "linear") for place in ("S3, S4", "S1 .. S4")
    }


def test_own_pictures_one_of_which_cannot_be_read(tmp_path: Path):
    """Held-out pictures differ by seed; the bad one counts as named wrongly where it is among them."""
    bad = next(write_pictures(tmp_path / "pictures").glob("*/*.png"))
    bad.write_bytes(b"no picture")
    done = study("lineage", "--scale", "toy", "--seeds", "2", "--data", "pictures", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "studies" / "lineage-toy-pictures.json").read_text())
    assert {row["part"] for row in record["figures"]["table"]} == {"val"}
    assert any(run["num_bad_images"] for run in record["figures"]["runs"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["linage"], "There is no study 'linage'. Did you mean 'lineage'"),
        (["lineage", "--scale", "paper"], "--scale paper needs --data, a folder of pictures like ImageNet's."),
        (["lineage", "--shard", "3/2"], "A shard of '3/2' cannot be read. Give it like 2/4"),
        (["lineage", "--seeds", "0"], "--seeds is 0. Give 1 or more; an answer takes 3."),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["study", *words]) == 2
    error = capsys.readouterr().err
    assert said in error, error
    assert len(error.splitlines()) == 1, error
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_transfer_at_paper_scale_asks_what_is_learned_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    write_pictures(tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    assert cli.run(["study", "transfer", "--scale", "paper", "--data", "pictures"]) == 2
    assert "--scale paper needs --pretraining-data" in capsys.readouterr().err


def test_pictures_that_changed_between_runs_are_noticed(lineage: Path, tmp_path: Path):
    shutil.copytree(lineage / "studies" / "runs", tmp_path / "studies" / "runs")
    path = next((tmp_path / "studies" / "runs").glob("*.json"))
    result = json.loads(path.read_text())
    path.write_text(json.dumps({**result, "data_sha256": "0" * 64}))
    done = study("lineage", "--scale", "toy", cwd=tmp_path)
    assert done.returncode == 1, done.stdout
    assert "saw different pictures under the name digits" in done.stderr, done.stderr
    assert not (tmp_path / "studies" / "lineage-toy.json").exists()


def test_the_list_says_question_rows_and_cost(tmp_path: Path):
    done = study("list", "--scale", "paper", "--json", cwd=tmp_path)
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert list(rows) == list(STUDIES)
    assert rows["generalisation"]["rows"] == ["CCCC", "CCCT", "CCTT", "CTTT", "ViT_rel"]
    assert rows["generalisation"]["num_images"] == 15 * 300 * 1_281_167
    assert rows["generalisation"]["macs"] == pytest.approx(15 * 300 * 1_281_167 * 3 * 4.5e9, rel=0.1)  # G a picture
    shown = study("list", cwd=tmp_path).stdout
    assert all(row["question"] in shown for row in rows.values())
