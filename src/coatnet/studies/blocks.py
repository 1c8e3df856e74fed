"""Table 7: how a fixed number of blocks is best split between S2 (convolution) and S3 (attention)."""

from __future__ import annotations

from coatnet.studies.scales import Scale
from coatnet.studies.study import Claim, Study, Training, trainings_of, variants

SETTING = "usual training"


def _names(scale: Scale) -> list[str]:
    return [f"S2 {second}, S3 {third}" for second, third in scale.splits]


def _trainings(scale: Scale) -> tuple[Training, ...]:
    base = scale.usual.model
    first, last = base.depths[:2], base.depths[4:]
    changes = {
        name: {"depths": (*first, *split, *last)} for name, split in zip(_names(scale), scale.splits, strict=True)
    }
    return trainings_of(variants(base, changes), scale.usual, scale.px, SETTING)


def _claims(scale: Scale) -> tuple[Claim, ...]:
    usual, more_attention, more_convolution = _names(scale)
    return Claim(usual, ">", more_attention, SETTING), Claim(usual, "~", more_convolution, SETTING)


STUDY = Study(
    name="blocks",
    title="Split of blocks",
    question="How are blocks best split between the convolutions of S2 and the attention of S3?",
    source="Table 7",
    trainings=_trainings,
    claims=_claims,
    paper=("CoAtNet-2: S2 6, S3 14: 84.1 %", "S2 2, S3 18: 83.4 %", "S2 8, S3 12: 84.0 %"),
    paper_top1=(("C-2", "S2 6, S3 14", 84.1), ("C-2", "S2 2, S3 18", 83.4), ("C-2", "S2 8, S3 12", 84.0)),
    plot="bars",
)
