"""The family as a table: its names, and that it needs no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from coatnet.errors import ConfigError
from coatnet.layout import count
from coatnet.zoo import ZOO, find


def test_paper_has_eight_networks():
    assert [name for name, row in ZOO.items() if not row.ours] == [f"coatnet_{number}" for number in range(8)]


def test_rows_go_by_their_own_names_and_differ():
    assert all(name == row.name for name, row in ZOO.items())
    assert len({row.config for row in ZOO.values()}) == len(ZOO)
    sizes = {name: count(row.config).num_params for name, row in ZOO.items()}
    assert len(set(sizes.values())) == len(sizes), f"two rows of one size: {sizes}"


@pytest.mark.parametrize("name", ZOO)
def test_find_gives_the_row(name: str):
    assert find(name) is ZOO[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("coatnet-0", r"There is no model 'coatnet-0'\. Did you mean 'coatnet_0'\?"),
        ("CoAtNet_3", r"Did you mean 'coatnet_3'\?"),
        ("resnet50", r"There is no model 'resnet50'\. There are: .*coatnet_0, coatnet_1"),
    ],
)
def test_unknown_name_is_met_with_a_near_one(name: str, message: str):
    with pytest.raises(ConfigError, match=message):
        find(name)


def test_paper_prints_accuracy_where_it_trained():
    """C-0 to C-3 from ImageNet-1K alone; C-2 and larger with more data, named."""
    for row in (row for row in ZOO.values() if not row.ours):
        number = int(row.name[-1])
        assert (row.top1_percent[0] is not None) == (number <= 3), row.name
        assert (row.top1_extra_percent is not None) == (number >= 2), row.name
        assert (row.extra_data is None) == (row.top1_extra_percent is None), row.name


@pytest.mark.parametrize("module", ["coatnet", "coatnet.config", "coatnet.zoo", "coatnet.layout"])
def test_module_needs_no_torch(module: str):
    """`coatnet models` and `coatnet --help` start without it."""
    code = (
        f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}} & {{'torch', 'numpy'}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [], f"import {module} brings {done.stdout}"
