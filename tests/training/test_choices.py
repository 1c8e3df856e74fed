"""What is chosen from data and machine, why, and that whatever the user gives wins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coatnet import zoo
from coatnet.classifier import Classifier
from coatnet.cli import TrainFlags
from coatnet.config import PreprocessingConfig, TrainConfig
from coatnet.data.transforms import Preprocessing
from coatnet.errors import ConfigError, DataError
from coatnet.recipes import RECIPES
from coatnet.training import choices
from coatnet.training.choices import choose_config, differing
from coatnet.training.start import build
from training.tiny import CLASSES, MODEL, write_pictures


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a few pictures of each size in px."""
    root = tmp_path_factory.mktemp("sizes")
    sizes = {"28": (28, 28), "20x40": (20, 40), "30x1000": (30, 1000), "100": (100, 100), "300": (300, 310)}
    return {name: write_pictures(root / name, per_class=3, size=size) for name, size in sizes.items()}


def choose(data: Path, **given: Any) -> tuple[TrainConfig, str]:
    config, reasons = choose_config(str(data), "run", {"device": "cpu", **given})
    return config, "\n".join(reasons)


@pytest.mark.parametrize(
    ("name", "size", "recipe", "why"),
    [
        ("28", (28, 28), "tiny_pictures", "image size 28 px: the pictures are 28 x 28, small enough to keep whole"),
        ("20x40", (20, 40), "tiny_pictures", "image size 20 x 40 px: the pictures are 20 x 40"),
        ("30x1000", (64, 64), "small_scratch", "image size 64 px: the pictures are 30 x 1000 (median)"),
        ("100", (96, 96), "small_scratch", "image size 96 px"),
        ("300", (128, 128), "small_scratch", "image size 128 px: the pictures are 300 x 310 (median), what a cpu"),
    ],
)
def test_size_and_recipe_follow_the_pictures(
    name: str, size: tuple[int, int], recipe: str, why: str, folders: dict[str, Path]
):
    config, reasons = choose(folders[name])
    assert config.model.image_size == config.preprocessing.image_size == size
    assert (config.recipe, config.model.name) == (recipe, "coatnet_nano")
    assert why in reasons
    assert f"recipe {recipe}: " in reasons
    assert "model coatnet_nano: " in reasons
    assert config.model.num_classes == 3


def test_length_follows_the_pictures_that_are_kept(folders: dict[str, Path]):
    config, reasons = choose(folders["28"], train_percent=50.0, holdout_percent=None)
    assert config.train_percent == 50.0
    assert "6 training pictures" in reasons, "half of three a class, rounded to two"


def test_an_accelerator_affords_more(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choices, "find_device", lambda _name: torch.device("mps"))
    config, reasons = choose(folders["300"], device="auto")
    assert (config.model.image_size, config.model.name) == ((224, 224), "coatnet_0")
    assert "device mps: the best at hand" in reasons
    assert config.num_workers > 0
    assert f"{config.num_workers} workers: pictures are read while the mps computes" in reasons


