"""Batches in an order without end, the same for any number of ranks and workers, entered at any step.

Step s of global batch size G takes the positions s*G .. (s+1)*G-1 of the order in `draws.py`: batches are always full,
and one may hold the end of an epoch and the start of the next. Rank r of W takes a contiguous share of each.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from coatnet.data import draws
from coatnet.data.image_sets import ArrayImages
from coatnet.data.sources import ImageSet
from coatnet.data.transforms import Augmentation, Preprocessing, erase_some
from coatnet.errors import BadImageError, ConfigError, DataError


@dataclass(frozen=True)
class Batch:
    """Pictures with what is known about each, in the order of their positions."""

    images: Tensor  # (B, C, h, w) uint8
    targets: Tensor  # (B,) int64, the class
    positions: Tensor  # (B,) int64, place in the order without end; in evaluation, the index
    epochs: Tensor  # (B,) int64

    def __len__(self) -> int:
        return len(self.targets)

    def split(self, microbatch_size: int) -> Iterator[Batch]:
        """Yield the batch in pieces of at most so many pictures; an even size keeps mixing's pairs together."""
        for start in range(0, len(self), microbatch_size):
            part = slice(start, start + microbatch_size)
            yield Batch(self.images[part], self.targets[part], self.positions[part], self.epochs[part])


@dataclass(frozen=True)
class _Made:
    """What comes out of a worker. An error travels as a value: raised there, it would arrive wrapped in a traceback."""

    batch: Batch | None
    bad: dict[str, str] = field(default_factory=dict[str, str])
    error: DataError | None = None


class _Maker(Protocol):
    def __getitem__(self, key: int, /) -> _Made: ...


