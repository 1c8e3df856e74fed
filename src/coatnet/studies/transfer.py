"""Table 2: CCTT and CTTT, pre-trained on one set, fine-tuned on another, at two sizes."""

from __future__ import annotations

from coatnet.studies.scales import Scale
from coatnet.studies.study import Claim, Study, Training, trainings_of

PRETRAINED = "pre-trained"
ROWS = ("CCTT", "CTTT")


def _trainings(scale: Scale) -> tuple[Training, ...]:
    models = {row: scale.networks[row] for row in ROWS}
    return (
        *trainings_of(models, scale.pretrained, scale.px, PRETRAINED),
        *(
            training
            for px in (scale.px, scale.larger_px)
            for training in trainings_of(models, scale.transferred, px, f"fine-tuned, {px} px", after=PRETRAINED)
        ),
    )


def _claims(scale: Scale) -> tuple[Claim, ...]:
    return tuple(Claim("CCTT", ">", "CTTT", f"fine-tuned, {px} px") for px in (scale.px, scale.larger_px))


STUDY = Study(
    name="transfer",
    title="Transfer",
    question="Which of the two layouts with the most capacity transfers better to another set?",
    source="Table 2",
    trainings=_trainings,
    claims=_claims,
    paper=("JFT to ImageNet-1K at 224 px: CCTT 82.39 %, CTTT 81.78 %", "at 384 px: CCTT 84.23 %, CTTT 84.02 %"),
    paper_top1=(
        ("224 px", "CCTT", 82.39),
        ("224 px", "CTTT", 81.78),
        ("384 px", "CCTT", 84.23),
        ("384 px", "CTTT", 84.02),
    ),
    plot="bars",
)
