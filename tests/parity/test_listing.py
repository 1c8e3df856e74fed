"""The listing's network against its plain reference: answers, gradients, running statistics."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from coatnet.bench.weights import scramble
from coatnet.config import ModelConfig, Size
from coatnet.model.network import CoAtNet
from parity.listing_reference import PlainListing
from parity.test_reference import assert_same, images_of, weights_of

BASE = ModelConfig(
    blocks="listing",
    head="plain",
    depths=(2, 2, 1, 2, 1),
    widths=(8, 8, 12, 18, 18),  # S1 and S4 as wide as what comes in; no whole number of heads
    batch_norm_momentum=0.3,
    num_classes=5,
    image_size=(16, 24),
)
NETWORKS: dict[str, dict[str, Any]] = {
    "CCTT": {},
    "CTTT": {"layout": "CTTT"},
    "few strides": {"strides": (1, 2, 1, 2, 1)},
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("size", [(1, 1), (16, 24), (27, 19)])
@pytest.mark.parametrize("network", NETWORKS)
def test_network_is_the_listing(network: str, size: Size, training: bool):
    if training and max(size) < 5:
        pytest.skip("BatchNorm has nothing to train on in one cell: its variance is of rounding alone")
    config = replace(BASE, **NETWORKS[network])
    model = CoAtNet(config).double().train(training)
    scramble(model)
    weights = weights_of(model)
    x, plain_x = (images_of(size, 3, batch=3).requires_grad_() for _ in range(2))
    want = PlainListing(config, weights, training=training).logits(plain_x)
    assert_same(model, weights, "", model(x), want, x, plain_x)
