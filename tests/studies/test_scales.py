"""The rows of the scales: networks matched as Figure 1 wants them, and claims that speak of what is trained."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coatnet.layout import count
from coatnet.studies.catalogue import STUDIES
from coatnet.studies.cost import images_seen
from coatnet.studies.lineage import STUDY as LINEAGE
from coatnet.studies.scales import SCALES, Scale, known_num_images, moved
from coatnet.studies.study import Study, chain

SCALED = pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
CLASSES = {"toy": (10,), "small": (10, 47), "medium": (10, 47), "paper": (1000,)}


@pytest.mark.parametrize("name", ["small", "medium", "paper"])  # at toy's 8 px the grids are too coarse for that
def test_the_five_layouts_are_matched(name: str):
    models = [training.config.model for training in STUDIES["generalisation"].trainings(SCALES[name])]
    for num_classes in CLASSES[name]:
        counts = [count(replace(model, num_classes=num_classes)) for model in models]
        params, macs = [found.num_params for found in counts], [found.gmacs for found in counts]
        spread = max(params) / min(params), max(macs) / min(macs)
        assert spread[0] <= 1.05, f"{num_classes} classes: parameters differ by {spread[0]:.3f}"
        assert spread[1] <= 1.15, f"{num_classes} classes: multiply-adds differ by {spread[1]:.3f}"


@SCALED
def test_the_layouts_are_what_their_names_say(scale: Scale):
    found = {name: model.layout for name, model in scale.networks.items()}
    assert found == {**{name: name for name in ("CCCC", "CCCT", "CCTT", "CTTT")}, "ViT_rel": "vit_rel"}


@SCALED
def test_the_listing_has_the_parameters_of_the_usual_network(scale: Scale):
    num_classes = CLASSES[scale.name][0]
    params = [
        count(replace(training.config.model, num_classes=num_classes)).num_params
        for training in LINEAGE.trainings(scale)
    ]
    assert max(params) / min(params) <= 1.05, f"{scale.name}: {params}"


@SCALED
@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_a_study_trains_what_its_claims_speak_of(study: Study, scale: Scale):
    trainings = study.trainings(scale)
    there = {(training.row, training.setting) for training in trainings}
    assert len(there) == len(trainings), "two trainings have one name"
    for claim in study.claims(scale):
        assert {(claim.first, claim.setting), (claim.second, claim.setting)} <= there, claim
    for training in trainings:
        assert training.after is None or (training.row, training.after) in there, training.setting


@SCALED
@pytest.mark.parametrize("name", ["generalisation", "capacity"])
def test_figure_1_is_trained_without_augmentation_and_regularisation(name: str, scale: Scale):
    for training in STUDIES[name].trainings(scale):
        config = training.config
        assert (config.augment.crop, config.augment.flip_rate, config.augment.randaugment_ops) == ("resize", 0, 0)
        assert not config.augment.mixes
        assert (config.optimizer.weight_decay, config.label_smoothing, config.ema_decay) == (0, 0, None)
        assert config.model.stochastic_depth_rate == 0


def test_every_amount_of_data_makes_the_same_number_of_updates():
    trainings = STUDIES["data-scale"].trainings(SCALES["small"])
    seen = {training.config.num_epochs * (training.config.train_percent or 100) for training in trainings}
    assert max(seen) == pytest.approx(min(seen)), seen


def test_all_data_is_the_training_of_the_study_of_capacity():
    """So that the two share their runs."""
    small = SCALES["small"]
    whole = {training.config for training in STUDIES["data-scale"].trainings(small) if training.setting == "100 %"}
    assert whole <= {training.config for training in STUDIES["capacity"].trainings(small)}


def test_own_pictures_take_the_place_of_the_scales():
    scale = SCALES["small"].on("PICTURES", 2_000)
    for study in STUDIES.values():
        trainings = study.trainings(scale)
        assert trainings[-1].config.data == "PICTURES", study.name


@given(st.integers(100, 5_000_000))
def test_own_pictures_are_seen_as_often_as_the_scales_own(num_images: int):
    for name in ("limited", "abundant", "usual", "fine_tuned"):
        own = getattr(SCALES["small"], name)
        config = moved(own, "PICTURES", num_images)
        want = images_seen(own, known_num_images(own.data))
        assert images_seen(config, num_images) == pytest.approx(want), name
        assert config.num_epochs / config.evaluation_interval_epochs == pytest.approx(
            own.num_epochs / own.evaluation_interval_epochs
        )


def test_limited_data_are_as_few_of_ones_own():
    config = moved(SCALES["small"].limited, "PICTURES", 600_000)
    assert config.train_percent == pytest.approx(1), "6,000 of 600,000"
    assert moved(SCALES["small"].limited, "PICTURES", 2_000).train_percent is None, "all of fewer"


@SCALED
@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_nothing_looks_unlike_what_was_trained_by_more_than_the_recipe_says(study: Study, scale: Scale):
    """Whole pictures in training are whole pictures when looked at, else both are cropped (Table 10 pairs them)."""
    for training in study.trainings(scale):
        config = training.config
        wanted = "crop" if config.augment.crop == "random_resized" and scale.name == "paper" else "resize"
        assert config.preprocessing.fit == wanted, training


@SCALED
def test_transfer_goes_to_other_pictures(scale: Scale):
    first, *_, last = STUDIES["transfer"].trainings(scale)
    names = [config.data.partition(":")[0] for config in (first.config, last.config)]
    assert names[0] != names[1] or scale.name in ("toy", "paper"), names


@SCALED
def test_early_attention_meets_more_tokens_than_late(scale: Scale):
    for training in STUDIES["attention-scope"].trainings(scale):
        grids = training.config.model.grids
        assert grids[1][0] > 3 * grids[3][0], grids


@SCALED
def test_the_first_split_is_the_usual_network(scale: Scale):
    assert scale.usual.model.depths[2:4] == scale.splits[0]
    assert len({sum(split) for split in scale.splits}) == 1, "all have as many blocks"


def test_a_chain_is_read_as_the_paper_writes_it():
    claims = chain("CCCC ~ CCCT >= CCTT > CTTT >> ViT_rel", "here")
    assert [claim.text for claim in claims] == ["CCCC ~ CCCT", "CCCT >= CCTT", "CCTT > CTTT", "CTTT >> ViT_rel"]
