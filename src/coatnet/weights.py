"""Weights out of files that anybody may have made: nothing in them is run, nothing is believed unchecked.

Safetensors are data. PyTorch's own files are pickles: they are read with `weights_only=True`, which knows tensors and
plain containers and refuses all else, and only where they are stored as torch.save stores them, since a compressed file
of 1 MB can unpack to gigabytes.
"""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from coatnet.config import ModelConfig
from coatnet.errors import ModelFileError, one_line
from coatnet.files import MAX_JSON_BYTES, parse_json
from coatnet.layout import count

SUFFIXES = (".safetensors", ".pt", ".pth")
MAX_EXCESS = 10  # times the bytes of the file that a network may ask for; smaller misfits are told tensor by tensor
WRAPPERS = ("state_dict", "model_state_dict", "model")  # under which trainers keep the weights
PREFIX = "module."  # that DDP puts before each name
REAL = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # what weights may be kept in
WHOLE = (torch.int64, torch.int32)  # what BatchNorm's counters may be

Tensors = dict[str, Tensor]


def read_file(path: Path) -> Tensors:
    """Read the tensors of a .safetensors, .pt or .pth file. Raises: ModelFileError."""
    return read_safetensors(path) if path.suffix == ".safetensors" else read_pytorch(path)


def read_safetensors(path: Path) -> Tensors:
    """Read a safetensors file. Raises: ModelFileError."""
    try:
        _check_header(path)
        return load_file(path)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise ModelFileError(f"{path} cannot be read as safetensors: {_first_line(error)}.") from None


def _check_header(path: Path) -> None:
    """Look at the length before anything is read, and at the names, which safetensors lets come twice."""
    with path.open("rb") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
        most = min(MAX_JSON_BYTES, path.stat().st_size - 8)
        if num_bytes > most:
            raise ValueError(f"its header claims {num_bytes:,} bytes, at most {max(0, most):,} can be")
        parse_json(file.read(num_bytes).decode())


def read_pytorch(path: Path) -> Tensors:
    """Read the weights that a file of torch.save holds, alone or as a trainer wraps them. Raises: ModelFileError."""
    if not path.is_file():
        raise ModelFileError(f"{path} cannot be read: it is {'no file' if path.exists() else 'not there'}.")
    try:
        _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:  # what a damaged pickle raises is anybody's guess
        raise ModelFileError(
            f"{path} cannot be read as PyTorch weights: {_first_line(error)}.\n"
            "  Only tensors are read, since other objects may run code. Save the state_dict alone, with torch.save."
        ) from None
    return _unwrap(found, path)


def _check_archive(path: Path) -> None:
    """Raise ValueError for what torch.save of today did not write."""
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no archive of torch.save, or one from before PyTorch 1.6")
    with zipfile.ZipFile(path) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("it is compressed, which torch.save never does")


def _unwrap(found: object, path: Path) -> Tensors:
    """Return the state dict inside what a trainer saved, by the network's own names."""
    for name in WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    tensors = found if isinstance(found, dict) else {}
    if not tensors or not all(_is_plain(tensor) for tensor in tensors.values()):
        raise ModelFileError(f"{path} holds no weights: a state_dict of plain tensors is read. Save that alone.")
    return {str(name).removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def _is_plain(value: object) -> bool:
    """Return whether a value is a dense tensor that holds all its numbers, so that it costs no more than its file."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def misfits(found: Tensors, wanted: Tensors) -> list[str]:
    """Return the names of the tensors that one side alone has, or that do not go into the network's."""
    names = wanted | found
    return [name for name in names if name not in found or name not in wanted or not _fits(found[name], wanted[name])]


def _fits(found: Tensor, wanted: Tensor) -> bool:
    """Return whether one tensor goes into another: of its shape, and of real numbers where it is."""
    kinds = REAL if wanted.is_floating_point() else WHOLE + REAL
    return found.shape == wanted.shape and found.dtype in kinds


def in_words(tensors: Tensors, name: str) -> str:
    """Return what a side has under a name: a shape, and the type where it is not of real numbers; or "has none"."""
    if name not in tensors:
        return "has none"
    tensor = tensors[name]
    kind = "" if tensor.dtype in REAL else f" {tensor.dtype}".replace("torch.", "")
    return f"{tuple(tensor.shape)}{kind}"


def check_size(config: ModelConfig, num_bytes: int, path: Path) -> None:
    """Refuse a config that asks for far more weights than lie beside it, before memory is taken for them."""
    num_params = count(config).num_params
    if 4 * num_params > MAX_EXCESS * num_bytes:
        raise ModelFileError(
            f"{path} asks for a network of {num_params:.3g} parameters, but the weights beside it are {num_bytes:,} "
            "bytes. Take both from the same save."
        )


def _first_line(error: Exception) -> str:
    """Return what an error says, as far as a message of ours can hold it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    first = next(iter(str(error).splitlines()), type(error).__name__)
    return one_line(first).rstrip(".")
