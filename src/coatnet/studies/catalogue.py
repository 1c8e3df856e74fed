"""All studies, in the order of the paper."""

from __future__ import annotations

from coatnet.errors import ConfigError, name_hint
from coatnet.studies import (
    attention_scope,
    blocks,
    capacity,
    data_scale,
    details,
    generalisation,
    lineage,
    relative_attention,
    transfer,
)
from coatnet.studies.study import Study

ROOMS = (
    generalisation, capacity, transfer, relative_attention, blocks, details, attention_scope, data_scale, lineage,
)  # fmt: skip
STUDIES = {room.STUDY.name: room.STUDY for room in ROOMS}


def find(name: str) -> Study:
    """Return the study of that name. Raises: ConfigError naming the nearest known name."""
    if name in STUDIES:
        return STUDIES[name]
    raise ConfigError(f"There is no study '{name}'. {name_hint(name, STUDIES)}")
