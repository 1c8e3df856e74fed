"""`--help`, `coatnet models`, and how soon they come."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys

import pytest

import coatnet
from coatnet import cli

COMMANDS = ("models", "plan", "train", "eval", "predict")


def test_models_lists_the_family(say):
    rows = json.loads(say("models", "--json").out)
    assert [row["name"] for row in rows] == coatnet.list_models()
    found = {row["name"]: row for row in rows}
    assert found["coatnet_0"]["num_params"] == 25_036_948
    assert found["coatnet_0"]["paper_top1_percent"] == {"224": 81.6, "384": 83.9, "512": None}
    assert found["coatnet_0"]["image_size"] == [224, 224]
    assert found["coatnet_pico"]["from"] == "this project"
    table = say("models")
    assert table.status == 0
    assert all(row["name"] in table.out for row in rows)


@pytest.mark.parametrize(("size", "params"), [("384", 25_143_028), ("512x512", 25_269_364)])
def test_models_at_another_size(size: str, params: int, say):
    rows = {row["name"]: row for row in json.loads(say("models", "--image-size", size, "--json").out)}
    assert rows["coatnet_0"]["num_params"] == params


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, say):
    said = say(command, "--help")
    assert said.status == 0
    assert re.search(rf"^Example: coatnet {command}", said.out, re.M)


def test_help_and_version(say):
    said = say("--help")
    assert said.status == 0
    assert all(re.search(rf"\b{command}\b", said.out) for command in COMMANDS)
    assert "Start with:  coatnet train PICTURES" in said.out
    assert say().status == 0
    assert coatnet.__version__ in say("--version").out


def test_the_example_of_each_help_can_be_read(say):
    """It parses: what fails is what it names, not how it is called."""
    for command in COMMANDS:
        (line,) = re.findall(r"^Example: coatnet (.*)$", say(command, "--help").out, re.M)
        tokens = [token.strip('"') for token in line.split()]
        _, bound, _ = cli.app.parse_args(tokens, exit_on_error=False, print_error=False)
        assert bound is not None


@pytest.mark.parametrize("tokens", [["--help"], ["models", "--json"], ["plan", "coatnet_7"], ["train", "--help"]])
def test_what_needs_no_torch_loads_none(tokens: list[str]):
    code = (
        f"import sys; from coatnet.cli import run; status = run({tokens}); sys.exit(status or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


def test_help_comes_at_once():
    """It costs little beside an empty program's help by the same library: CPU time, in turns, the best of five."""
    empty = "import cyclopts; cyclopts.App(help_format='plaintext')(['--help'])"

    def used_s(*arguments: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before

    turns = [(used_s("-m", "coatnet", "--help"), used_s("-c", empty)) for _ in range(5)]
    ours_s, empty_s = (min(column) for column in zip(*turns, strict=True))
    assert ours_s < 2.5 * empty_s, f"{ours_s:.3f} s, an empty program {empty_s:.3f} s"
