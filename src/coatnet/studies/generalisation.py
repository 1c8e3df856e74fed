"""Figure 1a: which layout generalises from limited data, without augmentation and regularisation."""

from __future__ import annotations

from coatnet.studies.scales import Scale
from coatnet.studies.study import Claim, Study, Training, chain, trainings_of

SETTING = "limited data"
ORDER = "CCCC ~ CCCT >= CCTT > CTTT >> ViT_rel"


def _trainings(scale: Scale) -> tuple[Training, ...]:
    return trainings_of(scale.networks, scale.limited, scale.px, SETTING)


def _claims(scale: Scale) -> tuple[Claim, ...]:  # noqa: ARG001 - the same at every scale
    return chain(ORDER, SETTING)


STUDY = Study(
    name="generalisation",
    title="Generalisation",
    question="Which layout of convolution and attention generalises best from limited data?",
    source="Figure 1a",
    trainings=_trainings,
    claims=_claims,
    paper=(f"ImageNet-1K, 300 epochs: {ORDER}",),
    paper_order=ORDER,
    plot="curves",
)
