"""Network, preprocessing and labels as one thing, and its folder on disk.

A model folder holds `model.safetensors` (the weights, float32), `model.json` (everything else) and `manifest.json`
(their SHA-256). Nothing in it is code, and nothing is used before its hash was checked.
"""

from __future__ import annotations

import io
import platform
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import Tensor, nn

from coatnet import __version__
from coatnet.config import ModelConfig, Precision, PreprocessingConfig
from coatnet.data.decode import Pixels, decode
from coatnet.data.transforms import Preprocessing
from coatnet.errors import BadImageError, ConfigError, DataError, ModelFileError, brief, one_line
from coatnet.fast.engines import OptimizedModel, optimize, optimize_at_once
from coatnet.files import MANIFEST, new_folder, read_json, recover, verify_folder, write_json
from coatnet.model.init import NoInit
from coatnet.model.network import CoAtNet
from coatnet.weights import Tensors, check_size, in_words, misfits, read_safetensors

FORMAT = 1  # of model.json; a reader takes this one and older ones
WEIGHTS, CARD = "model.safetensors", "model.json"
CPU_BATCH = 16  # images through the network at once: more make no processor faster, and cost memory, which costs time

Loss = Literal["softmax", "sigmoid"]
Picture: TypeAlias = str | Path | Image.Image | Pixels


class Prediction(NamedTuple):
    """One answer: the label and the probability, 0 to 1, that it is right."""

    label: str
    probability: float


@dataclass(kw_only=True)
class Classifier:
    """A network that knows how to see a picture and what to call it."""

    network: CoAtNet
    preprocessing: Preprocessing
    labels: tuple[str, ...]  # K, in the order of the logits
    loss: Loss = "softmax"  # how logits become probabilities
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    fast: OptimizedModel | None = None  # answers in the network's place, once `optimize` was called

    def __post_init__(self) -> None:
        num_classes = self.network.config.num_classes
        if len(self.labels) != num_classes or len(set(self.labels)) != len(self.labels):
            raise ConfigError(
                f"{len(self.labels)} labels, {len(set(self.labels))} of them different, for a network of {num_classes} "
                "classes. Give one label for each class, all different."
            )
        given, taken = len(self.preprocessing.config.mean), self.network.config.in_channels
        if given != taken:
            raise ConfigError(
                f"The preprocessing gives {given} channels, the network takes {taken}. "
                "Give the mean and std of as many channels as in_channels."
            )
        self.network.to(self.device)

    def predict(
        self, images: Picture | Iterable[Picture], *, k: int = 5, batch_size: int = 32
    ) -> list[list[Prediction]]:
        """Return, for each image, its `k` most probable labels, best first; fewer where the model has fewer.

        An image is a path, a PIL image or a uint8 array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).
        Raises: DataError for anything else; BadImageError for a file that cannot be read.
        """
        if k < 1 or batch_size < 1:
            raise ConfigError(f"k is {k} and batch_size {batch_size}. Both must be 1 or more.")
        one = isinstance(images, str | Path | Image.Image | np.ndarray)
        pictures = iter([images] if one else images)
        answers: list[list[Prediction]] = []
        while chunk := list(islice(pictures, batch_size)):
            seen = torch.stack([self.preprocessing(_to_array(picture)) for picture in chunk])
            best = self.probabilities(seen).topk(min(k, len(self.labels)))
            for row, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                answers.append([Prediction(self.labels[i], p) for p, i in zip(row, indices, strict=True)])
        return answers

    def optimize(self, *, precision: Precision = "fp32", may_compile: bool = False) -> None:
        """Answer by the fast form of the network as it is now; later changes to the network do not show.

        Without `may_compile` the form is one that is ready at once.
        """
        self.fast = (optimize if may_compile else optimize_at_once)(self.network, precision=precision)

    def logits(self, images: Tensor) -> Tensor:
        """Map preprocessed images (B, C, h, w) uint8 -> (B, K) float32, on the classifier's device."""
        size = CPU_BATCH if self.device.type == "cpu" else max(1, len(images))
        return torch.cat([self._logits(part) for part in images.split(size)])

    def _logits(self, images: Tensor) -> Tensor:
        if self.fast is not None:
            return self.fast(self.preprocessing.normalise(images.to(self.device, non_blocking=True)))
        with _evaluating(self.network), torch.inference_mode():
            batch = self.preprocessing.normalise(images.to(self.device, non_blocking=True))
            return self.network(batch).float()

    def probabilities(self, images: Tensor) -> Tensor:
        """Map preprocessed images (B, C, h, w) uint8 -> (B, K) float32; rows sum to 1 unless the loss is sigmoid."""
        logits = self.logits(images)
        return logits.sigmoid() if self.loss == "sigmoid" else logits.softmax(dim=1)

    def save(self, folder: Path, *, extra: dict[str, Any] | None = None) -> None:
        """Write the model folder, whole or not at all; `extra` facts go into `model.json` as they are."""
        with new_folder(folder) as aside:
            save_file(_weights(self.network), aside / WEIGHTS)
            write_json(
                aside / CARD,
                {
                    "format": FORMAT,
                    "model": self.network.config.to_dict(),
                    "preprocessing": self.preprocessing.config.to_dict(),
                    "labels": list(self.labels),
                    "loss": self.loss,
                    "versions": {
                        "coatnet": __version__,
                        "torch": torch.__version__,
                        "python": platform.python_version(),
                    },
                    "extra": extra or {},
                },
            )


