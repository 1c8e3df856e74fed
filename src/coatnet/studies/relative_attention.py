"""Table 6: what relative attention is worth, at the trained size and fine-tuned at a larger one."""

from __future__ import annotations

from coatnet.studies.scales import Scale
from coatnet.studies.study import Claim, Study, Training, trainings_of, variants

RELATIVE = {name: {"relative_attention": name} for name in ("pre", "post", "none")}


def _trainings(scale: Scale) -> tuple[Training, ...]:
    models = variants(scale.usual.model, RELATIVE)
    trained, larger = f"{scale.px} px", f"{scale.larger_px} px"
    return (
        *trainings_of(models, scale.usual, scale.px, trained),
        *trainings_of(models, scale.fine_tuned, scale.larger_px, larger, after=trained),
    )


def _claims(scale: Scale) -> tuple[Claim, ...]:
    return tuple(
        claim
        for px in (scale.px, scale.larger_px)
        for claim in (Claim("pre", ">", "none", f"{px} px"), Claim("pre", ">=", "post", f"{px} px"))
    )


STUDY = Study(
    name="relative-attention",
    title="Relative attention",
    question="What does a learned bias by offset add, before the softmax (pre) or after it (post)?",
    source="Table 6; Eq. 3",
    trainings=_trainings,
    claims=_claims,
    paper=(
        "ImageNet-1K at 224 px: with 84.1 %, without 83.8 %; at 384 px: with 85.7 %, without 85.3 %",
        "ImageNet-21K to 1K at 384 px: with 87.9 %, without 87.4 %; of the two forms it chose pre",
    ),
    paper_top1=(("224 px", "pre", 84.1), ("224 px", "none", 83.8), ("384 px", "pre", 85.7), ("384 px", "none", 85.3)),
    plot="bars",
)
