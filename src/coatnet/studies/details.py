"""Tables 8 and 9: head size, norm of MBConv, place of the stride."""

from __future__ import annotations

from dataclasses import replace

from coatnet.config import ModelConfig
from coatnet.studies.scales import Scale
from coatnet.studies.study import Claim, Study, Training, trainings_of, variants

SETTING = "usual training"
LARGE_HEAD = 64
BASE = "heads of 32, BatchNorm, stride in 1x1"
CHANGES = {
    BASE: {},
    "heads of 64": {"head_dim": LARGE_HEAD},
    "LayerNorm": {"mbconv_norm": "layer"},
    "stride in depthwise": {"stride_in": "depthwise"},
}


def _base(model: ModelConfig) -> ModelConfig:
    """Widen attention stages to what both head sizes divide."""
    widths = (
        *model.widths[:3],
        *(-(-width // LARGE_HEAD) * LARGE_HEAD for width in model.widths[3:]),
    )
    return replace(model, widths=widths)


def _trainings(scale: Scale) -> tuple[Training, ...]:
    return trainings_of(variants(_base(scale.usual.model), CHANGES), scale.usual, scale.px, SETTING)


def _claims(scale: Scale) -> tuple[Claim, ...]:  # noqa: ARG001 - the same at every scale
    return (
        Claim(BASE, ">=", "heads of 64", SETTING),
        Claim(BASE, "~", "LayerNorm", SETTING),
        Claim("stride in depthwise", ">=", BASE, SETTING),
    )


STUDY = Study(
    name="details",
    title="Details of the blocks",
    question="What do head size, the norm of MBConv and the place of the stride change?",
    source="Tables 8 and 9",
    trainings=_trainings,
    claims=_claims,
    paper=(
        "CoAtNet-2: heads of 32 84.1 %, of 64 83.9 %; BatchNorm 84.1 %, LayerNorm 84.1 %",
        "stride in 1x1 / in depthwise: C-0 81.6 / 82.0 %, C-1 83.3 / 83.5 %, C-2 84.1 / 84.1 %",
    ),
    paper_top1=(
        ("C-2", BASE, 84.1),
        ("C-2", "heads of 64", 83.9),
        ("C-2", "LayerNorm", 84.1),
        ("C-2", "stride in depthwise", 84.1),
    ),
    plot="bars",
)
