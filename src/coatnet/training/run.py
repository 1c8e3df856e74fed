"""A run under way: what was asked, what it works on, where it stands, and how it tells of itself."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from coatnet.classifier import Classifier
from coatnet.config import TrainConfig
from coatnet.data.loader import TrainLoader
from coatnet.data.sources import DataSet, ImageSet
from coatnet.data.transforms import Preprocessing
from coatnet.evaluation.metrics import Outcome, evaluate
from coatnet.model.network import CoAtNet
from coatnet.ranks import Ranks
from coatnet.training import run_folder
from coatnet.training.checkpoint import State
from coatnet.training.stop import StopRequest


@dataclass(frozen=True)
class Tick:
    """What a progress callback hears, after each update and at each event."""

    step: int  # updates done
    num_steps: int
    epoch: float
    loss: float | None  # mean since the last evaluation
    learning_rate: float
    images_per_s: float
    eta_s: float
    message: str | None = None  # an event in words: an evaluation, a checkpoint, a note


Progress = Callable[[Tick], None]


@dataclass
class Run:
    """A run under way: what was asked, what it works on, where it stands."""

    config: TrainConfig
    ranks: Ranks
    data: DataSet
    state: State
    model: nn.Module  # the network as it is called: compiled, wrapped for ranks
    loader: TrainLoader
    preprocessing: Preprocessing
    stop: StopRequest
    listener: Progress | None  # hears what `tell` tells
    microbatch_limit: int | None = None  # pictures at once, after memory ran out
    loss: float = 0.0  # of the newest update, mean over the global batch
    grad_norm: float = 0.0
    is_over: bool = False  # done, not stopped

    def __post_init__(self) -> None:
        self._first_step, self._first_s = self.state.step, time.perf_counter()  # of this piece of the run
        self._zero_s = self._first_s - self.state.elapsed_s  # clock at which elapsed time was 0

    @property
    def network(self) -> CoAtNet:
        """The plain network whose weights learn."""
        assert isinstance(self.state.network, CoAtNet)
        return self.state.network

    @property
    def num_steps(self) -> int:
        """Updates in the whole run."""
        return max(1, round(self.config.num_epochs * len(self.data.train) / self.config.global_batch_size))

    @property
    def epoch(self) -> float:
        """Passes over the training pictures done so far."""
        return self.epoch_of(self.state.step)

    def epoch_of(self, step: int) -> float:
        """Return the passes over the training pictures that so many updates are."""
        return step * self.config.global_batch_size / len(self.data.train)

    @property
    def numbers_are_finite(self) -> bool:
        """Whether the newest update's loss and gradient are numbers, on all ranks alike."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def microbatch_size(self) -> int:
        """Pictures a rank holds at once."""
        share = self.config.global_batch_size // self.ranks.size
        sizes = (share, self.config.microbatch_size, self.microbatch_limit)
        return min(size for size in sizes if size is not None)

    @property
    def evaluation_batch_size(self) -> int:
        """Pictures looked at together: twice what a rank holds in training, 256 at most."""
        return min(256, 2 * self.microbatch_size)

    def look_at_clock(self) -> None:
        """Note the time spent, rank 0's on every rank; all ranks must look."""
        self.state.elapsed_s = self.ranks.first_says(time.perf_counter() - self._zero_s)

    def progress(self) -> float:
        """Share of the run that is done, 0 .. 1: of its updates, or of its time where that is limited."""
        share = self.state.step / self.num_steps
        if self.config.max_time_s is not None:
            share = max(share, self.state.elapsed_s / self.config.max_time_s)
        return min(1.0, share)

    def classifier(self) -> Classifier | None:
        """Return, on rank 0 alone, the network as it is used after training: its average, where one is kept.

        All ranks must ask: a network that is divided over them is gathered.
        """
        network = self.network if self.state.ema is None else self.state.ema.network
        assert isinstance(network, CoAtNet)
        gathered = self.ranks.gather(network) if self.config.shard else None
        if not self.ranks.is_first:
            return None
        if gathered is not None:
            with torch.device("meta"):  # no memory, no start values
                network = CoAtNet(self.config.model)
            network.load_state_dict(gathered, assign=True)
        return Classifier(
            network=network,
            preprocessing=self.preprocessing,
            labels=self.data.class_names,
            loss=self.config.loss,
            device=self.ranks.device,
        )

    def look_at(self, classifier: Classifier, image_set: ImageSet) -> Outcome:
        """Ask a classifier about every picture that can be read. Raises: StopAsked."""
        classifier.optimize()
        return evaluate(
            classifier,
            image_set,
            batch_size=self.evaluation_batch_size,
            num_workers=self.config.num_workers,
            progress=lambda _done: self.stop.look(),
        )

    def note_microbatch_size(self, size: int) -> None:
        """Take so many pictures at once from now on, in this piece of the run and those to come."""
        self.microbatch_limit = size
        run_folder.write_microbatch_size(Path(self.config.out), size)

    def tell(self, message: str | None = None) -> None:
        """Report where the run stands, with an event in words or without."""
        if self.listener is None:
            return
        state, share = self.state, self.progress()
        taken_s = time.perf_counter() - self._first_s
        num_images = (state.step - self._first_step) * self.config.global_batch_size
        self.listener(
            Tick(
                step=state.step,
                num_steps=self.num_steps,
                epoch=self.epoch,
                loss=state.loss_sum / state.num_losses if state.num_losses else None,
                learning_rate=self.state.rate,
                images_per_s=num_images / max(1e-9, taken_s),
                eta_s=state.elapsed_s * (1 - share) / share if share > 0 else 0.0,
                message=message,
            )
        )
