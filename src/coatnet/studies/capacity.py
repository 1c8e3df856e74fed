"""Figure 1b: which layout has the capacity to make use of much data, seen in few passes."""

from __future__ import annotations

from coatnet.studies.scales import Scale
from coatnet.studies.study import Claim, Study, Training, chain, trainings_of

SETTING = "abundant data"
ORDER = "CCTT ~ CTTT > ViT_rel > CCCT > CCCC"


def _trainings(scale: Scale) -> tuple[Training, ...]:
    return trainings_of(scale.networks, scale.abundant, scale.px, SETTING)


def _claims(scale: Scale) -> tuple[Claim, ...]:  # noqa: ARG001 - the same at every scale
    return (*chain(ORDER, SETTING), *chain(ORDER, SETTING, "train_loss"))


STUDY = Study(
    name="capacity",
    title="Capacity",
    question="Which layout of convolution and attention learns most from abundant data?",
    source="Figure 1b",
    trainings=_trainings,
    claims=_claims,
    paper=(f"JFT-300M, 3 epochs: {ORDER}, in training loss and in accuracy",),
    paper_order=ORDER,
    plot="curves",
)
