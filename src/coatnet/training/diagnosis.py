"""Why the numbers of an update are none: the weights, the pictures, a layer's output, or a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from coatnet.data.loader import Batch
from coatnet.training.run import Run
from coatnet.training.update import MAX_SKIPPED, loss_of_batch


def diagnose(run: Run, batch: Batch) -> str:
    """Say what was met and where it begins; the batch is gone through once more."""
    return (
        f"Step {run.state.step}: the loss is {run.loss:.4g} at rate {run.state.rate:.3g}, gradient norm "
        f"{run.grad_norm:.4g}, and {MAX_SKIPPED} updates in a row were no better. {_where(run, batch)}"
    )


def _where(run: Run, batch: Batch) -> str:
    for name, tensor in run.network.state_dict().items():
        if not _is_finite(tensor):
            return f"First to be no number: the weight {name}."
    first: list[str] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, n=name: _note(first, n, output))
        for name, module in run.network.named_modules()
        if name
    ]
    try:
        loss = loss_of_batch(run, next(batch.split(run.microbatch_size)))
        if not first:
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    if first:
        return f"First to be no number: the output of {first[0]}."
    bad = [name for name, p in run.network.named_parameters() if p.grad is not None and not _is_finite(p.grad)]
    run.network.zero_grad()
    return f"First to be no number: the gradient of {bad[-1]}." if bad else "The first pictures alone give numbers."


def _note(first: list[str], name: str, output: object) -> None:
    if isinstance(output, Tensor) and not first and not _is_finite(output):
        first.append(name)


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.detach()).all())
