"""The classifier as its users meet it: saved, damaged, loaded, and asked about every kind of picture."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from coatnet.classifier import FORMAT, Classifier, load
from coatnet.config import ModelConfig, PreprocessingConfig
from coatnet.data.transforms import Preprocessing
from coatnet.errors import BadImageError, ConfigError, DataError, ModelFileError
from coatnet.files import MANIFEST, new_folder, read_json, write_json
from coatnet.model.network import CoAtNet

LABELS = ("cat", "dog", "owl")
MODEL = ModelConfig(
    depths=(1, 1, 1, 1, 1),
    widths=(4, 4, 4, 8, 8),
    head_dim=4,
    image_size=(32, 32),
    num_classes=3,
    stochastic_depth_rate=0.5,
)


def make_classifier(loss: Any = "softmax", mean: tuple[float, ...] = (0.5, 0.5, 0.5)) -> Classifier:
    torch.manual_seed(0)
    network = CoAtNet(dataclasses.replace(MODEL, in_channels=len(mean))).eval()
    preprocessing = Preprocessing(PreprocessingConfig(image_size=(32, 32), mean=mean, std=(0.25,) * len(mean)))
    return Classifier(network=network, preprocessing=preprocessing, labels=LABELS, loss=loss)


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return make_classifier()


@pytest.fixture
def saved(classifier: Classifier, tmp_path: Path) -> Path:
    classifier.save(tmp_path / "model", extra={"top1_percent": 91.5})
    return tmp_path / "model"


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def batch() -> torch.Tensor:
    return torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------------------------------------- save and load


def test_a_saved_classifier_comes_back_with_equal_bits(classifier: Classifier, saved: Path, batch: torch.Tensor):
    again = load(saved)
    assert torch.equal(again.logits(batch), classifier.logits(batch))
    assert again.labels == LABELS
    assert again.loss == "softmax"
    assert again.network.config == classifier.network.config
    assert again.preprocessing.config == classifier.preprocessing.config
    assert not again.network.training


def test_a_run_folder_gives_its_model(saved: Path, batch: torch.Tensor):
    assert torch.equal(load(str(saved.parent)).logits(batch), load(saved).logits(batch))


def test_sigmoid_and_grey_are_kept(tmp_path: Path):
    make_classifier("sigmoid", mean=(0.5,)).save(tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.loss == "sigmoid"
    assert again.preprocessing.config.mean == (0.5,)


def test_the_folder_holds_what_it_says(saved: Path):
    assert sorted(file.name for file in saved.iterdir()) == [MANIFEST, "model.json", "model.safetensors"]
    card = read_json(saved / "model.json")
    assert card["format"] == FORMAT
    assert card["labels"] == list(LABELS)
    assert card["extra"] == {"top1_percent": 91.5}
    assert set(card["versions"]) == {"coatnet", "torch", "python"}
    weights = load_file(saved / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float32}


def test_low_precision_weights_are_saved_as_float32(classifier: Classifier, tmp_path: Path):
    low = make_classifier()
    low.network.to(torch.bfloat16)
    low.save(tmp_path / "model")
    want = classifier.network.classifier.weight.bfloat16().float()
    assert torch.equal(load(tmp_path / "model").network.classifier.weight, want)


def test_loading_draws_no_random_numbers(saved: Path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load(saved)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors", MANIFEST])
def test_any_flipped_bit_is_noticed_before_a_weight_is_used(saved: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("coatnet.classifier.read_safetensors", lambda _: pytest.fail("a weight was read"))
    whole = (saved / name).read_bytes()
    for place in np.random.default_rng(0).choice(8 * len(whole), 100, replace=False).tolist():
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        (saved / name).write_bytes(damaged)
        with pytest.raises(ModelFileError):
            load(saved)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_a_truncated_file_is_damaged(saved: Path, name: str):
    whole = (saved / name).read_bytes()
    (saved / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelFileError, match=rf"{name} is damaged .*Copy the folder again"):
        load(saved)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors", MANIFEST])
def test_a_missing_file_is_named(saved: Path, name: str):
    (saved / name).unlink()
    with pytest.raises(ModelFileError, match=rf"{name} is (missing|not there)"):
        load(saved)


def test_a_path_without_a_model_is_told_what_a_run_folder_holds(tmp_path: Path):
    (tmp_path / "file.txt").write_text("x")
    for path, met in (
        (tmp_path / "none", "is not there"),
        (tmp_path, "holds no model"),
        (tmp_path / "file.txt", "is no folder"),
    ):
        with pytest.raises(
            ModelFileError, match=rf"{met}\. Give the run folder .* which holds model/ and report\.html"
        ):
            load(path)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change model.json as somebody would who also renews the manifest."""
    card = read_json(folder / "model.json")
    weights = (folder / "model.safetensors").read_bytes()
    change(card)
    with new_folder(folder) as aside:
        write_json(aside / "model.json", card)
        (aside / "model.safetensors").write_bytes(weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda card: card.update(format=FORMAT + 1), rf"has format {FORMAT + 1}.* reads up to {FORMAT}\. Upgrade"),
        (lambda card: card.pop("format"), "no model card of coatnet"),
        (lambda card: card["labels"].pop(), "2 labels, 2 of them different, for a network of 3 classes"),
        (lambda card: card.update(labels=["cat", "cat", "owl"]), "3 labels, 2 of them different"),
        (lambda card: card.update(loss="hinge"), "loss is 'hinge'. It must be one of softmax, sigmoid"),
        (lambda card: card.pop("preprocessing"), "lacks 'preprocessing'"),
        (lambda card: card["model"].update(colour=1), "ModelConfig has no field 'colour'"),
        (lambda card: card["model"].update(in_channels=1), "gives 3 channels, the network takes 1"),
        (
            lambda card: card["model"].update(widths=[4, 4, 4, 8, 16]),
            r"tensors do not fit[^\n]*\n  s4\.\S+: file has none, model \([\d, ]*\)\.\n  Take both files from the same",
        ),
        (
            lambda card: card.update(model={**card["model"], "num_classes": 2}, labels=["cat", "dog"]),
            r": 2 of \d+ tensors .*\n  classifier\.weight: file \(3, 8\), model \(2, 8\)",
        ),
        (lambda card: card.update(labels=["cat", "dog", 3]), "labels holds 3"),
        (lambda card: card["model"].update(depths=[1, 1, 2, 1, 1]), r"s2\.1\S+: file has none, model \("),
    ],
)
def test_a_card_that_does_not_fit(saved: Path, change: Callable[[dict[str, Any]], object], message: str):
    rewrite(saved, change)
    with pytest.raises(ModelFileError, match=message):
        load(saved)


