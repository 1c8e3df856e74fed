"""CoAtNet: convolution and attention for all data sizes (arXiv 2106.04803), exact, trained by one command."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from coatnet.classifier import Classifier as Classifier
    from coatnet.classifier import load as load
    from coatnet.config import TrainConfig as TrainConfig
    from coatnet.fast.engines import optimize as optimize
    from coatnet.model.create import create_model as create_model
    from coatnet.model.create import list_models as list_models
    from coatnet.training.choices import choose_config as choose_config
    from coatnet.training.loop import train as train

# Public name -> where it lives. Looked up at first use, so that `import coatnet` needs no torch.
_PUBLIC = {
    "Classifier": "coatnet.classifier",
    "TrainConfig": "coatnet.config",
    "choose_config": "coatnet.training.choices",
    "create_model": "coatnet.model.create",
    "list_models": "coatnet.model.create",
    "load": "coatnet.classifier",
    "optimize": "coatnet.fast.engines",
    "train": "coatnet.training.loop",
}
__all__ = [
    "Classifier", "TrainConfig", "__version__", "choose_config", "create_model", "list_models", "load", "optimize",
    "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'coatnet' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
