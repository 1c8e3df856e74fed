"""One training run, from a config to a run folder: the same lines for one rank and many, new, resumed, fine-tuned."""

from __future__ import annotations

import math
import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from coatnet.config import TrainConfig
from coatnet.data.loader import Batch, TrainLoader
from coatnet.data.sources import DataSet, ImageSet, open_data
from coatnet.data.transforms import Augmentation, Preprocessing
from coatnet.errors import BadImageError, ConfigError, SpoiltModelError, TrainingError
from coatnet.evaluation.metrics import summarise
from coatnet.fast.training import for_training
from coatnet.model.network import CoAtNet
from coatnet.ranks import Ranks, join
from coatnet.training import checkpoint, run_folder
from coatnet.training.diagnosis import diagnose
from coatnet.training.ema import Ema
from coatnet.training.finish import Result, finish
from coatnet.training.optimizer import make_optimizers
from coatnet.training.run import Progress, Run
from coatnet.training.saver import DISK_ERRORS, Saver, could_not_write
from coatnet.training.start import build, freeze, initialise
from coatnet.training.stop import StopAsked, StopRequest, listening
from coatnet.training.synced_norm import synchronise
from coatnet.training.update import MAX_SKIPPED, step


def train(config: TrainConfig, *, start: run_folder.Start = "new", progress: Progress | None = None) -> Result:
    """Train as the config says and leave a run folder with model, report and record.

    "resume" goes on from the newest good checkpoint. Ctrl-C leaves a checkpoint and a model and returns what is there;
    SIGTERM does the same at once, without a look at the pictures set apart.
    Raises: TrainingError, DataError, ConfigError, ModelFileError.
    """
    with join(config.device) as ranks, listening() as stop:
        resumes = bool(ranks.first_says(ranks.is_first and run_folder.check(config, start)))
        run = _set_up(config, ranks, stop, resumes, progress)
        if ranks.is_first and not resumes:
            run_folder.begin(config, run.data, ranks.size)
        ranks.wait()
        retention = checkpoint.Retention(num_last=config.keep_last, best=config.keep_best, every=config.keep_every)
        saver = Saver(Path(config.out), retention, run.tell)
        try:
            _train_to_end(run, saver)
        finally:
            saver.close()
        return finish(run)


def _set_up(config: TrainConfig, ranks: Ranks, stop: StopRequest, resumes: bool, progress: Progress | None) -> Run:
    """Build all that the run works on; it writes nothing."""
    folder = Path(config.out)
    split = run_folder.read_split(folder) if resumes else None
    data = open_data(
        config.data,
        seed=config.seed,
        holdout_percent=config.holdout_percent,
        train_percent=config.train_percent,
        split=split,
    )
    _check_fits(config, data, ranks)
    found, notes = _find_checkpoint(config, data) if resumes else (None, [])
    network = build(config.model, config.seed)
    if config.init and found is None:
        notes += initialise(network, Path(config.init), data.class_names)
    network.activation_checkpointing = config.activation_checkpointing
    if config.sync_batch_norm:
        synchronise(network, ranks)
    if config.freeze:
        freeze(network, config.freeze)
    ema = Ema(network, config.ema_decay) if config.ema_decay is not None else None
    for each in [network] if ema is None else [network, ema.network]:
        _place(each, config, ranks)
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
        model=_as_called(network, config, ranks),
        loader=loader,
        preprocessing=Preprocessing(config.preprocessing),
        stop=stop,
        listener=progress if ranks.is_first else None,
        microbatch_limit=run_folder.read_microbatch_size(folder) if resumes else None,
    )
    for note in notes:
        run.tell(note)
    return run