def test_weights_that_are_no_safetensors_are_never_unpickled(saved: Path):
    card = read_json(saved / "model.json")
    with new_folder(saved) as aside:
        write_json(aside / "model.json", card)
        torch.save({"weight": torch.zeros(1)}, aside / "model.safetensors")
    with pytest.raises(ModelFileError, match="cannot be read as safetensors"):
        load(saved)


def test_a_tensor_too_many_is_named(saved: Path):
    card, weights = read_json(saved / "model.json"), load_file(saved / "model.safetensors")
    with new_folder(saved) as aside:
        write_json(aside / "model.json", card)
        save_file({**weights, "stranger": torch.zeros(2)}, aside / "model.safetensors")
    with pytest.raises(ModelFileError, match=r"stranger: file \(2,\), model has none"):
        load(saved)


def test_saving_again_replaces_the_folder_whole(classifier: Classifier, saved: Path):
    (saved / "old.txt").write_text("left behind")
    classifier.save(saved)
    assert not (saved / "old.txt").exists()
    load(saved)


def test_a_copied_folder_loads_elsewhere(saved: Path, tmp_path: Path):
    shutil.copytree(saved, tmp_path / "elsewhere")
    load(tmp_path / "elsewhere")


# ---------------------------------------------------------------------------------------------------------- predict


def test_path_pil_and_array_of_one_picture_are_one_picture(classifier: Classifier, pixels: np.ndarray, tmp_path: Path):
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).save(path)
    with Image.open(path) as opened:
        answers = classifier.predict([path, str(path), opened, Image.fromarray(pixels), pixels])
    assert all(answer == answers[0] for answer in answers)
    assert sorted(label for label, _ in answers[0]) == sorted(LABELS)
    probabilities = [prediction.probability for prediction in answers[0]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1)


def test_one_picture_gives_a_list_of_one(classifier: Classifier, pixels: np.ndarray):
    assert classifier.predict(pixels) == classifier.predict([pixels])
    assert classifier.predict([]) == []


def test_all_shapes_of_grey_are_one_picture(classifier: Classifier, pixels: np.ndarray):
    grey = pixels[:, :, 0]
    shapes = [grey, grey[:, :, None], np.repeat(grey[:, :, None], 3, axis=2), Image.fromarray(grey)]
    answers = classifier.predict(shapes)
    assert all(answer == answers[0] for answer in answers)


def test_transparency_is_white_in_arrays_pil_images_and_files(
    classifier: Classifier, pixels: np.ndarray, tmp_path: Path
):
    hidden = np.dstack([pixels, np.zeros(pixels.shape[:2], dtype=np.uint8)])
    Image.fromarray(hidden).save(tmp_path / "hidden.png")
    answers = classifier.predict([np.full_like(pixels, 255), hidden, Image.fromarray(hidden), tmp_path / "hidden.png"])
    assert all(answer == answers[0] for answer in answers)


