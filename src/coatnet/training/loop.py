"""One training run, from a config to a run folder: the same lines for one rank and many, new, resumed, fine-tuned."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coatnet.config import TrainConfig
from coatnet.data import draws
from coatnet.data.loader import Batch, TrainLoader
from coatnet.data.mixing import mix
from coatnet.data.sources import DataSet, ImageSet, open_data
from coatnet.data.transforms import Augmentation, Preprocessing
from coatnet.errors import BadImageError, ConfigError, TrainingError
from coatnet.evaluation.metrics import summarise
from coatnet.fast.training import for_training
from coatnet.ranks import Ranks, join
from coatnet.training import checkpoint, run_folder
from coatnet.training.ema import Ema
from coatnet.training.finish import Result, finish
from coatnet.training.losses import loss_of, soft_targets
from coatnet.training.optimizer import learning_rate, make_optimizers, set_rate
from coatnet.training.run import Progress, Run, Update
from coatnet.training.start import build, freeze, initialise, to_train_mode

NUM_UNREAD = 20  # on an accelerator a look at the loss stops the queue, so only every so many are looked at
WARMUP_SHARE = 0.25  # of a run that ends by the clock, at most


def train(config: TrainConfig, *, start: run_folder.Start = "new", progress: Progress | None = None) -> Result:
    """Train as the config says and leave a run folder with model, report and record.

    "resume" goes on from the newest good checkpoint; Ctrl-C leaves a checkpoint and a model and returns what is there.
    Raises: TrainingError, DataError, ConfigError, ModelFileError.
    """
    with join(config.device) as ranks:
        if ranks.is_first:
            run_folder.check(config, start)
        run = _set_up(config, ranks, start == "resume", progress)
        if ranks.is_first and start != "resume":
            run_folder.begin(config, run.data.split)
        ranks.wait()
        was_interrupted = _train_to_end(run)
        return finish(run, was_interrupted)


def _set_up(config: TrainConfig, ranks: Ranks, resumes: bool, progress: Progress | None) -> Run:
    """Build all that the run works on; it writes nothing."""
    folder = Path(config.out)
    split = run_folder.read_split(folder) if resumes else None
    data = open_data(config.data, seed=config.seed, holdout_percent=config.holdout_percent, split=split)
    _check_fits(config, data, ranks)
    keeps_average = config.ema_decay is not None
    found, notes = checkpoint.find_newest(folder, keeps_average=keeps_average) if resumes else (None, [])
    network = build(config.model, config.seed)
    if config.init and found is None:
        notes += initialise(network, Path(config.init), data.class_names)
    network.to(device=ranks.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    network.activation_checkpointing = config.activation_checkpointing
    if config.freeze:
        freeze(network, config.freeze)
    ema = Ema(network, config.ema_decay) if config.ema_decay is not None else None
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    state = checkpoint.State(network, make_optimizers(network, config.optimizer, dtype), ema)
    if found is not None:
        checkpoint.load(found, state)
    if resumes:
        notes.append(f"resumed from {found.name}" if found else "no checkpoint to resume from: begun anew")
    loader = TrainLoader(
        data.train,
        Augmentation(config.augment, config.preprocessing),
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        rank=ranks.rank,
        num_ranks=ranks.size,
        num_workers=config.num_workers,
        on_bad_image=config.on_bad_image,
    )
    loader.bad_images |= state.bad_images
    run = Run(
        config=config,
        ranks=ranks,
        data=data,
        state=state,
        model=ranks.wrap(for_training(network, compiled=config.compile)),
        loader=loader,
        preprocessing=Preprocessing(config.preprocessing),
        listener=progress if ranks.is_first else None,
    )
    for note in notes:
        run.tell(note)
    return run


def _check_fits(config: TrainConfig, data: DataSet, ranks: Ranks) -> None:
    """Raise ConfigError where data, ranks and config are at odds."""
    if len(data.class_names) != config.model.num_classes:
        raise ConfigError(
            f"{config.data} has {len(data.class_names)} classes, the model {config.model.num_classes}. "
            "Give num_classes the number of classes."
        )
    share, rest = divmod(config.global_batch_size, ranks.size)
    if rest:
        raise ConfigError(
            f"A batch of {config.global_batch_size} has no equal shares for {ranks.size} ranks. Give a multiple of it."
        )
    mixes = config.augment.mixup_alpha is not None or config.augment.cutmix_alpha is not None
    held = config.microbatch_size or share
    if mixes and (share % 2 or held % 2):
        raise ConfigError(
            f"Mixing takes pictures in pairs, but a rank's share is {share} and a microbatch {held}. Make both even."
        )
    if config.patience_epochs is not None and data.val is None:
        raise ConfigError(
            f"Patience waits for validation to improve, but no picture of {config.data} is set apart for it. "
            "Give holdout_percent, or no patience_epochs."
        )


def _train_to_end(run: Run) -> bool:
    """Update until the run is done; return whether Ctrl-C ended it before."""
    saved_s = run.state.elapsed_s
    next_evaluation = _next_evaluation(run)
    with _asked_to_stop() as asked:
        for batch in _batches(run):
            _step(run, batch)
            run.look_at_clock()
            run.tell()
            done = run.progress() >= 1.0
            is_due = done or run.epoch >= next_evaluation
            has_improved = is_due and _evaluate(run)
            next_evaluation = _next_evaluation(run)
            done = done or _is_stale(run)
            stop = run.ranks.any(bool(asked))
            if has_improved if _keeps_best(run) else is_due or stop:
                _save_model(run)
            if done or stop or run.state.elapsed_s - saved_s > run.config.checkpoint_interval_s:
                _save(run)
                saved_s = run.state.elapsed_s
            if done or stop:
                return not done
    return False


@contextmanager
def _asked_to_stop() -> Generator[list[int]]:
    """Gather Ctrl-C instead of breaking an update in two; a second one breaks."""
    asked: list[int] = []

    def note(number: int, frame: object) -> None:  # noqa: ARG001 - the caller gives it
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread hears signals
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _batches(run: Run) -> Iterator[Batch]:
    """Yield what is left; of a run that has not begun a batch at least, however short its time."""
    if run.state.step == 0 or (run.progress() < 1.0 and not _is_stale(run)):
        yield from run.loader.batches(run.state.step, run.num_steps)


def _next_evaluation(run: Run) -> float:
    """Return the epoch of the next evaluation; it follows from the step alone, so a resumed run has the same ones."""
    interval = run.config.evaluation_interval_epochs
    return (run.epoch // interval + 1) * interval


def _step(run: Run, batch: Batch) -> None:
    """Update the weights once from this rank's share of one global batch."""
    config, state = run.config, run.state
    run.rate = _next_rate(run)
    set_rate(state.optimizers, run.rate)
    to_train_mode(run.network, config.freeze)
    loss_sum = torch.zeros((), device=run.ranks.device)
    micro_batches = list(batch.split(config.microbatch_size or len(batch)))
    for micro in micro_batches:
        with run.ranks.hold_gradients(run.model, hold=micro is not micro_batches[-1]):
            loss = _loss(run, micro) * (len(micro) / len(batch))
            loss.backward()
        loss_sum += loss.detach()
    grad_norm = nn.utils.clip_grad_norm_(run.network.parameters(), config.optimizer.max_grad_norm or float("inf"))
    run.unread.append(Update(state.step, run.rate, run.ranks.sum(loss_sum) / run.ranks.size, grad_norm))
    if run.ranks.device.type == "cpu" or len(run.unread) >= NUM_UNREAD:
        _read_losses(run)
    for optimizer in state.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    state.step += 1
    if state.ema is not None:
        state.ema.update(run.network, state.step)