def test_a_numbered_device_stays_the_one(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choices, "find_device", torch.device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    config, reasons = choose(folders["28"], device="cuda:1")
    assert config.device == "cuda:1"
    assert config.precision == "bf16"
    assert "device" not in reasons, "it was not chosen"
    assert "precision bf16: this GPU computes in it" in reasons


class Many:
    """So many pictures, without the pictures."""

    def __init__(self, num: int) -> None:
        self.num = num
        self.train, self.val, self.class_names = self, None, CLASSES

    def __len__(self) -> int:
        return self.num

    def size(self, _index: int) -> tuple[int, int]:
        return (100, 100)


@pytest.mark.parametrize(
    ("num_images", "epochs", "batch"), [(60, 100, 16), (4_000, 100, 128), (60_000, 20, 128), (1_000_000, 15, 128)]
)
def test_length_follows_the_amount(
    num_images: int, epochs: float, batch: int, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    """As an accelerator affords it."""
    monkeypatch.setattr(choices, "open_data", lambda *_a, **_k: Many(num_images))
    monkeypatch.setattr(choices, "find_device", lambda _name: torch.device("mps"))
    config, reasons = choose(folders["100"])
    assert (config.num_epochs, config.global_batch_size) == (epochs, batch)
    steps = round(epochs * num_images / batch)
    assert f"{epochs} epochs: {num_images} training pictures, {steps} updates" in reasons
    assert f"batch {batch}: " in reasons
    assert config.optimizer.warmup_steps <= steps // 10
    assert config.evaluation_interval_epochs == max(1, epochs // 25)


def test_a_cpu_takes_fewer_epochs_of_larger_pictures(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choices, "open_data", lambda *_a, **_k: Many(10_000))
    epochs = [choose(folders["100"], image_size=(px, px))[0].num_epochs for px in (32, 64, 128, 512)]
    assert epochs == sorted(epochs, reverse=True)
    assert epochs[0] > epochs[-1] == choices.EPOCHS[0]


def test_warm_up_fits_the_epochs_that_were_given(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    """A single epoch of a recipe made for a hundred must not be warm-up alone."""
    monkeypatch.setattr(choices, "open_data", lambda *_a, **_k: Many(1000))
    config, _ = choose(folders["100"], num_epochs=1.0, global_batch_size=10)
    assert config.optimizer.warmup_steps == 10


def test_warm_up_in_epochs_counts_the_batch_that_was_given(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choices, "open_data", lambda *_a, **_k: Many(1000))
    config, _ = choose(folders["100"], recipe="imagenet_21k", model="coatnet_2", global_batch_size=100)
    assert config.optimizer.warmup_steps == 5 * 1000 / 100


def test_a_papers_recipe_is_taken_as_it_is(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choices, "open_data", lambda *_a, **_k: Many(1_281_167))
    config, _ = choose(folders["100"], recipe="imagenet_1k", model="coatnet_1")
    assert (config.num_epochs, config.global_batch_size, config.optimizer.warmup_steps) == (300, 4096, 10_000)
    assert config.model.stochastic_depth_rate == 0.3


def test_a_papers_warm_up_is_cut_where_it_would_be_the_whole_run(folders: dict[str, Path]):
    config, reasons = choose(
        folders["100"], recipe="imagenet_1k", model="coatnet_1", global_batch_size=1, num_epochs=30
    )
    assert config.optimizer.warmup_steps < 300, config.optimizer.warmup_steps
    assert "not the recipe's 10000" in reasons


def test_frozen_random_weights_are_told_of(folders: dict[str, Path]):
    assert "freeze S2 without --init" in choose(folders["28"], freeze="S2")[1]


def test_fine_tuning_takes_the_network_of_its_source(folders: dict[str, Path], tmp_path: Path):
    source = replace(MODEL, layout="CTTT", num_classes=2)
    preprocessing = Preprocessing(PreprocessingConfig(image_size=MODEL.image_size))
    Classifier(network=build(source, 0), preprocessing=preprocessing, labels=("a", "b")).save(tmp_path / "model")
    config, reasons = choose(folders["28"], init=str(tmp_path))
    assert config.model == replace(source, num_classes=3, image_size=(28, 28))
    assert config.recipe == "tiny_finetune"
    assert f"model tiny: that of {tmp_path}" in reasons
    assert "recipe tiny_finetune: starting from a trained model" in reasons
    named, _ = choose(folders["28"], init=str(tmp_path), model="coatnet_pico")
    assert named.model.name == "coatnet_pico", "what the user names wins"


def test_given_settings_of_any_part_are_set(folders: dict[str, Path]):
    given = {"crop": "resize", "beta2": 0.95, "layout": "CTTT", "loss": "sigmoid", "min_lr": 1e-7, "peak_lr": 1e-6}
    config, _ = choose(folders["28"], **given)
    assert config.augment.crop == "resize"
    assert (config.optimizer.beta2, config.optimizer.min_lr, config.optimizer.peak_lr) == (0.95, 1e-7, 1e-6)
    assert (config.model.layout, config.loss) == ("CTTT", "sigmoid")


def test_none_turns_off(folders: dict[str, Path]):
    off = {"ema_decay": None, "mixup_alpha": None, "holdout_percent": None, "max_grad_norm": None}
    config, _ = choose(folders["28"], recipe="imagenet_1k", **off)
    assert (config.ema_decay, config.augment.mixup_alpha, config.holdout_percent) == (None, None, None)
    assert config.optimizer.max_grad_norm is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"peek_lr": 1.0}, "There is no setting 'peek_lr'. Did you mean 'peak_lr'?"),
        ({"to_dict": 1}, "There is no setting 'to_dict'. There are "),
        ({"augment": 1}, "There is no setting 'augment'"),
        ({"model": "coatnet_O"}, "There is no model 'coatnet_O'. Did you mean 'coatnet_"),
        ({"recipe": "smal_scratch"}, "Did you mean 'small_scratch'?"),
        ({"device": "tpu"}, "There is no device 'tpu'"),
        ({"device": "meta"}, "Device 'meta' is not at hand here. There is: cpu"),
    ],
)
def test_unknown_settings_are_told_the_nearest(given: dict[str, Any], message: str, folders: dict[str, Path]):
    with pytest.raises(ConfigError) as refusal:
        choose(folders["28"], **given)
    assert message in str(refusal.value)


def test_no_data_no_choice(tmp_path: Path):
    with pytest.raises(DataError, match="is not there"):
        choose(tmp_path / "absent")


