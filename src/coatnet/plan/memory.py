"""Peak memory of one update on one rank: the tape is walked forward and back, and what lies in memory is counted.

Left out: what a process takes before any network, the allocator's gaps, scratch inside the libraries, and Muon's
temporaries, which come when the maps have gone.
FSDP shards each block and, as one group, stem and head; the next block is gathered while one computes, and a block's
gradients lie there whole until they are shared out. Its parameters stay fp32, and autocast copies them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from coatnet.plan.tape import FP32, Op, Tape

Sharding = Literal["none", "ddp", "fsdp"]
PARTS = ("parameters", "gradients", "optimizer", "average", "bf16 weights", "gathered", "activations", "temporaries")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """How a rank trains: what lies there between updates, in bytes a parameter, and what is shared among ranks."""

    optimizer: float = 2 * FP32  # AdamW: two averages
    average: int = 0  # of the weights: 4 where the recipe keeps one
    sharding: Sharding = "none"
    num_ranks: int = 1
    checkpointed: bool = False
    accumulates: bool = False  # several microbatches an update: gradients lie there from the first one on

    @property
    def num_parts(self) -> int:
        """In how many parts parameters, gradients and optimizer are held."""
        return self.num_ranks if self.sharding == "fsdp" else 1


def peak_bytes(tapes: Sequence[Tape], microbatch: int, setting: Setting) -> dict[str, int]:
    """Return what lies in each part when an update by microbatches of so many images takes most."""
    walk = _Walk(microbatch, setting)
    walk.begin(tapes)
    walk.forward_and_back(tapes)
    return {part: round(walk.peak[part]) for part in PARTS}


@dataclass(slots=True)
class _Gradient:
    """A map's gradient, in bytes an image; the terms of a sum share it."""

    size: int
    num_holders: int = 1


