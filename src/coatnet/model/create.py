"""The networks by name."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from coatnet import zoo
from coatnet.config import ModelConfig, Size
from coatnet.errors import ConfigError, name_hint

if TYPE_CHECKING:
    from coatnet.model.network import CoAtNet


def list_models() -> list[str]:
    """Return every name that `create_model` takes, small to large."""
    return list(zoo.ZOO)


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    image_size: int | Size | None = None,
    in_channels: int = 3,
    **overrides: Any,
) -> CoAtNet:
    """Build a network with new weights: images (B, in_channels, H, W) float -> logits (B, num_classes).

    `image_size`, px or (height, width), is the size whose grid the bias tables fit; absent, the row's own. Overrides
    are fields of ModelConfig: `create_model("coatnet_0", layout="CTTT", relative_attention="post")`.
    Raises: ConfigError for an unknown name or field, or a value out of range.
    """
    config = model_config(
        name, num_classes=num_classes, image_size=image_size, in_channels=in_channels, overrides=overrides
    )
    from coatnet.model.network import CoAtNet  # torch loads only when a network is built

    return CoAtNet(config)


def model_config(
    name: str, *, num_classes: int, image_size: int | Size | None, in_channels: int, overrides: dict[str, Any]
) -> ModelConfig:
    """Return the config of a row with changes. Raises: ConfigError."""
    row = zoo.find(name).config
    known = [field.name for field in fields(ModelConfig)]
    for key in overrides:
        if key not in known:
            raise ConfigError(f"create_model has no setting '{key}'. {name_hint(key, known)}")
    size = row.image_size if image_size is None else image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in overrides.items()}
    return replace(row, num_classes=num_classes, image_size=size, in_channels=in_channels, **plain)
