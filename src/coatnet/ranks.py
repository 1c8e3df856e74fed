"""This process among others. The only room that knows torch.distributed; alone, every call is a plain one.

Under `torchrun` the group is joined from its environment: NCCL for tensors on CUDA, gloo for those on the CPU.
Gradients are averaged over ranks, by DDP or, where the network is divided over them, by FSDP. BatchNorm takes its
statistics from each rank's own share, and rank 0's running statistics are kept. Weights are not sent again after the
start, so ranks must compute alike. Decisions travel on the CPU, so that no accelerator waits for one.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Generator, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from coatnet.errors import ConfigError, LostRankError
from coatnet.heartbeat import Heartbeat

JOIN_S = 600.0  # a machine may take long to load its programs


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and speaks to the user."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Add a tensor up over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def sum_with_gradient(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks; its gradient is summed over them too."""
        return value if self.size == 1 else _Sum.apply(value)

    def any(self, flag: bool) -> bool:
        """Return whether any rank says so; all ranks must ask."""
        return bool(self.sum(torch.tensor(float(flag))))

    def first_says(self, value: float) -> float:
        """Return rank 0's number on every rank, for decisions that follow a clock."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(shared, 0)
        return shared.item()

    def union(self, found: dict[str, str]) -> dict[str, str]:
        """Return what all ranks found; all ranks must ask."""
        if self.size == 1:
            return dict(found)
        parts: list[dict[str, str]] = [{} for _ in range(self.size)]
        dist.all_gather_object(parts, found)
        return {key: value for part in parts for key, value in part.items()}

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def all_or_none(self) -> Generator[None]:
        """Have an OSError of one rank raised on every rank, so that none waits for one that gave up; all must enter."""
        error: OSError | None = None
        try:
            yield
        except OSError as caught:
            error = caught
        met = self.union({} if error is None else {f"rank {self.rank}": str(error)})
        if met:
            raise error or OSError("; ".join(f"{rank}: {text}" for rank, text in met.items()))

    def wrap(self, network: nn.Module) -> nn.Module:
        """Have the gradients of a network averaged over ranks; it must have its start weights already."""
        if self.size == 1:
            return network
        devices = [self.device] if self.device.type == "cuda" else None
        wrapped = DistributedDataParallel(network, device_ids=devices, gradient_as_bucket_view=True)
        # Statistics need no exchange: training looks at each rank's own batch, and rank 0's are the ones written.
        wrapped.broadcast_buffers = False  # the argument's name differs between versions of torch, this one does not
        return wrapped

    def shard(self, network: nn.Module, parts: Iterable[nn.Module]) -> None:
        """Divide a network over the ranks, in place, and average its gradients; it must have its start weights already.

        A rank keeps some rows of every weight, of its gradient and of what its optimizer keeps, and gathers the rest of
        a part while it computes with it. Buffers stay whole. Afterwards parameters are other objects than before.
        """
        network.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
        if self.size == 1:
            network.to(self.device)
            return
        from torch.distributed.device_mesh import init_device_mesh  # loads for a second, hence here
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.size,))
        for part in (*parts, network):
            fully_shard(part, mesh=mesh)

    def whole(self, tensor: Tensor) -> Tensor:
        """Return a tensor that may lie in rows over the ranks, whole on each; all ranks must ask."""
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # pyright: ignore

    def gather(self, network: nn.Module) -> dict[str, Tensor]:
        """Give rank 0 a divided network's whole state, on the CPU, and the others nothing; all ranks must ask."""
        state: dict[str, Tensor] = {}
        for name, tensor in network.state_dict().items():  # one after the other: the other ranks hold one at a time
            found = self.whole(tensor)
            if self.is_first:
                state[name] = found.cpu()
        return state

    def write_shards(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Write what this rank holds of the tensors, "part/name" each, a safetensors file a part; all ranks must write.

        Of a tensor that every rank has whole, rank 0's is written. Raises: what the lowest rank that failed met, on
        every rank.
        """
        from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        parts = sorted({name.partition("/")[0] for name in tensors})
        # A file is put together in memory, so each holds one part, not all.
        files = {name: 1 + parts.index(name.partition("/")[0]) for name in tensors}
        writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
        planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
        with _as_files_fail():
            save(dict(tensors), storage_writer=writer, planner=planner, no_dist=self.size == 1)

    def hold_gradients(self, network: nn.Module, hold: bool) -> AbstractContextManager[None]:
        """Keep gradients local while `hold`: all but the last microbatch of an update need no exchange.

        A divided network exchanges them after each one, since what is held would be whole gradients.
        """
        if hold and isinstance(network, DistributedDataParallel):
            return network.no_sync()
        return nullcontext()


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:  # noqa: ARG004 - autograd gives it
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, slope: Tensor) -> Tensor:  # noqa: ARG004  # pyright: ignore[reportIncompatibleMethodOverride]
        total = slope.contiguous().clone()
        dist.all_reduce(total)
        return total


@dataclass(frozen=True)
class Stored:
    """A tensor in a folder of shards, in pieces."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # (first index, shape) of each


def stored_shards(folder: Path) -> dict[str, Stored]:
    """Return what the headers of a folder's safetensors files tell. Raises: whatever reading odd headers raises."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        name: Stored(
            tuple(item.size),
            item.properties.dtype,
            tuple((tuple(piece.offsets), tuple(piece.sizes)) for piece in item.chunks),
        )
        for name, item in found.items()
        if isinstance(item, TensorStorageMetadata)
    }


def read_shards(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fill tensors, whole or divided, with what any number of ranks wrote; each rank reads what it needs."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with _as_files_fail():
        load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


@contextmanager
def _as_files_fail() -> Generator[None]:
    """Raise what a rank met rather than torch's report of it, and do not warn that one process is alone."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            yield
    except CheckpointException as error:
        cause, _ = error.failures[min(error.failures)]
        raise cause from None


def is_first_rank() -> bool:
    """Return whether this process speaks to the user, before any group is joined."""
    return int(os.environ.get("RANK", "0")) == 0


def num_ranks() -> int:
    """Return how many processes the group has, before it is joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def job_id() -> str | None:
    """Return torchrun's or Slurm's name of the job that this process is part of; None where nobody supervises it."""
    return os.environ.get("TORCHELASTIC_RUN_ID") or os.environ.get("SLURM_JOB_ID")


def was_restarted() -> bool:
    """Return whether torchrun or Slurm started this very command before, and it did not end well."""
    return any(int(os.environ.get(name) or 0) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def find_device(name: str) -> torch.device:
    """Return the device of that name: "cpu", "cuda", "cuda:1", "mps", or "auto" for the best at hand.

    Raises: ConfigError if it is unknown or not at hand.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"There is no device '{name}'. Use cpu, cuda, cuda:0 or mps.") from None
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    beyond = device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    if not present.get(device.type, False) or beyond:
        raise ConfigError(
            f"Device '{name}' is not at hand here. There is: {', '.join(k for k, v in present.items() if v)}."
        )
    return device