class _Walk:
    """What lies in memory now, by part, and how it was at its highest."""

    def __init__(self, microbatch: int, setting: Setting) -> None:
        self.microbatch, self.setting = microbatch, setting
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.gradients: dict[str, _Gradient] = {}  # of the maps of the part that is gone through

    def take(self, part: str, size: float) -> None:
        self.now[part] += size  # pyright: ignore[reportArgumentType]
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()

    def give(self, part: str, size: float) -> None:
        self.now[part] -= size  # pyright: ignore[reportArgumentType]

    def take_map(self, part: str, size: int) -> None:
        self.take(part, size * self.microbatch)

    def give_map(self, part: str, size: int) -> None:
        self.give(part, size * self.microbatch)

    def computes_twice(self, tape: Tape) -> bool:
        return self.setting.checkpointed and tape.is_block

    def begin(self, tapes: Sequence[Tape]) -> None:
        """Take what lies there before the first picture's way begins."""
        setting, num_params = self.setting, sum(tape.num_params for tape in tapes)
        self.take("parameters", FP32 * num_params / setting.num_parts)
        self.take("optimizer", setting.optimizer * num_params / setting.num_parts)
        self.take("average", setting.average * num_params / setting.num_parts)
        if self._gradients_stay:
            self.take("gradients", FP32 * num_params / setting.num_parts)
        if setting.sharding == "fsdp":
            self.take("gathered", FP32 * sum(tape.num_params for tape in tapes if not tape.is_block))
        self.take_map("activations", tapes[0].maps["x"])

    def forward_and_back(self, tapes: Sequence[Tape]) -> None:
        """Compute one microbatch, from pictures to gradients."""
        for tape, following in zip(tapes, [*tapes[1:], None], strict=True):
            self.gather(tape, following)
            self.forward(tape, keep=not self.computes_twice(tape))
            if not self.computes_twice(tape) and not tape.holds_x:
                self.give_map("activations", tape.maps["x"])
            self.release(tape, following)
        self.end_forward(tapes)
        for tape, following in zip(reversed(tapes), [*reversed(tapes[:-1]), None], strict=True):
            self.gather(tape, following)
            self.backward(tape)
            self.release(tape, following)

    @property
    def _gradients_stay(self) -> bool:
        """Whether gradients lie there before they are computed; DDP's are views of its buckets, which stay."""
        return self.setting.sharding == "ddp" or self.setting.accumulates

    def gather(self, *tapes: Tape | None) -> None:
        """Take the whole parameters of a block that computes and of the one after it."""
        if self.setting.sharding == "fsdp":
            self.take("gathered", FP32 * sum(tape.num_params for tape in tapes if tape and tape.is_block))

    def release(self, *tapes: Tape | None) -> None:
        """Give them back."""
        if self.setting.sharding == "fsdp":
            self.give("gathered", FP32 * sum(tape.num_params for tape in tapes if tape and tape.is_block))

    def forward(self, tape: Tape, *, keep: bool) -> None:
        """Compute a part; `keep` what its backward pass needs. Its first map stays, its last one is taken."""
        last_use = {name: op for op in tape.ops for name in (*op.reads, *op.saves)}
        saved = {name for op in tape.ops for name in op.saves} if keep else set[str]()
        for op in tape.ops:
            self.take("bf16 weights", tape.copied(op))  # kept by autograd, else by autocast until the pass has ended
            self.take("temporaries", op.fixed)
            self.take_map("activations", tape.maps[op.writes] + (op.keeps if keep else 0))
            self.give("temporaries", op.fixed)
            for name in {*op.reads, *op.saves} - saved - {"x"}:
                if last_use[name] is op:
                    self.give_map("activations", tape.maps[name])

    def end_forward(self, tapes: Sequence[Tape]) -> None:
        """Leave autocast: copies of weights that no saved map stands beside go."""
        for tape in tapes:
            if self.computes_twice(tape):
                self.give("bf16 weights", sum(map(tape.copied, tape.ops)))

    def backward(self, tape: Tape) -> None:
        """Go back through a part: from its last map's gradient, where there is one, to its first map's."""
        last = tape.ops[-1].writes
        if "x" in self.gradients:  # what the part after this one read
            self.gradients[last] = self.gradients.pop("x")
        if self.computes_twice(tape):
            self.forward(tape, keep=True)
            self.give_map("activations", tape.maps[last])  # it is not computed again
        first_save = {name: op for op in reversed(tape.ops) for name in op.saves}
        for op in reversed(tape.ops):
            self._back_through(op, tape)
            self.give("bf16 weights", tape.copied(op))
            self.give_map("activations", op.keeps)
            for name in op.saves:
                if first_save[name] is op and (name != "x" or tape.needs_gradient):
                    self.give_map("activations", tape.maps[name])
        if self.computes_twice(tape) and not tape.holds_x:
            self.give_map("activations", tape.maps["x"])
        if self.setting.sharding == "fsdp" and tape.is_block:
            self.give("gathered", FP32 * tape.num_params)  # its whole gradients have been shared out

    def _back_through(self, op: Op, tape: Tape) -> None:
        """Turn the gradient of what an operation wrote into those of what it read and of its parameters."""
        gradient = self.gradients.pop(op.writes, None)
        transient = op.fixed + tape.copied(op)
        self.take("temporaries", transient)
        self.take_map("temporaries", op.scratch)
        for name in op.reads:
            self._add_gradient(name, gradient if op.is_sum else None, tape.maps[name])
        self._take_parameter_gradients(op.params)
        self.give("temporaries", transient)
        self.give_map("temporaries", op.scratch)
        self._drop(gradient)

    def _add_gradient(self, name: str, shared: _Gradient | None, size: int) -> None:
        """Give a map a gradient, shared or new; where it has one already, the sum takes the place of both."""
        before = self.gradients.get(name)
        if shared is not None and before is None:
            shared.num_holders += 1
            self.gradients[name] = shared
            return
        self.take_map("temporaries", size)
        self.gradients[name] = _Gradient(size)
        self._drop(before)

    def _drop(self, gradient: _Gradient | None) -> None:
        if gradient is not None:
            gradient.num_holders -= 1
            if gradient.num_holders == 0:
                self.give_map("temporaries", gradient.size)

    def _take_parameter_gradients(self, num_params: int) -> None:
        setting = self.setting
        if setting.sharding == "fsdp":
            self.take("gathered", FP32 * num_params)
        elif self._gradients_stay:
            self.take("temporaries", FP32 * num_params)  # added to what lies there
            self.give("temporaries", FP32 * num_params)
        if not self._gradients_stay:
            self.take("gradients", FP32 * num_params / setting.num_parts)