class TrainLoader:
    """Augmented batches of this rank's share, by steps."""

    def __init__(
        self,
        image_set: ImageSet,
        augmentation: Augmentation,
        *,
        seed: int,
        global_batch_size: int,
        rank: int = 0,
        num_ranks: int = 1,
        num_workers: int = 0,
        on_bad_image: Literal["skip", "stop"] = "skip",
    ) -> None:
        if global_batch_size < num_ranks:
            raise ConfigError(
                f"global_batch_size is {global_batch_size} for {num_ranks} ranks. Give each one picture or more."
            )
        share = (global_batch_size * rank // num_ranks, global_batch_size * (rank + 1) // num_ranks)
        self.num_workers = num_workers
        self.bad_images: dict[str, str] = {}  # name -> what was met
        self._maker = _TrainMaker(image_set, augmentation, seed, global_batch_size, share, on_bad_image)

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """Yield the batches of steps start_step .. stop_step-1.

        Raises: BadImageError at the first bad file where `on_bad_image` is "stop"; DataError if no file can be read.
        """
        return _run(self._maker, range(start_step, stop_step), self.num_workers, self.bad_images)


class EvaluationLoader:
    """Preprocessed batches of every picture once, in order."""

    def __init__(
        self,
        image_set: ImageSet,
        preprocessing: Preprocessing,
        *,
        batch_size: int,
        num_workers: int = 0,
    ) -> None:
        self.num_workers = num_workers
        self.bad_images: dict[str, str] = {}  # name -> what was met; these pictures are left out
        self._starts = range(0, len(image_set), batch_size)
        self._maker = _EvaluationMaker(image_set, preprocessing, batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return _run(self._maker, self._starts, self.num_workers, self.bad_images)


def _run(maker: _Maker, keys: Sequence[int], num_workers: int, bad_images: dict[str, str]) -> Iterator[Batch]:
    """Make a batch for each key, here or in workers, and gather the bad files met on the way."""
    for made in _in_workers(maker, keys, num_workers) if num_workers else (maker[key] for key in keys):
        for name, reason in made.bad.items():
            bad_images.setdefault(name, reason)
        if made.error is not None:
            raise made.error
        if made.batch is not None:
            yield made.batch


def _in_workers(maker: _Maker, keys: Sequence[int], num_workers: int) -> Iterator[_Made]:
    """Make the batches in spawned processes, two ahead in each, and yield them in the keys' order."""
    loader: DataLoader[_Made] = DataLoader(
        _AsDataset(maker),
        batch_size=None,
        sampler=keys,
        num_workers=min(num_workers, max(1, len(keys))),
        collate_fn=_unchanged,
        worker_init_fn=_start_worker,
        multiprocessing_context="spawn",  # forking a process that holds threads, as torch's does, can hang
        generator=torch.Generator(),  # or else the loader would draw from the global one, which the training uses
    )
    yield from loader


class _AsDataset(Dataset[_Made]):
    def __init__(self, maker: _Maker) -> None:
        self.maker = maker

    def __getitem__(self, index: int) -> _Made:
        return self.maker[index]


def _unchanged(made: Any) -> Any:
    return made


def _start_worker(worker_id: int) -> None:  # noqa: ARG001 - the caller gives it
    """Leave the cores to the training and Ctrl-C to the parent, whose end is the workers' end."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclass
class _TrainMaker:
    """Make a step's batch from nothing but its number; lives in the parent or, pickled, in each worker."""

    image_set: ImageSet
    augmentation: Augmentation
    seed: int
    global_batch_size: int
    share: tuple[int, int]
    on_bad_image: Literal["skip", "stop"]
    known_bad: dict[int, str] = field(default_factory=dict[int, str])  # index -> what was met

    def __getitem__(self, step: int, /) -> _Made:
        start, stop = (step * self.global_batch_size + edge for edge in self.share)
        epochs, indices = draws.order(self.seed, len(self.image_set), start, stop)
        held, positions = self.image_set, torch.arange(start, stop)
        if isinstance(held, ArrayImages) and self.augmentation.only_moves(held.pixels.shape[1:]):
            numbers = draws.first_uniforms(self.seed, "augment", epochs, positions.numpy(), 3)
            moved = self.augmentation.move(held.pixels[held.rows[indices]], numbers)
            return _Made(self._erased(moved, held.targets[indices], positions, epochs))
        images, taken, bad = list[Tensor](), list[int](), dict[str, str]()
        try:
            for position, epoch, index in zip(range(start, stop), epochs.tolist(), indices.tolist(), strict=True):
                image, index = self._read_from(index, (epoch, position), bad)
                images.append(image)
                taken.append(index)
        except DataError as error:
            return _Made(None, bad, error)
        return _Made(self._erased(torch.stack(images), self.image_set.targets[taken], positions, epochs), bad)

    def _erased(self, images: Tensor, targets: draws.IntArray, positions: Tensor, epochs: draws.IntArray) -> Batch:
        rate = self.augmentation.config.erase_rate
        if rate:
            erase_some(images, rate, seed=self.seed, epochs=epochs, positions=positions.numpy())
        return _batch(images, targets, positions, torch.from_numpy(epochs))

    def _read_from(self, index: int, place: tuple[int, int], bad: dict[str, str]) -> tuple[Tensor, int]:
        """Read and augment the picture, or in a bad one's place the next that can be read; return it and its index."""
        n = len(self.image_set)
        for candidate in (following % n for following in range(index, index + n)):
            if candidate in self.known_bad:
                continue
            try:
                rng = draws.generator(self.seed, "augment", *place)
                read = partial(self.image_set.read, candidate)
                return self.augmentation.read(lambda min_side: read(min_side=min_side), rng), candidate  # noqa: B023
            except BadImageError as error:
                if self.on_bad_image == "stop":
                    raise
                self.known_bad[candidate] = bad[self.image_set.name(candidate)] = str(error)
        raise DataError(
            f"None of the {n} training pictures can be read. The first: {next(iter(self.known_bad.values()))}"
        )


@dataclass
class _EvaluationMaker:
    """Make the batch that starts at a given index."""

    image_set: ImageSet
    preprocessing: Preprocessing
    batch_size: int

    def __getitem__(self, start: int, /) -> _Made:
        stop = min(len(self.image_set), start + self.batch_size)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # decoders leave Python to others while they work
            found = dict(zip(range(start, stop), pool.map(self._read, range(start, stop)), strict=True))
        bad = {
            self.image_set.name(index): str(error) for index, error in found.items() if not isinstance(error, Tensor)
        }
        images = {index: image for index, image in found.items() if isinstance(image, Tensor)}
        if not images:
            return _Made(None, bad)
        positions = torch.tensor(list(images))
        targets = self.image_set.targets[list(images)]
        return _Made(_batch(torch.stack(list(images.values())), targets, positions, torch.zeros_like(positions)), bad)

    def _read(self, index: int) -> Tensor | BadImageError:
        try:
            return self.preprocessing(self.image_set.read(index))
        except BadImageError as error:
            return error


def _batch(images: Tensor, targets: draws.IntArray, positions: Tensor, epochs: Tensor) -> Batch:
    return Batch(images, torch.from_numpy(targets), positions, epochs)