def _next_rate(run: Run) -> float:
    """Return the rate of the next update. Where the clock ends the run, the warm-up hurries to end in time."""
    config, state, progress = run.config.optimizer, run.state, run.progress()
    hurry = 0.0 if run.config.max_time_s is None else progress / WARMUP_SHARE
    if state.step <= config.warmup_steps and hurry <= 1:
        state.warmup_share = progress
    warmth = min(1.0, max((state.step + 1) / max(1, config.warmup_steps), hurry))
    return learning_rate(config, warmth, (progress - state.warmup_share) / max(1e-9, 1 - state.warmup_share))


def _loss(run: Run, micro: Batch) -> Tensor:
    """Return the mean loss of one microbatch; every draw in it is keyed to the sample's place in the order."""
    config, device = run.config, run.ranks.device
    images = run.preprocessing.normalise(micro.images.to(device, non_blocking=True))
    targets = soft_targets(micro.targets.to(device), config.model.num_classes, config.label_smoothing)
    images, targets = mix(
        images,
        targets,
        micro.positions,
        seed=config.seed,
        mixup_alpha=config.augment.mixup_alpha,
        cutmix_alpha=config.augment.cutmix_alpha,
    )
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        logits = run.model(images, _depth_draws(run, micro))
    return loss_of(config.loss, logits, targets)


