"""Initial weights: normal with deviation 0.02, biases zero, norms the identity. Source: near-official (inferred)."""

from __future__ import annotations

from torch import nn

from coatnet.model.attention import RelativeBias

WEIGHT_STD = 0.02


def init_weights(module: nn.Module) -> None:
    """Set one module's own parameters and statistics; for `nn.Module.apply`.

    It sets all there is, so that a network built on the meta device starts whole after `to_empty` and this.
    """
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.normal_(module.weight, std=WEIGHT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, RelativeBias):
        nn.init.normal_(module.table, std=WEIGHT_STD)
    elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
        module.reset_parameters()
