"""A run under way: what was asked, what it works on, where it stands, and how it tells of itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from coatnet.classifier import Classifier
from coatnet.config import TrainConfig
from coatnet.data.loader import TrainLoader
from coatnet.data.sources import DataSet
from coatnet.data.transforms import Preprocessing
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
    tell: Callable[[str | None], None]
    started_s: float  # clock at which elapsed time was 0
    bad_images: dict[str, str]
    rate: float = 0.0

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

    def elapsed_s(self) -> float:
        """Seconds of training so far, over all its pieces."""
        return time.perf_counter() - self.started_s

    def progress(self) -> float:
        """Share of the run that is done, 0 .. 1: of its updates, or of its time where that is limited."""
        share = self.state.step / self.num_steps
        if self.config.max_time_s is not None:
            share = max(share, self.ranks.first_says(self.elapsed_s()) / self.config.max_time_s)
        return min(1.0, share)


def as_classifier(run: Run) -> Classifier:
    """Return the network as it is used after training: its average, where one is kept."""
    network = run.network if run.state.ema is None else run.state.ema.network
    assert isinstance(network, CoAtNet)
    return Classifier(
        network=network,
        preprocessing=run.preprocessing,
        labels=run.data.class_names,
        loss=run.config.loss,
        device=run.ranks.device,
    )


def teller(run: Run, progress: Progress | None) -> Callable[[str | None], None]:
    """Return a function that reports the run's standing, with an event in words or without."""
    first_step, first_s = run.state.step, time.perf_counter()

    def tell(message: str | None) -> None:
        if progress is None:
            return
        state, share = run.state, run.progress()
        taken_s = time.perf_counter() - first_s
        images_per_s = (state.step - first_step) * run.config.global_batch_size / max(1e-9, taken_s)
        elapsed_s = run.elapsed_s()
        progress(
            Tick(
                step=state.step,
                num_steps=run.num_steps,
                epoch=run.epoch,
                loss=state.loss_sum / state.num_losses if state.num_losses else None,
                learning_rate=run.rate,
                images_per_s=images_per_s,
                eta_s=elapsed_s * (1 - share) / share if share > 0 else 0.0,
                message=message,
            )
        )

    return tell
