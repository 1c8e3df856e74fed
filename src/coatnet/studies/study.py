"""What a study is made of: trainings to compare, and the paper's orderings of them, which its results answer."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from coatnet.config import ModelConfig, TrainConfig

if TYPE_CHECKING:
    from coatnet.studies.scales import Scale

Relation = Literal[">>", ">", ">=", "~"]
Measure = Literal["top1_percent", "train_loss"]

# Fixed before any run, in points of accuracy and in nats of loss. Figures that the paper calls about equal lie up to
# 0.2 points apart (Tables 7 to 9, C-2); small test sets and few seeds resolve less, so the margin is wider.
ABOUT_EQUAL: dict[Measure, float] = {"top1_percent": 0.5, "train_loss": 0.02}
MUCH: dict[Measure, float] = {"top1_percent": 2.0, "train_loss": 0.1}


@dataclass(frozen=True, kw_only=True)
class Training:
    """One cell of a study: a network trained in one setting, with every seed."""

    row: str  # what is compared: "CCTT"
    setting: str  # under which condition: "28 px"
    config: TrainConfig  # without folder, seed and number of classes, which the runner knows
    after: str | None = None  # setting of the same row whose trained weights it starts from


@dataclass(frozen=True, slots=True)
class Claim:
    """One ordering of the paper: `first` `relation` `second` in a setting."""

    first: str
    relation: Relation
    second: str
    setting: str
    measure: Measure = "top1_percent"

    @property
    def text(self) -> str:
        return f"{self.first} {self.relation} {self.second}"


@dataclass(frozen=True, kw_only=True)
class Study:
    """A table or figure of the paper as a question with trainings that answer it."""

    name: str
    title: str
    question: str
    source: str  # of the paper
    trainings: Callable[[Scale], tuple[Training, ...]]
    claims: Callable[[Scale], tuple[Claim, ...]]
    paper: tuple[str, ...]  # what the paper found, a line each
    paper_top1: tuple[tuple[str, str, float], ...] = ()  # (setting, row, percent) that the paper prints
    paper_order: str = ""  # "A ~ B > C" where it draws curves and prints no numbers
    plot: Literal["curves", "bars", "data"]
    measures_speed: bool = False  # and memory, of a training update


def chain(text: str, setting: str, measure: Measure = "top1_percent") -> tuple[Claim, ...]:
    """Return the claims of "A ~ B >= C > D >> E": one for each pair of neighbours."""
    words = re.split(r"\s+(>>|>=|>|~)\s+", text)
    names, relations = words[::2], words[1::2]
    pairs = zip(itertools.pairwise(names), relations, strict=True)
    return tuple(Claim(first, relation, second, setting, measure) for (first, second), relation in pairs)  # pyright: ignore


def trainings_of(
    models: Mapping[str, ModelConfig], config: TrainConfig, px: int, setting: str, after: str | None = None
) -> tuple[Training, ...]:
    """Return the same training at `px` for each network, by row."""
    preprocessing = replace(config.preprocessing, image_size=(px, px))
    return tuple(
        Training(
            row=row,
            setting=setting,
            config=replace(config, model=replace(model, image_size=(px, px)), preprocessing=preprocessing),
            after=after,
        )
        for row, model in models.items()
    )


def variants(base: ModelConfig, changes: Mapping[str, Mapping[str, Any]]) -> dict[str, ModelConfig]:
    """Return networks that differ from one in the fields given, by row."""
    return {row: replace(base, name=row, **change) for row, change in changes.items()}


def settings_of(trainings: Sequence[Training]) -> list[str]:
    """Return the settings in their order."""
    return list(dict.fromkeys(training.setting for training in trainings))


def names_of(trainings: Sequence[Training]) -> list[str]:
    """Return the rows in their order."""
    return list(dict.fromkeys(training.row for training in trainings))