def _depth_draws(run: Run, micro: Batch) -> Tensor | None:
    """Draw stochastic depth's uniform numbers, (B, branches), from each sample's place."""
    if run.config.model.stochastic_depth_rate == 0:
        return None
    epochs, positions = micro.epochs.numpy(), micro.positions.numpy()
    numbers = draws.uniforms(run.config.seed, "depth", epochs, positions, run.network.num_depth_draws)
    return torch.from_numpy(numbers).float().to(run.ranks.device)


def _read_losses(run: Run) -> None:
    """Add the newest losses to the running mean, and stop a run whose loss or gradient is no number."""
    for update in run.unread:
        loss, norm = update.loss.item(), update.grad_norm.item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"Step {update.step}: the loss is {loss:.4g} at rate {update.rate:.3g}, gradient norm {norm:.4g}. "
                "Lower the peak rate (--peak-lr) or train in fp32, and begin anew (--overwrite)."
            )
        run.state.loss_sum += loss
        run.state.num_losses += 1
    run.unread.clear()


def _evaluate(run: Run) -> bool:
    """Add a row to the history; return whether validation found more right than ever before."""
    _read_losses(run)
    state, best_before = run.state, run.state.best_top1_percent
    row: dict[str, Any] = {
        "step": state.step,
        "epoch": round(run.epoch, 6),
        "lr": run.rate,
        "train_loss": state.loss_sum / state.num_losses,
    }
    state.loss_sum, state.num_losses = 0.0, 0
    if run.data.val is not None:
        row |= _validate(run, run.data.val)
    state.history.append(row)
    run.look_at_clock()
    if run.ranks.is_first:
        run_folder.write_history(Path(run.config.out), state.history)
        run.tell(_in_words(row))
    return state.best_top1_percent != best_before


def _validate(run: Run, val: ImageSet) -> dict[str, float]:
    """Return what rank 0 finds on the pictures set apart, and note whether it is the best so far.

    Raises: BadImageError, on every rank, if a file cannot be read and the config says to stop at one.
    """
    state, figures, bad_images = run.state, (0.0, 0.0), dict[str, str]()
    if run.ranks.is_first:
        outcome = run.look_at(run.classifier(), val)
        summary, bad_images = summarise(outcome), outcome.bad_images
        figures = (summary.loss, summary.top1_percent)
    loss, top1 = (run.ranks.first_says(figure) for figure in figures)
    if run.ranks.first_says(len(bad_images)) and run.config.on_bad_image == "stop":
        raise BadImageError(next(iter(bad_images.values()), "A validation picture cannot be read, says rank 0."))
    run.loader.bad_images |= bad_images
    if state.best_top1_percent is None or top1 > state.best_top1_percent:
        state.best_top1_percent, state.best_epoch = top1, round(run.epoch, 6)
    return {"val_loss": loss, "val_top1_percent": top1}


def _keeps_best(run: Run) -> bool:
    """Return whether model/ holds the best network of the run rather than the newest."""
    return run.config.patience_epochs is not None and run.state.best_top1_percent is not None


def _save_model(run: Run) -> None:
    _read_losses(run)
    if run.ranks.is_first:
        extra = {"step": run.state.step, "recipe": run.config.recipe}
        run.classifier().save(Path(run.config.out) / "model", extra=extra)


def _is_stale(run: Run) -> bool:
    """Return whether validation has not improved for as long as the config's patience."""
    patience, history = run.config.patience_epochs, run.state.history
    return patience is not None and bool(history) and history[-1]["epoch"] - run.state.best_epoch >= patience


def _save(run: Run) -> None:
    _read_losses(run)
    run.state.bad_images = run.ranks.union(run.loader.bad_images)
    if run.ranks.is_first:
        checkpoint.save(Path(run.config.out), run.state)
    run.ranks.wait()


def _in_words(row: dict[str, Any]) -> str:
    words = f"epoch {row['epoch']:.4g}  training loss {row['train_loss']:.4f}"
    if "val_loss" in row:
        words += f"  validation loss {row['val_loss']:.4f}  top-1 {row['val_top1_percent']:.2f} %"
    return words