FLAGS: dict[str, tuple[Any, str, Any]] = {  # flag: what is typed, where it ends, as what
    "model": ("coatnet_pico", "model.name", "coatnet_pico"),
    "recipe": ("small_scratch", "recipe", "small_scratch"),
    "image_size": ("24x32", "model.image_size", (24, 32)),
    "epochs": (7.5, "num_epochs", 7.5),
    "max_time": ("1.5h", "max_time_s", 5400.0),
    "batch_size": (10, "global_batch_size", 10),
    "microbatch_size": (6, "microbatch_size", 6),
    "peak_lr": (1e-6, "optimizer.peak_lr", 1e-6),
    "weight_decay": (0.125, "optimizer.weight_decay", 0.125),
    "label_smoothing": (0.25, "label_smoothing", 0.25),
    "stochastic_depth": (0.375, "model.stochastic_depth_rate", 0.375),
    "flip_rate": (0.0, "augment.flip_rate", 0.0),
    "erase_rate": (0.125, "augment.erase_rate", 0.125),
    "mixup": (0.7, "augment.mixup_alpha", 0.7),
    "cutmix": (0.9, "augment.cutmix_alpha", 0.9),
    "mix_share": (0.625, "augment.mix_share", 0.625),
    "ema_decay": (0.75, "ema_decay", 0.75),
    "holdout": (25.0, "holdout_percent", 25.0),
    "patience": (3, "patience_epochs", 3),
    "init": ("weights.safetensors", "init", "weights.safetensors"),
    "freeze": ("S2", "freeze", "S2"),
    "precision": ("bf16", "precision", "bf16"),
    "compile": (True, "compile", True),
    "activation_checkpointing": (True, "activation_checkpointing", True),
    "shard": (True, "shard", True),
    "sync_batch_norm": (True, "sync_batch_norm", True),
    "device": ("cpu", "device", "cpu"),
    "workers": (3, "num_workers", 3),
    "checkpoint_every": ("2m", "checkpoint_interval_s", 120.0),
    "keep_last": (5, "keep_last", 5),
    "keep_best": (True, "keep_best", True),
    "keep_every": (4, "keep_every", 4),
    "on_bad_image": ("stop", "on_bad_image", "stop"),
    "seed": (99, "seed", 99),
}
BESIDE: dict[str, dict[str, Any]] = {"shard": {"recipe": "small_scratch"}}  # what else has to be given
OFF = ("mixup", "cutmix", "ema_decay", "holdout")


def at(config: TrainConfig, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def test_every_flag_is_in_the_table():
    assert set(FLAGS) == set(TrainFlags.__dataclass_fields__)


@pytest.mark.parametrize("flag", FLAGS)
def test_what_is_typed_reaches_the_config(flag: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # on whatever machine this runs
    typed, path, want = FLAGS[flag]
    beside = BESIDE.get(flag, {})
    usual, _ = choose_config(str(folders["28"]), "run", dict(beside))
    config, _ = choose_config(str(folders["28"]), "run", beside | TrainFlags(**{flag: typed}).settings())
    assert at(config, path) == want
    assert flag == "device" or at(usual, path) != want, "else the table shows nothing"


@pytest.mark.parametrize("flag", OFF)
def test_zero_turns_off(flag: str, folders: dict[str, Path]):
    given = TrainFlags(recipe="imagenet_1k", **{flag: 0.0}).settings()
    config, _ = choose_config(str(folders["28"]), "run", given)
    assert at(config, FLAGS[flag][1]) is None


@pytest.mark.parametrize("flag", FLAGS)
def test_what_differs_from_a_run_is_named(flag: str, folders: dict[str, Path]):
    usual, _ = choose_config(str(folders["28"]), "run", {"device": "cpu", **BESIDE.get(flag, {})})
    given = TrainFlags(**{flag: FLAGS[flag][0]}).settings()
    assert differing(usual, {"seed": 0, "device": "auto", "model": usual.model.name}) == []
    assert differing(usual, given) == ([] if flag == "device" else list(given)) or FLAGS[flag][2] == at(
        usual, FLAGS[flag][1]
    )


def test_a_low_peak_takes_its_end_along(folders: dict[str, Path]):
    config, _ = choose(folders["28"], peak_lr=1e-7)
    assert config.optimizer.min_lr == 1e-7
    config, _ = choose(folders["28"], peak_lr=0.1)
    assert config.optimizer.min_lr == 1e-5


def test_the_networks_are_those_of_the_zoo(folders: dict[str, Path]):
    config, _ = choose(folders["28"], model="coatnet_tiny")
    want = replace(zoo.find("coatnet_tiny").config, num_classes=3, image_size=(28, 28))
    assert config.model == want


def test_the_rate_follows_the_batch_by_its_square_root(folders: dict[str, Path]):
    own = RECIPES["tiny_pictures"]
    for share in (0.25, 1, 4):
        config, reasons = choose(folders["28"], global_batch_size=int(own.global_batch_size * share))
        assert config.optimizer.peak_lr == pytest.approx(own.optimizer.peak_lr * share**0.5, rel=0.02)
        assert ("peak rate" in "".join(reasons)) == (share != 1)
    config, _ = choose(folders["28"])
    assert config.global_batch_size < own.global_batch_size, "halved for a small set"
    share = config.global_batch_size / own.global_batch_size
    assert config.optimizer.peak_lr == pytest.approx(own.optimizer.peak_lr * share**0.5, rel=0.05)
    config, _ = choose(folders["28"], global_batch_size=16, peak_lr=0.004)
    assert config.optimizer.peak_lr == 0.004, "what is given is never overruled"
    config, _ = choose(folders["28"], global_batch_size=16, recipe="imagenet_1k", model="coatnet_0")
    assert config.optimizer.peak_lr == 1e-3, "the paper's recipes stay as they are"
