"""Where a run's weights begin: drawn from the seed, or taken from a trained network, and what of it stays as it is."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from coatnet.classifier import load
from coatnet.config import ModelConfig
from coatnet.errors import ModelFileError, one_line
from coatnet.model.attention import resize_table
from coatnet.model.network import CoAtNet
from coatnet.weights import REAL, SUFFIXES, Tensors, in_words, misfits, read_file

STAGES = ("s0", "s1", "s2", "s3", "s4")


def build(config: ModelConfig, seed: int) -> CoAtNet:
    """Build a network whose weights follow from the seed, leaving torch's own generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CoAtNet(config)


def read_weights(source: Path) -> tuple[Tensors, tuple[str, ...] | None]:
    """Read the weights of a run folder, a model folder or a file of tensors, and the labels where they are told.

    Raises: ModelFileError.
    """
    if source.is_dir():
        trained = load(source)
        return trained.network.state_dict(), trained.labels
    if source.suffix not in SUFFIXES:
        raise ModelFileError(f"{source} is no run, model folder, .safetensors or .pt file. Give one of these.")
    return read_file(source), None


def initialise(network: CoAtNet, source: Path, labels: tuple[str, ...]) -> list[str]:
    """Take a trained network's weights for these labels; return notes on what was adapted.

    Bias tables of another resolution are interpolated (A.1); a classifier for other classes starts anew.
    Raises: ModelFileError naming the first tensor of another network.
    """
    (found, known_labels), wanted = read_weights(source), network.state_dict()
    notes: list[str] = []
    weight = found.get("classifier.weight")
    is_other_size = weight is not None and weight.shape != wanted["classifier.weight"].shape
    if is_other_size or known_labels not in (None, labels):
        notes.append(f"the classifier starts anew: {network.config.num_classes} classes")
        found = {**found, **{name: wanted[name] for name in wanted if name.startswith("classifier.")}}
    tables = [name for name in wanted if name.endswith("bias.table") and name in found]
    resized = [name for name in tables if _is_other_size(found[name], wanted[name])]
    for name in resized:
        height, width = wanted[name].shape[1:]
        found[name] = resize_table(found[name].float(), (height, width))
    if resized:
        notes.append(f"{len(resized)} bias tables were interpolated to {network.config.image_size} px")
    if bad := misfits(found, wanted):
        name = bad[0]
        raise ModelFileError(
            f"{source}: {len(bad)} tensors are of another network. {one_line(name)}: file {in_words(found, name)}, "
            f"model {in_words(wanted, name)}. Give --model the name of the file's network."
        )
    network.load_state_dict(found)
    return notes


def _is_other_size(found: Tensor, wanted: Tensor) -> bool:
    """Return whether a bias table has the heads that are wanted, for another grid."""
    fits = found.dim() == 3 and found.numel() > 0 and found.dtype in REAL and len(found) == len(wanted)
    return fits and found.shape != wanted.shape


def freeze(network: CoAtNet, last_stage: str) -> None:
    """Keep S0 .. `last_stage` as they are: their weights do not learn, their BatchNorm statistics do not move."""
    for stage in frozen_stages(network, last_stage):
        stage.requires_grad_(False)


def frozen_stages(network: CoAtNet, last_stage: str | None) -> tuple[nn.Module, ...]:
    """Return the stages up to `last_stage`; none for None."""
    return () if last_stage is None else network.stages[: STAGES.index(last_stage.lower()) + 1]


def to_train_mode(network: CoAtNet, frozen: str | None) -> None:
    """Switch to training, the frozen stages excepted."""
    network.train()
    for stage in frozen_stages(network, frozen):
        stage.eval()
