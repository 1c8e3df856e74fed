"""Initial weights, biases zero, norms the identity.

"normal": deviation 0.02. Source: near-official code (inferred).
"fan_in": deviation 1 / sqrt(fan in). Ours, for narrow networks and short runs: with 0.02 their layers pass on next to
nothing (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import nn
from torch.overrides import TorchFunctionMode

from coatnet.model.attention import RelativeBias

WEIGHT_STD = 0.02


def init_weights(module: nn.Module, style: Literal["normal", "fan_in"] = "normal") -> None:
    """Set one module's own parameters and statistics; for `nn.Module.apply`.

    It sets all there is, so that a network built on the meta device starts whole after `to_empty` and this.
    """
    if isinstance(module, nn.Conv2d | nn.Linear):
        fan_in = module.weight[0].numel()
        nn.init.normal_(module.weight, std=WEIGHT_STD if style == "normal" else fan_in**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, RelativeBias):
        nn.init.normal_(module.table, std=WEIGHT_STD)
    elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
        module.reset_parameters()


class NoInit(TorchFunctionMode):
    """Within it, networks are built without start values: for weights that are read from a file right after."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
