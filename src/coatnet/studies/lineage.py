"""The paper's network against the widespread listing that departs from it, at equal parameters.

The listing's departures stand in `model/listing.py`.
"""

from __future__ import annotations

from dataclasses import replace

from coatnet.studies.scales import Scale
from coatnet.studies.study import Claim, Study, Training, trainings_of

SETTING = "usual training"


def _trainings(scale: Scale) -> tuple[Training, ...]:
    paper = replace(scale.usual.model, stochastic_depth_rate=0.0)  # the listing has none
    listing = replace(paper, name="listing", blocks="listing", widths=scale.listing_widths, head="plain")
    return trainings_of({"paper": paper, "listing": listing}, scale.usual, scale.px, SETTING)


def _claims(scale: Scale) -> tuple[Claim, ...]:  # noqa: ARG001 - the same at every scale
    return (Claim("paper", ">=", "listing", SETTING),)


STUDY = Study(
    name="lineage",
    title="Lineage",
    question="Do the departures of the widespread listing cost accuracy, at equal parameters?",
    source="not in the paper",
    trainings=_trainings,
    claims=_claims,
    paper=("the paper knows nothing of the listing; that its own network is no worse is this project's expectation",),
    plot="bars",
)