@contextmanager
def join(device: str) -> Generator[Ranks]:
    """Join the group that torchrun started, or be alone; leave it at the end."""
    found = find_device(device)
    if num_ranks() == 1:
        yield Ranks(0, 1, found)
        return
    if found.type == "cuda":
        found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(found)
    store, rank, size = next(rendezvous("env://"))
    token = _agree(store, rank, size)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if found.type == "cuda" else "gloo",
        store=PrefixStore(token, store), rank=rank, world_size=size,
    )  # fmt: skip
    heartbeat = _begin_heartbeat(token, rank, size)
    try:
        yield Ranks(rank, size, found)
        dist.barrier()  # nobody leaves while others may still ask for something
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise LostRankError(
            f"Rank {rank} lost another in an exchange ({str(error).splitlines()[0]}). torchrun --max-restarts starts "
            "the group again, which then goes on from the newest checkpoint."
        ) from error
    finally:
        heartbeat.leave()
        dist.destroy_process_group()


def _agree(store: Store, rank: int, size: int) -> str:
    """Return a name that this very group has agreed on; what an earlier one left in the store is under another.

    torchrun's store outlives a restart, and addresses of processes that are gone would be taken for the new ones'. So
    rank 0 answers what the others ask anew, and goes on when each has heard it. Raises: LostRankError.
    """
    question, answer, end_s = uuid4().hex, uuid4().hex, time.monotonic() + JOIN_S
    if rank:
        store.set(f"coatnet/question/{rank}", question)
        while not store.check([f"coatnet/answer/{question}"]):
            _wait_until(end_s, rank, "rank 0")
        answer = store.get(f"coatnet/answer/{question}").decode()
        store.add(f"coatnet/heard/{answer}", 1)
        return answer
    answered = set[bytes]()
    while store.add(f"coatnet/heard/{answer}", 0) < size - 1:
        for other in range(1, size):
            if store.check([f"coatnet/question/{other}"]):
                asked = store.get(f"coatnet/question/{other}")
                if asked not in answered:
                    store.set(f"coatnet/answer/{asked.decode()}", answer)
                    answered.add(asked)
        _wait_until(end_s, rank, f"all other {size - 1}")
    return answer


def _wait_until(end_s: float, rank: int, whom: str) -> None:
    if time.monotonic() > end_s:
        raise LostRankError(f"Rank {rank} has waited {JOIN_S:.0f} s for {whom} to join. Start the group again.")
    time.sleep(0.02)


def _begin_heartbeat(token: str, rank: int, size: int) -> Heartbeat:
    """Begin to listen for the others, over a connection of its own: the group's may be waiting for an answer."""
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return Heartbeat(store, rank, size, f"coatnet/heartbeat/{token}")
