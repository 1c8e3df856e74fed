"""What each process of torchrun runs in test_equality.py: `python one_rank.py CONFIG.json WRITES.json`.

Every rank but the first notes each change it makes below the run folder in WRITES.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from coatnet import train
from coatnet.config import TrainConfig

WRITING = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "shutil.rmtree")


def main() -> None:
    config = TrainConfig.from_dict(json.loads(Path(sys.argv[1]).read_text()))
    changes: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in WRITING and str(arguments[0]).startswith(config.out):
            flags = arguments[2] if event == "open" else os.O_WRONLY
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR):
                changes.append(f"{event} {arguments[0]}")

    is_first = os.environ["RANK"] == "0"
    if not is_first:
        sys.addaudithook(watch)
    torch.set_num_threads(1)
    result = train(config)
    assert (result.summary is not None) == is_first
    if not is_first:
        Path(sys.argv[2]).write_text(json.dumps({"changes": changes, "bad": result.num_bad_images}))


main()