def _place(network: nn.Module, config: TrainConfig, ranks: Ranks) -> None:
    """Bring a network to this rank's device, whole or, where the config says so, this rank's rows of it."""
    assert isinstance(network, CoAtNet)
    if config.shard:
        ranks.shard(network, [network.s0, *network.blocks])
    else:
        network.to(device=ranks.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _as_called(network: CoAtNet, config: TrainConfig, ranks: Ranks) -> nn.Module:
    """Return a placed network as an update calls it: compiled or with fused blocks, its gradients averaged over ranks.

    Where it is divided over ranks it is that already, and its blocks are the readable ones: the fused keep weights.
    """
    if config.shard:
        return network
    return ranks.wrap(for_training(network, compiled=config.compile))


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
    held = config.microbatch_size or share
    if config.augment.mixes and (share % 2 or held % 2):
        raise ConfigError(
            f"Mixing takes pictures in pairs, but a rank's share is {share} and a microbatch {held}. Make both even."
        )
    if config.patience_epochs is not None and data.val is None:
        raise ConfigError(
            f"Patience waits for validation to improve, but no picture of {config.data} is set apart for it. "
            "Give holdout_percent, or no patience_epochs."
        )


def _find_checkpoint(config: TrainConfig, data: DataSet) -> tuple[Path | None, list[str]]:
    """Return what to resume from, None for a run that was ended before its first checkpoint, and notes on damage.

    Raises: TrainingError if every checkpoint is damaged; DataError if the pictures are others than at the start.
    """
    folder = Path(config.out)
    run_folder.check_data(folder, data)
    found, damage = checkpoint.find_newest(folder, keeps_average=config.ema_decay is not None)
    if found is None and damage:
        raise TrainingError(
            f"None of the {len(damage)} checkpoints of {folder} is whole. {damage[0]} "
            "Bring back a copy of one, or begin anew with --overwrite."
        )
    return found, damage


def _train_to_end(run: Run, saver: Saver) -> None:
    """Update until the run is done or somebody asks it to stop."""
    saved_s = run.state.elapsed_s
    for batch in chain([None], _batches(run)):  # None: an evaluation that a stopped run still has to make
        if batch is not None:
            _update(run, batch, saver)
        elif not _is_due(run):
            continue
        is_due, has_improved = _is_due(run), False
        try:
            has_improved = is_due and _evaluate(run)
        except StopAsked:
            is_due = False  # it is made when the run goes on
        except SpoiltModelError as error:
            _give_up(run, str(error), saver)
        run.is_over = _is_over(run) and not _is_due(run)
        stop = _is_asked_to_stop(run)
        is_to_use = has_improved if _keeps_best(run) else is_due or stop
        if is_to_use:
            _save_model(run)
        is_time = run.state.elapsed_s - saved_s > run.config.checkpoint_interval_s and not run.state.num_skipped_in_row
        if run.is_over or stop or is_time or (has_improved and run.config.keep_best):
            run.state.is_best = has_improved
            _save(run, saver, at_once=run.is_over or stop)
            saved_s = run.state.elapsed_s
        if run.is_over or stop:
            return
    run.is_over = True


def _update(run: Run, batch: Batch, saver: Saver) -> None:
    """Update once and say so; go back and stop where numbers stay none. Raises: TrainingError."""
    is_good = step(run, batch)
    run.look_at_clock()
    saver.look(is_good=is_good)
    if not is_good:
        run.tell(f"step {run.state.step}: loss {run.loss:.4g}, gradient norm {run.grad_norm:.4g}: update skipped")
    if run.state.num_skipped_in_row >= MAX_SKIPPED:
        _give_up(run, diagnose(run, batch), saver)
    run.tell()


def _give_up(run: Run, why: str, saver: Saver) -> NoReturn:
    """Go back to the last good checkpoint, leave its model, and stop. Raises: TrainingError."""
    saver.wait()
    newest, _ = checkpoint.find_newest(Path(run.config.out), keeps_average=run.state.ema is not None)
    where = "There is no checkpoint from before."
    if newest is not None:
        checkpoint.load(newest, run.state)
        _save_model(run)
        where = f"{run.config.out} is back at the last good checkpoint, {newest.name}."
    raise TrainingError(
        f"{why}\n{where} Lower the peak rate (--peak-lr) or train in fp32, and begin anew (--overwrite)."
    )


def _is_asked_to_stop(run: Run) -> bool:
    """Return whether any rank was asked to stop, and note on all of them by what."""
    if not run.ranks.any(run.stop.asked is not None):
        return False
    is_urgent = run.ranks.any(run.stop.asked == signal.SIGTERM)
    run.stop.asked = signal.SIGTERM if is_urgent else signal.SIGINT
    return True


def _batches(run: Run) -> Iterator[Batch]:
    """Yield what is left; of a run that has not begun a batch at least, however short its time."""
    if run.state.step == 0 or not _is_over(run):
        yield from run.loader.batches(run.state.step, run.num_steps)


def _is_over(run: Run) -> bool:
    return run.progress() >= 1.0 or _is_stale(run)


def _is_due(run: Run) -> bool:
    """Return whether an evaluation is to be made now; it follows from the steps alone, in a resumed run too."""
    interval = run.config.evaluation_interval_epochs
    evaluated = run.state.history[-1]["step"] if run.state.history else 0
    next_epoch = (run.epoch_of(evaluated) // interval + 1) * interval
    return run.state.step > evaluated and (run.progress() >= 1.0 or run.epoch >= next_epoch)


def _evaluate(run: Run) -> bool:
    """Add a row to the history; return whether validation found more right than ever before. Raises: StopAsked."""
    state, best_before = run.state, run.state.best_top1_percent
    row: dict[str, Any] = {
        "step": state.step,
        "epoch": round(run.epoch, 6),
        "lr": run.state.rate,
        "train_loss": state.loss_sum / state.num_losses if state.num_losses else math.nan,
    }
    if run.data.val is not None:
        row |= _validate(run, run.data.val)
    if state.num_skipped:
        row["num_skipped"] = state.num_skipped
    state.loss_sum, state.num_losses = 0.0, 0
    state.history.append(row)
    run.look_at_clock()
    if run.ranks.is_first:
        with _disk_may_fail(run, "metrics.jsonl"):
            run_folder.write_history(Path(run.config.out), state.history)
        run.tell(_in_words(row))
    return state.best_top1_percent != best_before


def _validate(run: Run, val: ImageSet) -> dict[str, float]:
    """Return what rank 0 finds on the pictures set apart, and note whether it is the best so far.

    Raises, on every rank: BadImageError if a file cannot be read and the config says to stop at one; StopAsked if
    rank 0 was asked to stop at once.
    """
    state, figures, bad_images, was_stopped = run.state, (0.0, 0.0), dict[str, str](), False
    classifier = run.classifier()
    if classifier is not None:
        try:
            outcome = run.look_at(classifier, val)
        except StopAsked:
            was_stopped = True
        else:
            summary, bad_images = summarise(outcome), outcome.bad_images
            figures = (summary.loss, summary.top1_percent)
    if run.ranks.first_says(was_stopped):
        raise StopAsked
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
    classifier = run.classifier()
    if classifier is not None:
        extra = {"step": run.state.step, "recipe": run.config.recipe}
        with _disk_may_fail(run, "the model"):
            classifier.save(Path(run.config.out) / "model", extra=extra)


@contextmanager
def _disk_may_fail(run: Run, what: str) -> Generator[None]:
    """Go on where a disk is full or fails: what was written before is whole."""
    try:
        yield
    except DISK_ERRORS as error:
        run.tell(could_not_write(what, Path(run.config.out), error))


def _is_stale(run: Run) -> bool:
    """Return whether validation has not improved for as long as the config's patience."""
    patience, history = run.config.patience_epochs, run.state.history
    return patience is not None and bool(history) and history[-1]["epoch"] - run.state.best_epoch >= patience


def _save(run: Run, saver: Saver, *, at_once: bool) -> None:
    run.state.bad_images = run.ranks.union(run.loader.bad_images)
    if run.config.shard:
        run.state.num_saves += 1
        with _disk_may_fail(run, f"the checkpoint of step {run.state.step}"):
            checkpoint.save_shards(Path(run.config.out), run.state, run.ranks, saver.retention)
    elif run.ranks.is_first:
        saver.save(run.state, at_once=at_once)


def _in_words(row: dict[str, Any]) -> str:
    words = f"epoch {row['epoch']:.4g}  training loss {row['train_loss']:.4f}"
    if "val_loss" in row:
        words += f"  validation loss {row['val_loss']:.4f}  top-1 {row['val_top1_percent']:.2f} %"
    return words
