"""Checkpoints: folders written aside and renamed, checked before use. Nothing in them is code.

RUN/checkpoints/step-00001200/ holds network, optimizer and average as safetensors, `state.json` for the numbers, and
a manifest with every file's SHA-256. A damaged checkpoint is passed over for the one before it. Where the network is
divided over ranks, `shards/` (sharded.py) stands in the place of the safetensors files.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from coatnet.errors import ModelFileError
from coatnet.files import new_folder, read_json, verify_folder, write_json
from coatnet.ranks import Ranks
from coatnet.training import sharded
from coatnet.training.ema import Ema

NUM_KEPT = 2
NETWORK, OPTIMIZER, AVERAGE = "network.safetensors", "optimizer.safetensors", "ema.safetensors"
NUMBERS = "state.json"


@dataclass
class State:
    """Everything that moves while training; the draws need no place here, since they follow from the step."""

    network: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]  # each parameter that learns is in one
    ema: Ema | None
    step: int = 0  # updates done
    elapsed_s: float = 0.0  # of training, over all its pieces
    loss_sum: float = 0.0  # since the last row of the history
    num_losses: int = 0
    history: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    best_top1_percent: float | None = None
    best_epoch: float = 0.0
    warmup_share: float = 0.0  # of the run, taken by the warm-up so far
    bad_images: dict[str, str] = field(default_factory=dict[str, str])  # name -> what was met

    def numbers(self) -> dict[str, Any]:
        """Return what `state.json` holds."""
        return {name: getattr(self, name) for name in _NUMBERS}


_NUMBERS = tuple(item.name for item in fields(State) if item.name not in ("network", "optimizers", "ema"))


def save(run: Path, state: State) -> Path:
    """Write a checkpoint of this moment; remove all but the newest few, and those of a future that was given up."""
    folder = run / "checkpoints" / f"step-{state.step:08d}"
    with new_folder(folder) as aside:
        save_file(_whole(state.network.state_dict()), aside / NETWORK)
        save_file(_optimizer_tensors(state), aside / OPTIMIZER)
        if state.ema is not None:
            save_file(_whole(state.ema.network.state_dict()), aside / AVERAGE)
        write_json(aside / NUMBERS, state.numbers())
    _clear_around(folder)
    return folder


def save_shards(run: Path, state: State, ranks: Ranks) -> Path:
    """Write a checkpoint to which every rank adds what it holds; all ranks must call.

    Raises: OSError, on every rank, if one of them cannot write.
    """
    folder = run / "checkpoints" / f"step-{state.step:08d}"
    with sharded.shared_folder(folder, ranks) as aside:
        sharded.write(aside, _networks(state), _moments(state), ranks)
        if ranks.is_first:
            write_json(aside / NUMBERS, state.numbers())
    if ranks.is_first:
        _clear_around(folder)
    return folder


def _clear_around(folder: Path) -> None:
    """Remove all checkpoints but the newest few, and those of a future that was given up."""
    others = _newest_first(folder.parents[1])
    here = others.index(folder)
    for old in [*others[:here], *others[here + NUM_KEPT :], *folder.parent.glob(".step-*")]:  # .step-*: half written
        shutil.rmtree(old)


def find_newest(run: Path, *, keeps_average: bool = False) -> tuple[Path | None, list[str]]:
    """Return the newest good checkpoint, if there is one, and what is wrong with newer ones."""
    needed = (NETWORK, OPTIMIZER, NUMBERS, *([AVERAGE] if keeps_average else []))
    damage: list[str] = []
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
    for name in _NUMBERS:
        setattr(state, name, numbers[name])


def _load_files(folder: Path, state: State) -> None:
    state.network.load_state_dict(load_file(folder / NETWORK))
    if state.ema is not None:
        state.ema.network.load_state_dict(load_file(folder / AVERAGE))
    _load_optimizer(load_file(folder / OPTIMIZER), state)


def _newest_first(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)


def _whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _optimizer_tensors(state: State) -> dict[str, Tensor]:
    """Return the optimizers' tensors as "parameter/kind"; parameters that do not learn have none."""
    return {
        f"{name}/{kind}": tensor.detach().contiguous()
        for name, (_, tensors) in _moments(state).items()
        for kind, tensor in tensors.items()
    }


def _load_optimizer(tensors: dict[str, Tensor], state: State) -> None:
    moments = _moments(state)
    for key, tensor in tensors.items():
        name, kind = key.rsplit("/", 1)
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
