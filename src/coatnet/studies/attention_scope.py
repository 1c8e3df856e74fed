"""Section 2.2: global attention after pooling (A), local windows (B), linear attention (C): accuracy, speed, memory.

The paper's argument lies where tokens are many, so each is tried in S3 and S4 alone and in all of S1 .. S4.
"""

from __future__ import annotations

from dataclasses import replace

from coatnet.config import ModelConfig
from coatnet.studies.scales import Scale
from coatnet.studies.study import Claim, Study, Training, trainings_of, variants

SETTING = "usual training"
SCOPES = ("global", "window", "linear")
PLACES = {"S3, S4": "CCTT", "S1 .. S4": "TTTT"}


def _base(model: ModelConfig) -> ModelConfig:
    """Widen every stage to whole heads, so that all can attend; halve the grid in each, as the paper's rows do."""
    widths = tuple(-(-width // model.head_dim) * model.head_dim for width in model.widths)
    return replace(model, widths=widths, strides=(2, 2, 2, 2, 2))


def _trainings(scale: Scale) -> tuple[Training, ...]:
    changes = {
        f"{scope}, {place}": {"attention": scope, "layout": layout}
        for place, layout in PLACES.items()
        for scope in SCOPES
    }
    return trainings_of(variants(_base(scale.usual.model), changes), scale.usual, scale.early_px, SETTING)


def _claims(scale: Scale) -> tuple[Claim, ...]:  # noqa: ARG001 - the same at every scale
    return tuple(
        Claim(f"global, {place}", ">", f"{scope}, {place}", SETTING) for place in PLACES for scope in SCOPES[1:]
    )


STUDY = Study(
    name="attention-scope",
    title="Scope of attention",
    question="Is pooling before global attention better than local windows or linear attention?",
    source="Section 2.2",
    trainings=_trainings,
    claims=_claims,
    paper=("local attention is slow on accelerators and hurts capacity; linear attention gave no reasonable result",),
    plot="bars",
    measures_speed=True,
)
