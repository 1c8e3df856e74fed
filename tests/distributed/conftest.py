from __future__ import annotations

from pathlib import Path

import pytest

from training.tiny import write_pictures


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "pictures", per_class=4)
