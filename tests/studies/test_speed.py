"""Speed of a study's networks: every row has its figures, and more work takes longer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coatnet.layout import count
from coatnet.studies.scales import SCALES
from coatnet.studies.speed import measure_speed

TOY = SCALES["toy"]
SMALL = TOY.usual.model
WIDE = replace(SMALL, widths=(32, 64, 96, 192, 256))


def test_a_row_has_speed_and_memory():
    (found,) = measure_speed({"small": replace(TOY.usual, model=SMALL)})
    assert (found["row"], found["device"], found["batch"], found["precision"]) == ("small", "cpu", 64, "fp32")
    for rate in (found["images_per_s"], found["inference_images_per_s"]):
        assert 0 < rate["low"] <= rate["median"] <= rate["high"]
    assert found["inference_images_per_s"]["median"] > found["images_per_s"]["median"], found
    gradients_and_moments_mib = 3 * 4 * count(SMALL).num_params / 2**20
    assert gradients_and_moments_mib < found["training_mib"] < 1000


@pytest.mark.slow
def test_a_wider_network_is_slower_and_larger():
    models = {"small": SMALL, "wide": WIDE}
    small, wide = measure_speed({name: replace(TOY.usual, model=model) for name, model in models.items()})
    assert (small["row"], wide["row"]) == ("small", "wide")
    assert small["images_per_s"]["median"] > 1.5 * wide["images_per_s"]["median"], (small, wide)
    assert small["inference_images_per_s"]["median"] > 1.5 * wide["inference_images_per_s"]["median"], (small, wide)
    assert wide["training_mib"] > 1.3 * small["training_mib"], (small, wide)
