"""Small models, checkpoints and files as a stranger would forge them."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

from coatnet.classifier import Classifier
from coatnet.config import PreprocessingConfig
from coatnet.data.transforms import Preprocessing
from coatnet.files import MANIFEST, sha256_of, write_json
from coatnet.training.start import build
from training.tiny import CLASSES, MODEL


class Evil:
    """Unpickled, it leaves a mark: what a real one would do is up to its maker."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def save_model(folder: Path) -> Path:
    """Save a tiny untrained classifier."""
    preprocessing = Preprocessing(PreprocessingConfig(image_size=MODEL.image_size))
    Classifier(network=build(MODEL, seed=3), preprocessing=preprocessing, labels=CLASSES).save(folder)
    return folder


def renew_manifest(folder: Path) -> None:
    """Vouch for the files as they are now, as one does who forged them."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != MANIFEST]
    write_json(folder / MANIFEST, {"sha256": {file.relative_to(folder).as_posix(): sha256_of(file) for file in files}})


def safetensors(header: dict[str, Any] | str, data: bytes = b"", *, claims: int | None = None) -> bytes:
    """Return a safetensors file of any header; `claims` is the length that it gives for it."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if claims is None else claims) + text + data


def read_header(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header and the data of a safetensors file."""
    (num_bytes,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + num_bytes]), content[8 + num_bytes :]
