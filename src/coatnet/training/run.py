"""A run under way: what was asked, what it works on, where it stands, and how it tells of itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from coatnet.classifier import Classifier
from coatnet.config import TrainConfig
from coatnet.data.loader import TrainLoader
from coatnet.data.sources import DataSet, ImageSet
from coatnet.data.transforms import Preprocessing
from coatnet.evaluation.metrics import Outcome, evaluate
from coatnet.model.network import CoAtNet
from coatnet.ranks import Ranks
from coatnet.training.checkpoint import State


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


@dataclass(frozen=True)
class Update:
    """What is known of an update once its gradient is there; on an accelerator the tensors are looked at later."""

    step: int
    rate: float
    loss: Tensor  # scalar, mean over the global batch
    grad_norm: Tensor  # scalar


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
    listener: Progress | None  # hears what `tell` tells
    rate: float = 0.0  # of the newest update
    unread: list[Update] = field(default_factory=list[Update])  # not yet in the state's mean loss

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
        return self.state.step * self.config.global_batch_size / len(self.data.train)

    @property
    def evaluation_batch_size(self) -> int:
        """Pictures looked at together: twice what a rank holds in training, 256 at most."""
        held = self.config.microbatch_size or self.config.global_batch_size // self.ranks.size
        return min(256, 2 * held)

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
        """Ask a classifier about every picture that can be read."""
        classifier.optimize()
        return evaluate(
            classifier, image_set, batch_size=self.evaluation_batch_size, num_workers=self.config.num_workers
        )

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
                learning_rate=self.rate,
                images_per_s=num_images / max(1e-9, taken_s),
                eta_s=state.elapsed_s * (1 - share) / share if share > 0 else 0.0,
                message=message,
            )
        )
