"""Where pictures lie changes nothing: shards and tables give the folder's weights, bit for bit, resumed ones too."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from coatnet import cli
from coatnet.data.sources import open_data
from coatnet.errors import TrainingError
from coatnet.evaluation.command import evaluate_run
from coatnet.training import run_folder
from coatnet.training.loop import train
from data.large import write_shards, write_table
from training.test_loop import EVERYTHING, pull_the_plug, stop_after
from training.tiny import CLASSES, assert_same_end, config_of, write_pictures


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same pictures, divided, as folders, shards and tables."""
    top = tmp_path_factory.mktemp("large")
    for part, per_class, seed in (("train", 20, 0), ("val", 4, 1), ("test", 4, 2)):
        folder = write_pictures(top / "folder" / part, per_class=per_class, seed=seed)
        write_shards(folder, top / "shards", part=part, per_shard=9)
        write_table(folder, top / "table", split=part)
    return {name: top / name for name in ("folder", "shards", "table")}


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.mark.parametrize("kind", ["shards", "table"])
def test_the_weights_are_the_folders(kind: str, places: dict[str, Path], tmp_path: Path):
    """Interrupted by an error in mid-epoch and resumed, against the run on the folder that nothing broke."""
    train(config_of(places["folder"], tmp_path / "folder", **EVERYTHING))
    config = config_of(places[kind], tmp_path / kind, **EVERYTHING)
    with pytest.raises(RuntimeError, match="plug"):
        train(config, progress=stop_after(4, pull_the_plug))
    messages: list[str | None] = []
    result = train(config, start="resume", progress=lambda tick: messages.append(tick.message))
    assert "resumed from step-00000003" in messages
    assert_same_end(tmp_path / kind, tmp_path / "folder")
    assert (result.part, result.summary.n, result.summary.top1_percent > 50) == ("test", 12, True)
    assert json.loads((tmp_path / kind / "record.json").read_text())["config"]["data"] == kind
    summary, part, _ = evaluate_run(
        tmp_path / kind, str(places["folder"]), part="val", batch_size=8, device="cpu", num_workers=0
    )
    assert (part, summary.n, [row.name for row in summary.classes]) == ("val", 12, list(CLASSES))


def test_the_commands_take_shards(places: dict[str, Path], monkeypatch, capsys):
    """`coatnet train` and `coatnet eval` as they are typed; the run is called after the shards."""
    monkeypatch.chdir(places["shards"].parent)
    train_shards = "shards/train-{000..006}.tar"
    quick = ("--model", "coatnet_pico", "--epochs", "1", "--batch-size", "6", "--device", "cpu")
    assert cli.run(["train", train_shards, *quick]) == 0
    assert "use it: coatnet predict runs/train IMAGES" in capsys.readouterr().out
    assert json.loads(Path("runs/train/record.json").read_text())["config"]["data"] == train_shards
    for data, part, number in (("shards/test-*.tar", "all", 12), (train_shards, "val", 6), ("shards", "test", 12)):
        assert cli.run(["eval", "runs/train", data, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["data"], found["part"], found["n"]) == (data, part, number)


def test_a_table_inside_the_run_is_not_overwritten(tmp_path: Path):
    config = config_of("unused", tmp_path / "run")
    run_folder.begin(config, open_data(write_pictures(tmp_path / "pictures")), 1)
    for data in (tmp_path / "run/table", f"hf:{tmp_path}/run/table", f"{tmp_path}/run/train-{{0..3}}.tar"):
        with pytest.raises(TrainingError, match="which is to be overwritten"):
            run_folder.check(config_of(data, tmp_path / "run"), "overwrite")
