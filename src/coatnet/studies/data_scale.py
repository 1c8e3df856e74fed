"""The title's claim, "for all data sizes": accuracy against the amount of data, convolution-heavy and attention-heavy.

Every training makes as many updates, so that only the number of different pictures changes; of a class that would have
less than one picture one is kept, so that tiny shares of many small classes are larger than they say.
"""

from __future__ import annotations

from dataclasses import replace

from coatnet.studies.scales import Scale
from coatnet.studies.study import Claim, Study, Training, trainings_of

ROWS = ("CCCC", "CCTT", "CTTT")
PERCENTS = (1, 3, 10, 30, 100)


def _trainings(scale: Scale) -> tuple[Training, ...]:
    models, found = {row: scale.networks[row] for row in ROWS}, list[Training]()
    for percent in PERCENTS:
        passes = 100 / percent
        config = replace(
            scale.abundant,
            num_epochs=scale.abundant.num_epochs * passes,
            evaluation_interval_epochs=scale.abundant.num_epochs * passes / 2,
            train_percent=float(percent),
        )
        if percent == 100:
            config = scale.abundant  # so that it shares its runs with the study of capacity
        found += trainings_of(models, config, scale.px, f"{percent} %")
    return tuple(found)


def _claims(scale: Scale) -> tuple[Claim, ...]:  # noqa: ARG001 - the same at every scale
    return tuple(Claim("CCTT", ">=", other, f"{percent} %") for percent in PERCENTS for other in ("CCCC", "CTTT"))


STUDY = Study(
    name="data-scale",
    title="All data sizes",
    question="Is CCTT as good as convolution-heavy and attention-heavy layouts with any amount of data?",
    source="the title",
    trainings=_trainings,
    claims=_claims,
    paper=("no figure of the paper shows accuracy against the amount of data",),
    plot="data",
)