def load(path: str | Path, *, device: str | torch.device = "cpu") -> Classifier:
    """Load the classifier of a run folder or a model folder, after checking every hash. No code in it is ever run.

    Raises: ModelFileError if it is missing, damaged, of a newer format, or its parts do not fit each other.
    """
    folder = _find_model(Path(path))
    card, config = _read_card(folder)
    weights = read_safetensors(folder / WEIGHTS)
    check_size(config, (folder / WEIGHTS).stat().st_size, folder / CARD)
    try:
        with NoInit():
            network = CoAtNet(config)
        classifier = Classifier(
            network=network,
            preprocessing=Preprocessing(PreprocessingConfig.from_dict(card["preprocessing"])),
            labels=tuple(card["labels"]),
            loss=card["loss"],
        )
    except ConfigError as error:
        raise ModelFileError(f"{folder / CARD}: {error}") from None
    _take_weights(network, weights, folder / WEIGHTS)
    classifier.device = torch.device(device)
    network.to(classifier.device).eval()
    return classifier


def read_model_config(path: str | Path) -> ModelConfig:
    """Return the config of the network that a run folder or a model folder holds. Raises: as `load`."""
    return _read_card(_find_model(Path(path)))[1]


def _find_model(path: Path) -> Path:
    """Return the model folder that `path` is or, as a run folder, holds."""
    recover(path.parent, path.name)
    recover(path, "model")
    for folder in (path, path / "model"):
        if any((folder / name).is_file() for name in (CARD, MANIFEST, WEIGHTS)):
            return folder
    met = (
        f"{path} holds no model"
        if path.is_dir()
        else f"{path} is no folder"
        if path.exists()
        else f"{path} is not there"
    )
    raise ModelFileError(
        f"{met}. Give the run folder of a finished `coatnet train`, which holds model/ and report.html, "
        f"or a model folder, which holds {CARD}, {WEIGHTS} and {MANIFEST}."
    )


def _read_card(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    """Check every hash; read model.json as far as its format and its keys go, and the network's config in it."""
    verify_folder(folder, (WEIGHTS, CARD))
    path = folder / CARD
    card = read_json(path)
    number = card.get("format") if isinstance(card, dict) else None
    if not isinstance(number, int):
        raise ModelFileError(f"{path} is no model card of coatnet: it has no format number.")
    if number > FORMAT:
        raise ModelFileError(
            f"{path} has format {brief(number)}, this coatnet {__version__} reads up to {FORMAT}. "
            "Upgrade coatnet to load it."
        )
    for key, kind in (("model", dict), ("preprocessing", dict), ("labels", list), ("loss", str)):
        if not isinstance(card.get(key), kind):
            raise ModelFileError(f"{path} lacks '{key}', or it is no {kind.__name__}. Save the model again.")
    for label in card["labels"]:
        if not isinstance(label, str):
            raise ModelFileError(f"{path}: labels holds {brief(label)}. Every label must be text.")
    if card["loss"] not in get_args(Loss):
        raise ModelFileError(f"{path}: loss is {brief(card['loss'])}. It must be one of {', '.join(get_args(Loss))}.")
    try:
        return card, ModelConfig.from_dict(card["model"])
    except ConfigError as error:
        raise ModelFileError(f"{path}: {error}") from None


def _weights(network: nn.Module) -> dict[str, Tensor]:
    """Return the network's state on the CPU, contiguous; what floats is float32."""
    return {
        name: tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in network.state_dict().items()
    }


def _take_weights(network: nn.Module, found: Tensors, path: Path) -> None:
    wanted = network.state_dict()
    if bad := misfits(found, wanted):
        name = bad[0]
        raise ModelFileError(
            f"{path}: {len(bad)} of {len(wanted)} tensors do not fit the network that {CARD} beside it describes.\n"
            f"  {one_line(name)}: file {in_words(found, name)}, model {in_words(wanted, name)}.\n"
            f"  Take both files from the same save."
        )
    network.load_state_dict(found)


def _to_array(picture: object) -> Pixels:
    """Return one picture as (H, W, 3) uint8. Raises: DataError for what is no picture."""
    if isinstance(picture, str | Path):
        return decode(Path(picture))
    if isinstance(picture, Image.Image):
        return _from_pil(picture)
    if isinstance(picture, np.ndarray):
        return _from_array(picture)
    raise DataError(
        f"A {type(picture).__name__} is no picture. Give a path, a PIL image or a uint8 array (H, W), (H, W, 3) or "
        "(H, W, 4), or a list of them."
    )


def _from_array(array: Pixels) -> Pixels:
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not fits or not array.size:
        raise DataError(
            f"An array of shape {array.shape} and type {array.dtype} is no picture. Give uint8, 0 to 255, of shape "
            "(H, W), (H, W, 1), (H, W, 3) or (H, W, 4); for several pictures a list of such arrays."
        )
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return _from_pil(Image.fromarray(array))


def _from_pil(image: Image.Image) -> Pixels:
    """Return an open image upright as RGB, by the rules of `decode`."""
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode in ("1", "L", "RGB") and not image.has_transparency_data:
            return np.array(image.convert("RGB"))
        # What `decode` does with transparency and 16 bits it shall do here too: hand it a file.
        if image.mode == "I":
            image = image.convert("I;16")
        if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=0)
    except MemoryError:
        raise
    except Exception as error:  # Pillow decodes late, and a damaged file makes it raise many things
        raise BadImageError(f"A PIL image of mode {image.mode} cannot be decoded: {error}.") from None
    return decode(file.getvalue(), name="PIL image")


@contextmanager
def _evaluating(network: nn.Module) -> Generator[None]:
    """Hold every part of the network in evaluation mode, then give each its own mode back."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
