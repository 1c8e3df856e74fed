"""Checkpoints: what of a run they hold, which are good, which are kept. Nothing in them is code.

RUN/checkpoints/step-00001200/ holds network, optimizer and average as safetensors, `state.json` for the numbers, and
a manifest with every file's SHA-256. A damaged checkpoint is passed over for the one before it. Where the network is
divided over ranks, `shards/` (sharded.py) stands in the place of the safetensors files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from coatnet.errors import ModelFileError
from coatnet.files import new_folder, read_json, recover, verify_folder, write_atomic, write_json
from coatnet.ranks import Ranks
from coatnet.training import sharded
from coatnet.training.ema import Ema
from coatnet.weights import in_words, misfits, read_safetensors

NETWORK, OPTIMIZER, AVERAGE = "network.safetensors", "optimizer.safetensors", "ema.safetensors"
NUMBERS = "state.json"


@dataclass
class State:
    """Everything that moves while training; the draws need no place here, since they follow from the step."""

    network: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]  # each parameter that learns is in one
    ema: Ema | None
    step: int = 0  # updates done, those that were skipped among them
    elapsed_s: float = 0.0  # of training, over all its pieces
    rate: float = 0.0  # of the newest update
    loss_sum: float = 0.0  # since the last row of the history
    num_losses: int = 0
    history: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    best_top1_percent: float | None = None
    best_epoch: float = 0.0
    warmup_share: float = 0.0  # of the run, taken by the warm-up so far
    bad_images: dict[str, str] = field(default_factory=dict[str, str])  # name -> what was met
    num_saves: int = 0  # checkpoints taken, this one too
    is_best: bool = False  # whether this is the network that did best in validation so far
    num_skipped: int = 0  # updates whose loss or gradient was no number
    num_skipped_in_row: int = 0

    def numbers(self) -> dict[str, Any]:
        """Return what `state.json` holds."""
        return {name: getattr(self, name) for name in _NUMBERS}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors by file and name."""
        files = {NETWORK: dict(self.network.state_dict()), OPTIMIZER: _optimizer_tensors(self)}
        return files if self.ema is None else {**files, AVERAGE: dict(self.ema.network.state_dict())}


_NUMBERS = tuple(item.name for item in fields(State) if item.name not in ("network", "optimizers", "ema"))


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints stay besides the newest."""

    num_last: int = 2  # the newest so many
    best: bool = False  # that of the best validation
    every: int | None = None  # every so many-th for good


@dataclass
class Snapshot:
    """A state at one moment, as files: tensors on the CPU by file and name, and the numbers as JSON."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    numbers: str


def take(state: State, reuse: Snapshot | None = None) -> Snapshot:
    """Copy a state, into the memory of an older snapshot where its tensors fit."""
    old = {} if reuse is None else reuse.tensors
    tensors: dict[str, dict[str, Tensor]] = {}
    for file, named in state.tensors().items():
        tensors[file] = {name: _copy(tensor.detach(), old.get(file, {}).get(name)) for name, tensor in named.items()}
    return Snapshot(state.step, tensors, json.dumps(state.numbers(), indent=2) + "\n")


def _copy(tensor: Tensor, into: Tensor | None) -> Tensor:
    """Copy to contiguous memory on the CPU, as safetensors wants it; new memory costs more than what is written."""
    if into is None or into.shape != tensor.shape or into.dtype != tensor.dtype:
        into = torch.empty(tensor.shape, dtype=tensor.dtype)
    return into.copy_(tensor)


def write(run: Path, snapshot: Snapshot, retention: Retention) -> Path:
    """Write a snapshot as a checkpoint; then remove those not kept, and those of a future that was given up."""
    folder = run / "checkpoints" / f"step-{snapshot.step:08d}"
    with new_folder(folder) as aside:
        for file, tensors in snapshot.tensors.items():
            save_file(tensors, aside / file)
        write_atomic(aside / NUMBERS, snapshot.numbers)
    _tidy(folder, retention)
    return folder


def save_shards(run: Path, state: State, ranks: Ranks, retention: Retention = Retention()) -> Path:
    """Write a checkpoint to which every rank adds what it holds; all ranks must call.

    Raises: OSError, on every rank, if one of them cannot write.
    """
    folder = run / "checkpoints" / f"step-{state.step:08d}"
    with sharded.shared_folder(folder, ranks) as aside:
        sharded.write(aside, _networks(state), _moments(state), ranks)
        if ranks.is_first:
            write_json(aside / NUMBERS, state.numbers())
    if ranks.is_first:
        _tidy(folder, retention)
    return folder


