"""How operations reach the kernels: one at once, or those of a function together, recorded before.

To write an operation down takes Python as long as a small one takes to be carried out, so what happens in every update
is written down once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Hashable, Iterator, Sequence
from functools import lru_cache, wraps
from mmap import ACCESS_COPY, mmap
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from coatnet import native

Fields = Tensor | int | float
Tensors = Sequence[Tensor | None]
Nested = Any  # a tensor, None, or a tuple of such
Made = TypeVar("Made", bound="tuple[Nested, ...]")
CACHE_LINE = 64  # bytes
NUM_RECORDINGS = 1024  # kept: of each stage or block for each size of image and batch
COLUMNS = {name: number for number, (name, *_) in enumerate(native.Op._fields_)}


def run(kind: str, **fields: Fields) -> None:
    """Carry out one operation, or record it; tensors stand for their addresses."""
    values = {name: value.data_ptr() if isinstance(value, Tensor) else value for name, value in fields.items()}
    op = native.Op(kind=native.KINDS[kind], **values)
    if _OURS.recorder is None:
        native.run((native.Op * 1)(op), torch.get_num_threads())
    else:
        _OURS.recorder.gathered.append((op, fields))


class _Ours(threading.local):
    """What belongs to this thread."""

    def __init__(self) -> None:
        self.recorder: _Recorder | None = None
        self.arena = np.empty(0, np.uint8)

    def arena_of(self, num_bytes: int) -> int:
        """Return the address of so many bytes, from the start of a page on.

        They come from the system and not from the heap, where an arena that became too small would leave a hole.
        """
        if self.arena.nbytes < num_bytes:
            self.arena = np.frombuffer(mmap(-1, num_bytes, access=ACCESS_COPY), np.uint8)  # a fork gets its own
        return self.arena.ctypes.data


_OURS = _Ours()


def fp32(*shape: int) -> Tensor:
    """Return memory for so many fp32 numbers, whatever torch takes otherwise."""
    return torch.empty(shape, dtype=torch.float32)


def bf16(*shape: int) -> Tensor:
    """Return memory for a bf16 map."""
    return torch.empty(shape, dtype=torch.bfloat16)


def recorded(body: Callable[..., Made]) -> Callable[..., Made]:
    """Make a function of tensors, whose work is done by `run`, write its operations down once for each size of input.

    Positional arguments and what it returns are tensors or None, or tuples of such; the others are what else the
    operations depend on. It is recorded with tensors that have no memory ("meta"): in it torch may ask for memory
    (`torch.empty` of a given dtype) and take views, and nothing else; it calls no other recorded function. What it does
    not return lies in memory that is used again as soon as no operation asks for it any more, so what goes from kernel
    to kernel is found in the caches.

    Raises: RuntimeError where torch is to do anything else; AssertionError for what breaks another of these rules.
    """

    @wraps(body)
    def carried_out(*inputs: Nested, **options: Hashable) -> Made:
        assert _OURS.recorder is None, f"{body.__name__} is called in a function that is recorded"
        given = leaves(inputs)
        signatures = tuple(x if x is None else (x.shape, x.stride(), x.dtype) for x in given)
        recording = _record(body, shape_of(inputs), signatures, tuple(options.items()))
        return cast("Made", recording.carry_out(given))

    return carried_out


def leaves(nested: Nested) -> list[Tensor | None]:
    """Return the tensors of tuples of tuples, in order."""
    found = list[Tensor | None]()
    _collect((nested,), found)
    return found


def _collect(parts: tuple[Nested, ...], found: list[Tensor | None]) -> None:
    for part in parts:
        if isinstance(part, tuple):
            _collect(cast("tuple[Nested, ...]", part), found)
        else:
            found.append(part)


def shape_of(nested: Nested) -> Any:
    """Return tuples alone, for `nest`."""
    return tuple(map(shape_of, nested)) if isinstance(nested, tuple) else None


def nest(shape: Any, tensors: Iterator[Tensor | None]) -> Nested:
    """Return tensors in tuples, as they were before `leaves`."""
    return tuple([next(tensors) if part is None else nest(part, tensors) for part in shape])


@lru_cache(NUM_RECORDINGS)
def _record(
    body: Callable[..., Nested], shape: Any, signatures: tuple[Any, ...], options: tuple[tuple[str, Hashable], ...]
) -> _Recording:
    inputs = [
        None if signature is None else torch.empty_strided(*signature[:2], dtype=signature[2], device="meta")
        for signature in signatures
    ]
    recorder = _OURS.recorder = _Recorder()
    try:
        with torch.device("meta"), recorder:
            returned = body(*nest(shape, iter(inputs)), **dict(options))
    finally:
        _OURS.recorder = None
    return _Recording(recorder, inputs, returned)


class _Recorder(TorchDispatchMode):
    """Sees what torch does in a function that is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered: list[tuple[native.Op, dict[str, Fields]]] = []
        self.made: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        has_dtype = func is not torch.ops.aten.empty.memory_format or (kwargs or {}).get("dtype")
        if "empty" in func.name() and has_dtype:
            self.made.append(found)
        elif not func.is_view:
            raise RuntimeError(
                f"A recorded function only asks for memory, of a given dtype, and takes views: not {func}."
            )
        return found


