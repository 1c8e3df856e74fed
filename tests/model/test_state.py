"""What a network keeps: weights and statistics alone, so that every change to them takes effect at once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from coatnet.errors import ConfigError
from coatnet.model.attention import RelativeBias
from coatnet.model.init import init_weights
from coatnet.model.network import CoAtNet
from model.networks import KINDS, assert_equal, config_of, images, network

OTHER = (64, 80)  # px, a size that the tables do not fit


def used(kind: str = "CCTT") -> CoAtNet:
    """Return a network in eval that has answered at two sizes, with anything it might keep now kept."""
    model = network(config_of(kind))
    with torch.no_grad():
        model(images())
        model(images(size=OTHER))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_parameters_and_batch_norms_alone(kind: str):
    model = used(kind)
    fresh = CoAtNet(config_of(kind))
    assert model.state_dict().keys() == fresh.state_dict().keys()
    parts = ("running_mean", "running_var", "num_batches_tracked")
    want = {name for name, _ in model.named_parameters()} | {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for part in parts
    }
    assert set(model.state_dict()) == want


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 48), OTHER])
def test_every_change_takes_effect_at_once(size: tuple[int, int]):
    """Load, in-place update, cast and copy after use: the answer is that of a network never used."""
    x, model = images(size=size), used()
    other = network(config_of(), seed=9)
    before = model(x)
    assert not torch.equal(before, other(x))

    twin = copy.deepcopy(model)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(x), other(x)), "load_state_dict took no full effect"
    assert torch.equal(twin(x), before), "the copy followed the original"

    table = next(module for module in model.modules() if isinstance(module, RelativeBias)).table
    table.add_(torch.linspace(-1, 1, table.numel()).view_as(table))
    fresh = CoAtNet(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    assert not torch.equal(model(x), other(x)), "an update of a table had no effect"
    assert torch.equal(model(x), fresh(x)), "an update of a table took no full effect"

    model.double()
    assert torch.equal(model(x.double()), fresh.double()(x.double())), "a cast took no full effect"


def test_assigned_state_takes_effect():
    with torch.no_grad():
        model, other = used(), network(config_of(), seed=9)
        model.load_state_dict(other.state_dict(), assign=True)
        assert torch.equal(model(images()), other(images()))


@pytest.mark.parametrize("kind", KINDS)
def test_built_on_meta_it_starts_as_any_other(kind: str):
    """After `to_empty` and `init_weights` nothing is left of whatever the memory held."""
    want = CoAtNet(config_of(kind))
    torch.manual_seed(3)
    want.apply(init_weights)
    with torch.device("meta"):
        model = CoAtNet(config_of(kind))
    assert all(value.is_meta for value in model.state_dict().values())
    model.to_empty(device="cpu")
    for value in model.state_dict().values():
        value.fill_(7)
    torch.manual_seed(3)
    model.apply(init_weights)
    assert_equal(model.state_dict(), want.state_dict())


def test_initial_weights_are_the_references():
    """Normal with deviation 0.02, biases zero, norms the identity."""
    torch.manual_seed(0)
    for name, module in CoAtNet(config_of(widths=(16, 32, 64, 128, 256))).named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight.detach()
            assert weight.mean().abs() < 5 * 0.02 / weight.numel() ** 0.5, name
            assert weight.std().item() == pytest.approx(0.02, rel=4 / (2 * weight.numel()) ** 0.5), name
            assert module.bias is None or not module.bias.any(), name
        elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            assert (module.weight == 1).all(), name
            assert not module.bias.any(), name
        elif isinstance(module, RelativeBias):
            assert 0.01 < module.table.std().item() < 0.03, name


@pytest.mark.parametrize("kind", ["CCTT", "vit_rel"])
def test_new_classifier_leaves_the_rest(kind: str):
    model = network(config_of(kind)).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.reset_classifier(11)
    assert model.config.num_classes == 11
    assert model(images().double()).shape == (2, 11)
    assert model.classifier.weight.dtype == torch.float64
    assert model.classifier.weight.std().item() == pytest.approx(0.02, rel=0.3)
    rest = {name: value for name, value in before.items() if not name.startswith("classifier.")}
    assert_equal({name: model.state_dict()[name] for name in rest}, rest)
    with pytest.raises(ConfigError, match="num_classes is 0"):
        model.reset_classifier(0)
    assert model(images().double()).shape == (2, 11), "a refused call changed the network"


@pytest.mark.parametrize("kind", KINDS)
def test_num_features_is_the_width_of_the_features(kind: str):
    model = network(config_of(kind))
    assert model.forward_features(images()).shape[1] == model.num_features == model.classifier.in_features