def test_pil_images_follow_the_rules_of_files(classifier: Classifier, pixels: np.ndarray, tmp_path: Path):
    """Orientation, 16 bits of grey, palettes and print colours come out as they do from a file."""
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=turned)
    Image.fromarray(np.linspace(0, 65535, 40 * 50).reshape(40, 50).astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(pixels).quantize(16).save(tmp_path / "palette.png", transparency=3)
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "print.jpg")
    for path in sorted(tmp_path.iterdir()):
        with Image.open(path) as opened:
            assert classifier.predict(opened) == classifier.predict(path), path.name


def test_k_is_cut_to_the_number_of_classes(classifier: Classifier, pixels: np.ndarray):
    assert len(classifier.predict(pixels, k=2)[0]) == 2
    assert len(classifier.predict(pixels, k=100)[0]) == 3
    with pytest.raises(ConfigError, match="k is 0"):
        classifier.predict(pixels, k=0)


def test_batches_change_no_label(classifier: Classifier, batch: torch.Tensor):
    pictures = [image.permute(1, 2, 0).numpy().copy() for image in batch]
    one_by_one = classifier.predict(iter(pictures), batch_size=1)
    together = classifier.predict(pictures, batch_size=3)
    for alone, along in zip(one_by_one, together, strict=True):
        assert [p.label for p in alone] == [p.label for p in along]
        assert [p.probability for p in alone] == pytest.approx([p.probability for p in along], abs=1e-5)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((4, 4, 3), dtype=np.float32), r"shape \(4, 4, 3\) and type float32 is no picture"),
        (np.zeros((4, 4, 5), dtype=np.uint8), r"shape \(4, 4, 5\)"),
        (np.zeros((2, 4, 4, 3), dtype=np.uint8), "for several pictures a list"),
        (np.zeros((0, 4, 3), dtype=np.uint8), "is no picture"),
        ([3.5], "A float is no picture"),
        ([b"bytes"], "A bytes is no picture"),
    ],
)
def test_what_is_no_picture_is_told_so(classifier: Classifier, picture: Any, message: str):
    with pytest.raises(DataError, match=message):
        classifier.predict(picture)


def test_files_that_cannot_be_read(classifier: Classifier, pixels: np.ndarray, tmp_path: Path):
    (tmp_path / "text.jpg").write_text("no picture")
    Image.fromarray(pixels).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
    for path in (tmp_path / "none.jpg", tmp_path / "text.jpg", tmp_path / "cut.png"):
        with pytest.raises(BadImageError, match=path.name):
            classifier.predict(path)
    with Image.open(tmp_path / "cut.png") as opened, pytest.raises(BadImageError, match="cannot be decoded"):
        classifier.predict(opened)


def test_sigmoid_probabilities_are_independent(batch: torch.Tensor):
    classifier = make_classifier("sigmoid")
    torch.testing.assert_close(classifier.probabilities(batch), classifier.logits(batch).sigmoid())


def test_a_network_in_training_answers_as_in_evaluation_and_stays_in_training(batch: torch.Tensor):
    """Stochastic depth and batch statistics are off; what was frozen stays frozen."""
    classifier = make_classifier()
    want = classifier.logits(batch)
    state = {name: tensor.clone() for name, tensor in classifier.network.state_dict().items()}
    classifier.network.train()
    classifier.network.s0.eval()
    modes = [module.training for module in classifier.network.modules()]
    assert torch.equal(classifier.logits(batch), want)
    assert [module.training for module in classifier.network.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in classifier.network.state_dict().items())


def test_the_card_is_plain_json(saved: Path):
    assert json.loads((saved / "model.json").read_text())["model"]["image_size"] == [32, 32]


@pytest.mark.parametrize("count", [0, 1, 16, 17, 40])
def test_pictures_in_any_number_are_answered_each_for_itself(classifier: Classifier, count: int):
    """More than a processor takes at once go through the network in parts."""
    pictures = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    found = classifier.logits(pictures)
    assert found.shape == (count, 3)
    for picture, logits in zip(pictures, found, strict=True):
        torch.testing.assert_close(logits, classifier.logits(picture[None])[0], rtol=1e-4, atol=1e-5)


def test_memory_for_many_pictures_is_that_for_a_few(saved: Path):
    """2,000 pictures of 160 px in one batch: at once they would take 1.9 GiB."""
    code = f"""
import resource, torch
from coatnet.classifier import load
torch.set_num_threads(1)
classifier = load({str(saved)!r})
pictures = torch.zeros(2000, 3, 160, 160, dtype=torch.uint8)
classifier.logits(pictures[:40])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
classifier.logits(pictures)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(said) < 250 * 1024, f"{int(said) / 1024:.0f} MiB more for 2,000 pictures than for 40"