class _Recording:
    """Operations as a table of numbers, and which of these are addresses.

    An address is a base and an offset. Bases are those of inputs, of what is made and returned, and of the arena, in
    which all else lies.
    """

    def __init__(self, recorder: _Recorder, inputs: Tensors, nested: Nested) -> None:
        self.shape, returned = shape_of(nested), leaves(nested)
        results = {_storage(x) for x in returned if x is not None}
        self.made = [x for x in recorder.made if _storage(x) in results]
        apart = [*inputs, *self.made]
        bases = {_storage(x): (number, 0) for number, x in enumerate(apart) if x is not None}
        starts, self.arena_bytes = _lay_out(recorder, bases)
        bases.update((storage, (len(apart), start)) for storage, start in starts.items())
        self.returned = [None if x is None else _Returned.of(_base(x, bases)[0], x, apart) for x in returned]
        ops = (native.Op * len(recorder.gathered))(*(op for op, _ in recorder.gathered))
        self.table = np.frombuffer(bytes(ops), np.int64).copy()
        assert recorder.gathered, "nothing is recorded"
        addresses = [
            (row * len(COLUMNS) + COLUMNS[name], *_base(x, bases))
            for row, (_, fields) in enumerate(recorder.gathered)
            for name, x in fields.items()
            if isinstance(x, Tensor)
        ]
        self.places, self.bases, starts_of = np.array(addresses, np.int64).T.copy()
        self.table[self.places] += starts_of  # a tensor without memory starts at 0: there stand offsets

    def carry_out(self, inputs: Tensors) -> Nested:
        known = [*inputs, *(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu") for x in self.made)]
        addresses = [0 if x is None else x.data_ptr() for x in known]
        addresses.append(_OURS.arena_of(self.arena_bytes))
        table = self.table.copy()
        table[self.places] += np.array(addresses, np.int64)[self.bases]
        native.run((native.Op * (len(table) // len(COLUMNS))).from_buffer(table.data), torch.get_num_threads())
        return nest(self.shape, iter([None if x is None else x.found_in(known) for x in self.returned]))


class _Returned(NamedTuple):
    """Which of the known tensors is returned, and what view of it, if not all."""

    number: int
    view: tuple[torch.Size, tuple[int, ...], int] | None

    @classmethod
    def of(cls, number: int, like: Tensor, apart: Tensors) -> _Returned:
        whole = apart[number]
        assert whole is not None
        if whole.shape == like.shape and whole.stride() == like.stride() and not like.storage_offset():
            return cls(number, None)
        return cls(number, (like.shape, like.stride(), int(like.storage_offset())))

    def found_in(self, known: Tensors) -> Tensor:
        whole = known[self.number]
        assert whole is not None
        if self.view is None:
            return whole
        size, stride, offset = self.view
        return whole.as_strided(size, stride, whole.storage_offset() + offset)


def _lay_out(recorder: _Recorder, apart: Container[int]) -> tuple[dict[int, int], int]:
    """Return where in the arena each storage starts that does not lie `apart`, and how many bytes they all take.

    From its first operation to its last a storage shares its place with no other; it takes the first gap.
    """
    used = dict[int, tuple[int, int]]()
    for row, (_, fields) in enumerate(recorder.gathered):
        for storage in {_storage(x) for x in fields.values() if isinstance(x, Tensor)} - used.keys():
            used[storage] = row, row
        used.update((_storage(x), (used[_storage(x)][0], row)) for x in fields.values() if isinstance(x, Tensor))
    places, ends = list[tuple[int, int, int]](), 0  # where each starts and ends, and its last operation
    starts = dict[int, int]()
    lying = [x for x in recorder.made if _storage(x) in used and _storage(x) not in apart]
    for x in sorted(lying, key=lambda x: used[_storage(x)][0]):
        first, last = used[_storage(x)]
        places = sorted(place for place in places if place[2] >= first)
        num_bytes, start = -(-x.nbytes // CACHE_LINE) * CACHE_LINE, 0
        for begin, end, _ in places:
            if start + num_bytes <= begin:
                break
            start = max(start, end)
        places.append((start, start + num_bytes, last))
        starts[_storage(x)] = start
        ends = max(ends, start + num_bytes)
    return starts, ends


def _base(x: Tensor, bases: dict[int, tuple[int, int]]) -> tuple[int, int]:
    assert _storage(x) in bases, "a recorded function takes all tensors as arguments"
    return bases[_storage(x)]


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]  (it has no other name)
