"""AdamW and Muon, which weights decay, and the rate at each moment. Source: Table 10, appendix A.2; Muon is ours."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from coatnet.config import OptimizerConfig

MUON_MOMENTUM = 0.95
MUON_RMS = 0.2  # of an update in units of the rate, about AdamW's own
MUON_RATE = 6.0  # times the rate of AdamW's parameters; 1 learns slower in short runs (docs/log.md)
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # steepest at 0, so that few steps do
NUM_NEWTON_SCHULZ_STEPS = 3


class Muon(Optimizer):
    """Momentum with every direction of a weight's update made equally long.

    A weight is taken as a matrix (out, in x kernel); its momentum's singular values are brought near 1, in `dtype`.
    `torch.optim.Muon` takes linear layers alone, one by one; this takes convolutions too, and equal shapes at once.
    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers"; the scale: Liu et al., arXiv 2502.16982, 2.2.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient. Closures are not taken."""
        assert closure is None
        for group in self.param_groups:
            same_shape: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    same_shape[tuple(parameter.shape)].append(parameter)
            for parameters in same_shape.values():
                self._step(parameters, MUON_RATE * group["lr"], group["weight_decay"])

    def _step(self, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        """Update parameters of one shape."""
        wanted = torch.stack([self._nesterov(parameter).flatten(1) for parameter in parameters])
        scale = MUON_RMS * math.sqrt(max(wanted.shape[1:]))
        for parameter, update in zip(parameters, orthogonalised(wanted, self.dtype), strict=True):
            parameter.mul_(1 - lr * weight_decay)
            parameter.add_(update.reshape(parameter.shape), alpha=-lr * scale)

    def _nesterov(self, parameter: nn.Parameter) -> Tensor:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradient)
        state["momentum"].lerp_(gradient, 1 - MUON_MOMENTUM)
        return gradient.lerp(state["momentum"], MUON_MOMENTUM)


def orthogonalised(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring the singular values of each matrix near 1 and keep its vectors: (K, m, n) -> the same, `dtype` inside.

    Values below a twentieth of the matrix' norm stay smaller.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(NUM_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def make_optimizers(network: nn.Module, config: OptimizerConfig, dtype: torch.dtype = torch.float32) -> list[Optimizer]:
    """Build what updates the parameters that learn, each in one optimizer; only weights of layers decay.

    Muon takes the weights that mix channels and computes in `dtype`; AdamW takes the rest: norms, biases, bias tables,
    depthwise convolutions and the classifier. Without Muon, AdamW takes all.
    """
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    weights = {id(layer.weight) for layer in layers}
    mixing = set[int]()
    if config.method == "muon":
        mixing = {id(m.weight) for m in layers if not (isinstance(m, nn.Conv2d) and m.groups > 1)}
        mixing -= {id(parameter) for parameter in network.get_submodule("classifier").parameters()}
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for_muon = [p for p in learning if id(p) in mixing]
    groups = [
        {"params": [p for p in learning if id(p) in weights - mixing], "weight_decay": config.weight_decay},
        {"params": [p for p in learning if id(p) not in weights], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.peak_lr, betas=(config.beta1, config.beta2), fused=True)
    return [adamw, *([Muon(for_muon, config.peak_lr, config.weight_decay, dtype)] if for_muon else [])]


def learning_rate(config: OptimizerConfig, warmth: float, passed: float) -> float:
    """Return the rate when `warmth` of the warm-up is done and then `passed` of what comes after it, each 0 .. 1.

    Linear from 0 to the peak, then down the schedule.
    """
    if warmth < 1:
        return config.peak_lr * warmth
    if config.schedule == "constant":
        return config.peak_lr
    left = (1 + math.cos(math.pi * passed)) / 2 if config.schedule == "cosine" else 1 - passed
    return config.min_lr + (config.peak_lr - config.min_lr) * left


def set_rate(optimizers: Sequence[Optimizer], rate: float) -> None:
    """Give every group the rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
