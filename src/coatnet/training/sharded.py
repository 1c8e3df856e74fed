"""The part of a checkpoint that many ranks write and any number of them reads: `shards/`, by torch's own checkpoints.

Each rank writes its rows of every tensor, a safetensors file for each of `network`, `average` and the optimizer's
kinds (`exp_avg`, `exp_avg_sq`, `step`). A header tells where the rows belong; there is no other index, and nothing is
pickled.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from coatnet.errors import ModelFileError
from coatnet.files import new_folder, verify_folder
from coatnet.ranks import Ranks, Stored, read_shards, stored_shards

SHARDS = "shards"

Networks: TypeAlias = Mapping[str, nn.Module]  # "network" and, where one is kept, "average"
Moments: TypeAlias = Mapping[str, tuple[nn.Parameter, dict[str, Any]]]  # of each parameter that learns, by name


@contextmanager
def shared_folder(path: Path, ranks: Ranks) -> Generator[Path]:
    """Do as `new_folder` does for all ranks together: rank 0 makes the folder and its manifest, every rank fills it.

    Raises: OSError on every rank if one rank meets one; then there is no folder.
    """
    folder = ExitStack()
    with folder:
        with ranks.all_or_none():
            made = folder.enter_context(new_folder(path)) if ranks.is_first else None
        aside = ranks.union({} if made is None else {"aside": str(made)})["aside"]
        with ranks.all_or_none():
            yield Path(aside)
        with ranks.all_or_none():
            folder.close()


def write(folder: Path, networks: Networks, moments: Moments, ranks: Ranks) -> None:
    """Write what this rank holds of networks and optimizers; all ranks must write. Raises: OSError."""
    ranks.write_shards(_tensors(networks, moments), folder / SHARDS)
    if ranks.is_first:
        try:
            _check_whole(_stored(folder))
        except ModelFileError as error:
            raise OSError(f"{error} Do all ranks see one disk there? Give an --out that they share.") from None


def is_sharded(folder: Path) -> bool:
    """Return whether a checkpoint was written by ranks that each held a part."""
    return (folder / SHARDS).is_dir()


def verify(folder: Path, needed: Iterable[str], *, parts: Iterable[str]) -> None:
    """Check every file against the manifest, and that the files together hold every row of these parts and no gap.

    Raises: ModelFileError naming the first file or tensor that is not whole.
    """
    found = [file.relative_to(folder).as_posix() for file in (folder / SHARDS).iterdir()]
    verify_folder(folder, [*needed, *found])
    stored = _stored(folder)
    _check_whole(stored)
    for part in parts:
        if not any(name.startswith(f"{part}/") for name in stored):
            raise ModelFileError(f"{folder / SHARDS} holds no {part}. Copy the folder again, whole.")


def read(folder: Path, networks: Networks, moments: Moments) -> None:
    """Fill networks and optimizers, whole or divided over any number of ranks. Raises: ModelFileError."""
    stored = _stored(folder)
    _check_whole(stored)
    _make_moments(stored, moments)
    wanted = _tensors(networks, moments)
    for name, tensor in wanted.items():
        met = (stored[name].shape, stored[name].dtype) if name in stored else "none"
        if met != (tuple(tensor.shape), tensor.dtype):
            raise ModelFileError(
                f"{folder / SHARDS} is of another network or optimizer. {name}: file {met}, "
                f"here {(tuple(tensor.shape), tensor.dtype)}. Resume with the settings of the run."
            )
    read_shards(wanted, folder / SHARDS)


def _tensors(networks: Networks, moments: Moments) -> dict[str, Tensor]:
    """Return all tensors as "part/name", ready to be read from or written to in place."""
    found = {
        f"{part}/{name}": tensor.detach()
        for part, network in networks.items()
        for name, tensor in network.state_dict().items()
    }
    return found | {
        f"{kind}/{name}": tensor.detach() for name, (_, kinds) in moments.items() for kind, tensor in kinds.items()
    }


def _make_moments(stored: Mapping[str, Stored], moments: Moments) -> None:
    """Give optimizers the tensors that the files hold for them, which they make themselves only in their first step."""
    for _, kinds in moments.values():
        kinds.clear()  # what came after the checkpoint is not of its moment
    for key, item in stored.items():
        kind, _, name = key.partition("/")
        if name not in moments or kind in _OF_NETWORKS:
            continue
        parameter, kinds = moments[name]
        if item.shape == tuple(parameter.shape):
            kinds[kind] = torch.empty_like(parameter, dtype=item.dtype, requires_grad=False)
        else:
            kinds[kind] = torch.empty(item.shape, dtype=item.dtype, device=parameter.device)


_OF_NETWORKS = ("network", "average")


def _stored(folder: Path) -> dict[str, Stored]:
    try:
        return stored_shards(folder / SHARDS)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(f"{folder / SHARDS} cannot be read: {type(error).__name__}, {error}.") from None


def _check_whole(stored: Mapping[str, Stored]) -> None:
    """Raise ModelFileError naming the first tensor whose pieces do not follow each other, row after row to the end."""
    for name, item in stored.items():
        if not item.shape:
            continue
        row = 0
        for start, shape in sorted(item.pieces):
            if start != (row, *(0,) * (len(shape) - 1)) or shape[1:] != item.shape[1:]:
                raise ModelFileError(f"Rows of {name} are missing from {row} on, or are there twice.")
            row += shape[0]
