from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from coatnet.training import finish
from training.tiny import write_pictures


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty pictures of three classes, undivided; read, never changed."""
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(autouse=True)
def plain_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave out the report, which has its own tests and takes longer than these runs; use one thread."""
    monkeypatch.setattr(finish, "write_report", lambda file, **_facts: file.write_text("report"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
