"""Where a run begins: seeds, other networks' weights, other classes and sizes, and what is frozen."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from coatnet.classifier import Classifier, load
from coatnet.config import PreprocessingConfig
from coatnet.data.transforms import Preprocessing
from coatnet.errors import ModelFileError
from coatnet.model.network import CoAtNet
from coatnet.training import start
from coatnet.training.loop import train
from model.networks import assert_equal
from training.tiny import MODEL, config_of, history_of

TABLES = [name for name in CoAtNet(MODEL).state_dict() if name.endswith("bias.table")]


def state_of(network: CoAtNet) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


LABELS = ("bird", "fish", "frog")


@pytest.fixture
def source() -> CoAtNet:
    return start.build(MODEL, seed=11)


@pytest.fixture
def model_folder(source: CoAtNet, tmp_path: Path) -> Path:
    preprocessing = Preprocessing(PreprocessingConfig(image_size=MODEL.image_size))
    classifier = Classifier(network=source, preprocessing=preprocessing, labels=LABELS)
    classifier.save(tmp_path / "run" / "model")
    return tmp_path / "run" / "model"


def test_weights_follow_from_the_seed_and_leave_torchs_generator_alone():
    torch.manual_seed(1)
    want = torch.rand(3)
    torch.manual_seed(1)
    one, same, other = (start.build(MODEL, seed) for seed in (5, 5, 6))
    assert torch.equal(torch.rand(3), want)
    assert_equal(state_of(one), state_of(same))
    assert not torch.equal(one.classifier.weight, other.classifier.weight)


@pytest.mark.parametrize("place", ["run folder", "model folder", "safetensors file"])
def test_initialise_takes_the_weights(place: str, source: CoAtNet, model_folder: Path):
    path = {
        "run folder": model_folder.parent,
        "model folder": model_folder,
        "safetensors file": model_folder / "model.safetensors",
    }[place]
    network = start.build(MODEL, seed=12)
    assert start.initialise(network, path, LABELS) == []
    assert_equal(state_of(network), state_of(source))


def test_other_classes_get_a_new_classifier(source: CoAtNet, model_folder: Path):
    network = start.build(replace(MODEL, num_classes=5), seed=12)
    fresh = network.classifier.weight.clone()
    assert start.initialise(network, model_folder, ("a", "b", "c", "d", "e")) == [
        "the classifier starts anew: 5 classes"
    ]
    assert torch.equal(network.classifier.weight, fresh)
    rest = {name: tensor for name, tensor in state_of(network).items() if not name.startswith("classifier")}
    assert_equal(rest, {name: state_of(source)[name] for name in rest})


def test_a_listing_trains_loads_and_starts_another(pictures: Path, tmp_path: Path):
    """Two updates, a run folder and back, the fast form, other classes and sizes; the classifier has no bias."""
    listing = replace(MODEL, blocks="listing", head="plain", head_dim=32, widths=(8, 8, 12, 18, 18))
    train(config_of(pictures, tmp_path / "run", model=listing, num_epochs=0.5, precision="bf16"))
    assert history_of(tmp_path / "run")[-1]["step"] == 2
    trained = load(tmp_path / "run")
    assert trained.network.config == listing
    x = torch.randint(0, 256, (3, 3, *MODEL.image_size), dtype=torch.uint8)
    want = trained.logits(x)
    trained.optimize()
    torch.testing.assert_close(trained.logits(x), want, rtol=1e-4, atol=1e-4)

    network = start.build(replace(listing, num_classes=5, image_size=(48, 40)), seed=12)
    notes = start.initialise(network, tmp_path / "run", tuple("abcde"))
    assert notes == ["the classifier starts anew: 5 classes", "2 bias tables were interpolated to (48, 40) px"]
    assert torch.equal(network.s1[0].expand.weight, trained.network.s1[0].expand.weight)
    network.reset_classifier(7)
    assert network.classifier.bias is None
    assert network(torch.zeros(1, 3, 31, 50)).shape == (1, 7)


@pytest.mark.parametrize("labels", [("bird", "fish", "newt"), ("frog", "fish", "bird")])
def test_as_many_classes_of_other_names_get_a_new_classifier_too(labels: tuple[str, ...], model_folder: Path):
    network = start.build(MODEL, seed=12)
    fresh = network.classifier.weight.clone()
    assert start.initialise(network, model_folder, labels) == ["the classifier starts anew: 3 classes"]
    assert torch.equal(network.classifier.weight, fresh)


@pytest.mark.parametrize("size", [(48, 48), (8, 8), (24, 40)])
def test_other_size_gets_interpolated_tables(size: tuple[int, int], source: CoAtNet, model_folder: Path):
    network = start.build(replace(MODEL, image_size=size), seed=12)
    (note,) = start.initialise(network, model_folder, LABELS)
    assert note == f"{len(TABLES)} bias tables were interpolated to {size} px"
    for name in TABLES:
        found, old = network.state_dict()[name], source.state_dict()[name]
        want = F.interpolate(old.double()[None], size=found.shape[1:], mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-6, msg=f"{name} is off")
    rest = {name: tensor for name, tensor in state_of(network).items() if name not in TABLES}
    assert_equal(rest, {name: state_of(source)[name] for name in rest})


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        ({"depths": (1, 2, 1, 1, 1)}, "s1.1."),
        ({"widths": (8, 8, 16, 32, 64)}, "s4.0."),
        ({"layout": "CCCT"}, "s3.0."),
        ({"mbconv_norm": "layer"}, "s1.0."),
    ],
)
def test_another_network_is_refused_by_its_first_tensor(change: dict, tensor: str, model_folder: Path):
    network = start.build(replace(MODEL, **change), seed=12)
    before = state_of(network)
    with pytest.raises(ModelFileError, match=r"tensors are of another network\. ") as refusal:
        start.initialise(network, model_folder, LABELS)
    assert tensor in str(refusal.value)
    assert "Give --model" in str(refusal.value)
    assert_equal(state_of(network), before)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone", None, "is no run, model folder, .safetensors or .pt file"),
        ("weights.bin", b"x", "is no run, model folder, .safetensors or .pt file"),
        ("gone.safetensors", None, "cannot be read"),
        ("broken.safetensors", b"12345678{]", "cannot be read"),
    ],
)
def test_what_holds_no_weights_is_refused(name: str, content: bytes | None, message: str, tmp_path: Path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelFileError, match=re.escape(message)):
        start.read_weights(tmp_path / name)


def test_an_empty_folder_is_refused(tmp_path: Path):
    with pytest.raises(ModelFileError, match="holds no model"):
        start.read_weights(tmp_path)


def test_half_precision_weights_are_taken(source: CoAtNet, tmp_path: Path):
    save_file({name: t.half() for name, t in state_of(source).items()}, tmp_path / "half.safetensors")
    network = start.build(replace(MODEL, image_size=(32, 32)), seed=12)
    start.initialise(network, tmp_path / "half.safetensors", LABELS)
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert torch.equal(network.classifier.weight, source.classifier.weight.half().float())


@pytest.mark.parametrize("stage", ["S0", "S2", "S4"])
def test_frozen_stages_stand_still_and_the_others_move(stage: str, pictures: Path, tmp_path: Path):
    """Weights and BatchNorm statistics up to the stage, in the network and in its average, bit for bit."""
    config = config_of(pictures, tmp_path / "run", freeze=stage, num_epochs=0.7)
    before = state_of(start.build(config.model, config.seed))
    train(config)
    frozen = tuple(f"s{number}." for number in range(int(stage[1]) + 1))
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    for file in ("network.safetensors", "ema.safetensors"):
        after = load_file(newest / file)
        for name, tensor in before.items():
            if name.startswith(frozen):
                assert torch.equal(after[name], tensor), f"{file}: {name} moved"
            elif not (file.startswith("ema") and "num_batches" in name) and not _is_key_bias(name):
                assert not torch.equal(after[name], tensor), f"{file}: {name} stood still"


def _is_key_bias(name: str) -> bool:
    """Return whether a tensor may stand still: softmax leaves the keys' bias no gradient, or next to none."""
    return name.endswith(("qkv.bias", "key.bias"))


def test_fine_tuning_starts_from_the_run(model_folder: Path, source: CoAtNet, pictures: Path, tmp_path: Path):
    """Frozen whole, what the run leaves are the weights that it was given."""
    heard: list[str] = []
    config = config_of(pictures, tmp_path / "tuned", init=str(model_folder.parent), freeze="S4", num_epochs=0.3)
    train(config, progress=lambda tick: heard.append(tick.message or ""))
    found = load_file(tmp_path / "tuned" / "model" / "model.safetensors")
    stages = {name: tensor for name, tensor in state_of(source).items() if name.startswith("s")}
    assert_equal({name: found[name] for name in stages}, stages)
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["init"] == str(model_folder.parent)


def test_a_resumed_run_needs_its_source_no_more(model_folder: Path, pictures: Path, tmp_path: Path):
    config = config_of(pictures, tmp_path / "tuned", init=str(model_folder.parent), checkpoint_interval_s=1e-9)

    def stop_at_three(tick):
        if tick.step == 3:
            raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError, match="plug"):
        train(config, progress=stop_at_three)
    for file in model_folder.iterdir():
        file.unlink()
    assert train(config, start="resume").summary is not None
