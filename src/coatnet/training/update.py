"""One update of the weights, and what it does when memory runs out or a number is none.

Out of memory: this and all later updates take half as many pictures at once, gathering gradients over twice as many
pieces. No number: the weights stay, the update counts as skipped; after `MAX_SKIPPED` in a row training ends.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from coatnet.data import draws
from coatnet.data.loader import Batch
from coatnet.data.mixing import mix
from coatnet.errors import TrainingError
from coatnet.training.losses import loss_of, soft_targets
from coatnet.training.optimizer import learning_rate, set_rate
from coatnet.training.run import Run
from coatnet.training.start import to_train_mode

WARMUP_SHARE = 0.25  # of a run that ends by the clock, at most
MAX_SKIPPED = 10  # updates in a row
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")  # as allocators say it


def step(run: Run, batch: Batch) -> bool:
    """Update the weights once from this rank's share of one global batch; return whether numbers allowed it."""
    config, state = run.config, run.state
    state.rate = _next_rate(run)
    set_rate(state.optimizers, state.rate)
    to_train_mode(run.network, config.freeze)
    statistics = _Statistics(run.network)
    loss = _gather_gradients(run, batch, statistics)
    norm = nn.utils.clip_grad_norm_(run.network.parameters(), config.optimizer.max_grad_norm or float("inf"))
    run.loss, run.grad_norm = (run.ranks.sum(loss) / run.ranks.size).item(), run.ranks.whole(norm).item()
    is_good = run.numbers_are_finite
    if is_good:
        for optimizer in state.optimizers:
            optimizer.step()
        state.loss_sum += run.loss
        state.num_losses += 1
        state.num_skipped_in_row = 0
    else:
        statistics.restore()
        state.num_skipped += 1
        state.num_skipped_in_row += 1
    for optimizer in state.optimizers:
        optimizer.zero_grad(set_to_none=True)
    state.step += 1
    if state.ema is not None and is_good:
        state.ema.update(run.network, state.step)
    return is_good


class _Statistics:
    """BatchNorm's statistics before an update, to be had again where it is done anew or not at all."""

    def __init__(self, network: nn.Module) -> None:
        self._now = list(network.buffers())
        self._before = [buffer.clone() for buffer in self._now]

    def restore(self) -> None:
        for now, before in zip(self._now, self._before, strict=True):
            now.copy_(before)


def _gather_gradients(run: Run, batch: Batch, statistics: _Statistics) -> Tensor:
    """Return the mean loss of the batch with its gradients gathered, in pieces as small as memory asks for."""
    while True:
        with running_out() as ran_out:
            return _gather_once(run, batch)
        assert ran_out
        for parameter in run.network.parameters():
            parameter.grad = None
        statistics.restore()
        _halve(run, batch)


@contextmanager
def running_out() -> Generator[list[str]]:
    """Gather the error of an allocator instead of raising it, so that nothing holds on to what was allocated."""
    met: list[str] = []
    try:
        yield met
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        # Autograd keeps what was ready when a backward pass broke off until the next one: memory, and a crash at exit
        # where activations are checkpointed.
        torch.zeros((), requires_grad=True).backward()
        if not (isinstance(error, MemoryError) or any(words in str(error).lower() for words in NO_MEMORY)):
            raise
        met.append(str(error))
    if met and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _gather_once(run: Run, batch: Batch) -> Tensor:
    loss_sum = torch.zeros((), device=run.ranks.device)
    micro_batches = list(batch.split(run.microbatch_size))
    for micro in micro_batches:
        with run.ranks.hold_gradients(run.model, hold=micro is not micro_batches[-1]):
            loss = loss_of_batch(run, micro) * (len(micro) / len(batch))
            loss.backward()
        loss_sum += loss.detach()
    return loss_sum


def _halve(run: Run, batch: Batch) -> None:
    """Take half as many pictures at once from now on. Raises: TrainingError where that is not possible."""
    held, pairs = min(run.microbatch_size, len(batch)), 2 if run.config.augment.mixes else 1
    half = held // 2 // pairs * pairs
    if half == 0:
        raise TrainingError(
            f"Memory ran out with {held} pictures of {run.config.model.image_size} px at once, and fewer cannot be "
            "taken. Give --activation-checkpointing, a smaller --image-size or another --model."
        )
    run.note_microbatch_size(half)
    if run.ranks.size > 1:  # the others wait for this rank's gradients in an exchange that was broken off
        raise TrainingError(
            f"Memory ran out on rank {run.ranks.rank} with {held} pictures at once. Start again with --resume "
            f"(torchrun --max-restarts does it by itself): it will take {half}."
        )
    words = f"memory ran out with {held} pictures at once: from step {run.state.step + 1} on {half}, gradients gathered"
    if any(isinstance(module, nn.BatchNorm2d) and module.training for module in run.network.modules()):
        words += "; BatchNorm takes its statistics over these, so the run is another than with more memory"
    run.tell(words)


def _next_rate(run: Run) -> float:
    """Return the rate of the next update. Where the clock ends the run, the warm-up hurries to end in time."""
    config, state, progress = run.config.optimizer, run.state, run.progress()
    hurry = 0.0 if run.config.max_time_s is None else progress / WARMUP_SHARE
    if state.step <= config.warmup_steps and hurry <= 1:
        state.warmup_share = progress
    warmth = min(1.0, max((state.step + 1) / max(1, config.warmup_steps), hurry))
    return learning_rate(config, warmth, (progress - state.warmup_share) / max(1e-9, 1 - state.warmup_share))


def loss_of_batch(run: Run, micro: Batch) -> Tensor:
    """Return the mean loss of one microbatch; every draw in it is keyed to the sample's place in the order."""
    config, device = run.config, run.ranks.device
    images = run.preprocessing.normalise(micro.images.to(device, non_blocking=True))
    targets = soft_targets(micro.targets.to(device), config.model.num_classes, config.label_smoothing)
    if run.progress() < config.augment.mix_share:
        images, targets = mix(
            images,
            targets,
            micro.positions,
            seed=config.seed,
            mixup_alpha=config.augment.mixup_alpha,
            cutmix_alpha=config.augment.cutmix_alpha,
        )
    images = images.contiguous(memory_format=torch.channels_last)
    is_bf16, keeps_casts = config.precision == "bf16", not config.shard  # kept casts would be a whole network of them
    with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16, cache_enabled=keeps_casts):
        logits = run.model(images, _depth_draws(run, micro))
    return loss_of(config.loss, logits, targets)


def _depth_draws(run: Run, micro: Batch) -> Tensor | None:
    """Draw stochastic depth's uniform numbers, (B, branches), from each sample's place."""
    if run.config.model.stochastic_depth_rate == 0:
        return None
    epochs, positions = micro.epochs.numpy(), micro.positions.numpy()
    numbers = draws.uniforms(run.config.seed, "depth", epochs, positions, run.network.num_depth_draws)
    return torch.from_numpy(numbers).float().to(run.ranks.device)
