"""The network traced: exported with a batch of any size, and compiled whole."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.export import Dim, export

from model.networks import KINDS, config_of, images, network

ROUNDING = 1e-4  # of fp32 on logits near 1, where kernels are fused
SLOWLY = pytest.mark.slow
TRAINED, OTHER = (32, 48), (37, 41)  # px
QUICK = [("CCTT", TRAINED), ("windows", OTHER), ("vit_rel", OTHER)]
EXPORTED = [
    (kind, size) if (kind, size) in QUICK else pytest.param(kind, size, marks=SLOWLY)
    for kind in KINDS
    for size in (TRAINED, OTHER)
]


@contextmanager
def torchs_own_warnings_ignored() -> Iterator[None]:
    """Tracing warns of torch's own deprecations; they are not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning, UserWarning))
        yield


@pytest.mark.parametrize(("kind", "size"), EXPORTED)
@torch.no_grad()
def test_exported_program_agrees_at_any_batch(kind: str, size: tuple[int, int]):
    model = network(config_of(kind))
    with torchs_own_warnings_ignored():
        program = export(model, (images(2, size),), dynamic_shapes={"images": {0: Dim("batch")}})
    for batch in (1, 2, 5):
        x = images(batch, size)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "backend", "sizes"),
    [
        ("CCTT", "eager", [(32, 48)]),
        pytest.param("windows", "eager", [(32, 48)], marks=SLOWLY),
        pytest.param("CCTT", "inductor", [(32, 48), (33, 20), (64, 64)], marks=SLOWLY),
        pytest.param("windows", "inductor", [(32, 48), (33, 20)], marks=SLOWLY),
        pytest.param("vit_rel", "inductor", [(32, 48)], marks=SLOWLY),
        pytest.param("linear", "inductor", [(32, 48)], marks=SLOWLY),
    ],
)
@torch.no_grad()
def test_compiled_whole_it_agrees(kind: str, backend: str, sizes: list[tuple[int, int]]):
    model = network(config_of(kind))
    torch.compiler.reset()
    with torchs_own_warnings_ignored():
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        for size in sizes:
            x = images(2, size)
            torch.testing.assert_close(compiled(x), model(x), rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize(
    ("backend", "thrifty"),
    [  # torch's backend "eager" cannot recompute a block that moves statistics
        pytest.param("aot_eager", False, marks=SLOWLY),
        ("aot_eager", True),
        pytest.param("inductor", False, marks=SLOWLY),
        pytest.param("inductor", True, marks=SLOWLY),
    ],
)
def test_compiled_training_agrees(backend: str, thrifty: bool):
    """One step with stochastic depth by given draws: gradients and running statistics."""
    ends = []
    torch.compiler.reset()
    for compiled in (False, True):
        model = network(config_of(stochastic_depth_rate=0.5, batch_norm_momentum=0.3), training=True)
        model.activation_checkpointing = thrifty
        draws = torch.rand(2, model.num_depth_draws, generator=torch.Generator().manual_seed(4))
        with torchs_own_warnings_ignored():
            run = torch.compile(model, fullgraph=True, backend=backend) if compiled else model
            run(images(), draws).square().mean().backward()
        ends.append({name: value.grad for name, value in model.named_parameters()} | dict(model.named_buffers()))
    for name, want in ends[0].items():
        torch.testing.assert_close(
            ends[1][name], want, rtol=1e-3, atol=ROUNDING, msg=lambda text, name=name: f"{name}: {text}"
        )