def save(run: Path, state: State, retention: Retention = Retention()) -> Path:
    """Write a checkpoint of this moment, all of it before going on."""
    return write(run, take(state), retention)


def _tidy(newest: Path, retention: Retention) -> None:
    others = _newest_first(newest.parents[1])
    here = others.index(newest)
    older = others[here:]
    stays = set(older[: retention.num_last])
    if retention.best:
        stays |= set([folder for folder in older if _number(folder, "is_best")][:1])
    if retention.every is not None:
        stays |= {folder for folder in older if _number(folder, "num_saves") % retention.every == 0}
    half_written = newest.parent.glob(".step-*")
    for folder in [*others[:here], *(folder for folder in older if folder not in stays), *half_written]:
        shutil.rmtree(folder)


def _number(folder: Path, name: str) -> int:
    """Return a number of a checkpoint; 1, which keeps nothing, where it cannot be read."""
    try:
        return int(read_json(folder / NUMBERS)[name])
    except (ModelFileError, KeyError, TypeError, ValueError):
        return name == "num_saves"


def find_newest(run: Path, *, keeps_average: bool = False) -> tuple[Path | None, list[str]]:
    """Return the newest good checkpoint, if there is one, and what is wrong with newer ones."""
    needed = (NETWORK, OPTIMIZER, NUMBERS, *([AVERAGE] if keeps_average else []))
    damage: list[str] = []
    recover(run / "checkpoints", "step-*")
    for folder in _newest_first(run):
        try:
            if sharded.is_sharded(folder):
                sharded.verify(folder, (NUMBERS,), parts=("network", *(["average"] if keeps_average else [])))
            else:
                verify_folder(folder, needed)
        except ModelFileError as error:
            damage.append(str(error))
        else:
            return folder, damage
    return None, damage


def load(folder: Path, state: State) -> None:
    """Fill `state` from a good checkpoint."""
    if sharded.is_sharded(folder):
        sharded.read(folder, _networks(state), _moments(state))
    else:
        _load_files(folder, state)
    numbers = read_json(folder / NUMBERS)
    missing = [name for name in _NUMBERS if name not in numbers]
    if missing:
        raise ModelFileError(f"{folder / NUMBERS} has no {missing[0]}: it is of another version. Begin anew.")
    for name in _NUMBERS:
        setattr(state, name, numbers[name])


def _load_files(folder: Path, state: State) -> None:
    _load_network(folder / NETWORK, state.network)
    if state.ema is not None:
        _load_network(folder / AVERAGE, state.ema.network)
    _load_optimizer(read_safetensors(folder / OPTIMIZER), state)


def _load_network(path: Path, network: nn.Module) -> None:
    found, wanted = read_safetensors(path), network.state_dict()
    if bad := misfits(found, wanted):
        raise ModelFileError(
            f"{path}: {len(bad)} tensors are of another network. {bad[0]}: file {in_words(found, bad[0])}, "
            f"model {in_words(wanted, bad[0])}. Begin anew with --overwrite."
        )
    network.load_state_dict(found)


def _newest_first(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)


def _optimizer_tensors(state: State) -> dict[str, Tensor]:
    """Return the optimizers' tensors as "parameter/kind"; parameters that do not learn have none."""
    return {
        f"{name}/{kind}": tensor for name, (_, tensors) in _moments(state).items() for kind, tensor in tensors.items()
    }


def _load_optimizer(tensors: dict[str, Tensor], state: State) -> None:
    moments = _moments(state)
    for _, place in moments.values():
        place.clear()  # what came after the checkpoint is not of its moment
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition("/")
        if name not in moments or (tensor.dim() and tensor.shape != moments[name][0].shape):
            raise ModelFileError(f"The checkpoint's {OPTIMIZER} is of another network: {key}, {tuple(tensor.shape)}.")
        parameter, place = moments[name]
        # Same place as the parameter and, what has its shape, the same memory layout.
        like = parameter if tensor.shape == parameter.shape else tensor
        place[kind] = torch.empty_like(like, dtype=tensor.dtype, device=parameter.device).copy_(tensor)


def _networks(state: State) -> dict[str, nn.Module]:
    return {"network": state.network} | ({} if state.ema is None else {"average": state.ema.network})


def _moments(state: State) -> dict[str, tuple[nn.Parameter, dict[str, Tensor]]]:
    """Return by name each parameter that learns and what its optimizer keeps for it, nothing before the first step."""
    homes = {id(p): optimizer for optimizer in state.optimizers for g in optimizer.param_groups for p in g["params"]}
    return {
        name: (parameter, homes[id(parameter)].state[parameter])
        for name, parameter in state.network.named_parameters()
        if id(parameter) in homes
    }
