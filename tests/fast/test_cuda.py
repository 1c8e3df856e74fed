"""What only a card can show: compiled attention, CUDA graphs, training. Errors against float64 beside the plain form's.

What a processor can show of the same code is in `test_flex_attention.py`; how images are cut into graphs, below.
"""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import coatnet
from coatnet.bench.train import make_update, record_update
from coatnet.fast.cuda_form import graph_size, largest_chunk
from coatnet.fast.flex_attention import FlexAttention, attend, use_flex_attention
from coatnet.fast.training import CUDA_OPTIONS, for_training
from coatnet.model.attention import Attention, join_heads
from coatnet.model.network import CoAtNet
from model.networks import config_of, images, network

needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no card here")
compiles = pytest.mark.filterwarnings("ignore")  # compilers warn of what is theirs
CUDA = torch.device("cuda")
NO_MORE = 1.5  # times the plain form's error


def test_every_batch_has_a_graph_that_holds_it():
    for batch in range(1, 300):
        assert batch <= graph_size(batch) < 2 * batch, f"{batch} images in a graph of {graph_size(batch)}"
    assert [graph_size(batch) for batch in (1, 2, 3, 64)] == [1, 2, 4, 64]
    assert [largest_chunk(side * side) for side in (224, 384, 20_000)] == [128, 32, 1]


def rms(error: Tensor) -> float:
    return error.double().square().mean().sqrt().item()


def network_for_cards(kind: str = "CCTT", *, training: bool = False) -> CoAtNet:
    """Build a small network whose heads have the size that the kernel is made for."""
    return network(config_of(kind, head_dim=32, widths=(8, 32, 32, 64, 64)), training=training).to(CUDA)


@needs_card
@compiles
@pytest.mark.parametrize(
    ("head_dim", "grid", "trained", "dtype"),
    [
        (32, (7, 7), (7, 7), torch.bfloat16),
        (32, (24, 24), (24, 24), torch.bfloat16),
        (32, (32, 33), (32, 33), torch.bfloat16),
        (32, (14, 14), (14, 14), torch.float16),
        (64, (12, 12), (7, 7), torch.bfloat16),
        (128, (5, 9), (5, 9), torch.bfloat16),
    ],
    ids=str,
)
def test_compiled_attention_errs_no_more_than_the_plain_one(
    head_dim: int, grid: tuple[int, int], trained: tuple[int, int], dtype: torch.dtype
):
    """Outputs and the gradients of q, k, v and the table."""
    torch.manual_seed(0)
    layer = Attention(4 * head_dim, 4 * head_dim, head_dim, trained, "pre").to(CUDA)
    assert layer.weigh.bias is not None
    torch.nn.init.normal_(layer.weigh.bias.table)
    table = layer.weigh.bias.table
    parts = [head.detach() for head in layer.heads(torch.randn(3, grid[0] * grid[1], 4 * head_dim, device=CUDA))]
    slope = torch.randn(3, grid[0] * grid[1], 4 * head_dim, device=CUDA)

    def plain(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        form = copy.deepcopy(layer).to(table.dtype)
        del form.weigh.bias.table  # pyright: ignore
        form.weigh.bias.table = table  # pyright: ignore
        return form.mix(q, k, v, grid)

    def flexible(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return join_heads(attend(q, k, v, table, grid))

    def run(mix, dtype: torch.dtype, table_dtype: torch.dtype) -> list[Tensor]:
        given = [part.to(dtype).requires_grad_() for part in parts]
        given.append(table.detach().to(table_dtype).requires_grad_())
        out = mix(*given)
        return [out.detach(), *torch.autograd.grad(out, given, slope.to(out.dtype))]

    options = CUDA_OPTIONS if head_dim > 32 else None  # the tiles that torch takes untried fit small heads alone
    compiled = torch.compile(flexible, fullgraph=True, dynamic=False, options=options)
    want = run(plain, torch.float64, torch.float64)
    found, own = run(compiled, dtype, torch.float32), run(plain, dtype, torch.float32)
    for name, a, b, truth in zip(("out", "q", "k", "v", "table"), found, own, want, strict=True):
        error, allowed = rms(a - truth), NO_MORE * rms(b - truth) + 1e-6
        assert error <= allowed, f"{name} errs by {error:.1e}, allowed {allowed:.1e}"


@needs_card
@compiles
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_graphs_answer_as_the_plain_network(precision: str):
    model = network_for_cards()
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    fast = coatnet.optimize(model, precision=precision, calibration=images(4))  # pyright: ignore
    assert fast.engine == "CUDA graphs"
    assert fast.precision == ("fp32" if precision == "fp32" else "bf16")
    assert ("8 bits" in " ".join(fast.notes)) == (precision == "int8")
    with torch.no_grad():
        for batch, size in ((1, (32, 48)), (3, (32, 48)), (5, (61, 45)), (3, (32, 48))):
            x = images(batch, size, seed=batch).to(CUDA)
            want = copy.deepcopy(model).double()(x.double())
            own = copy.deepcopy(model).to(dtype)(x.to(dtype))
            error, allowed = rms(fast(x) - want), NO_MORE * rms(own - want) + 1e-5
            assert error <= allowed, f"{batch} of {size}: errs by {error:.1e}, allowed {allowed:.1e}"


@needs_card
@compiles
def test_an_answer_outlives_the_next_call_from_any_thread():
    fast, x = coatnet.optimize(network_for_cards(), precision="bf16"), images(4).to(CUDA)
    first = fast(x)
    kept = first.clone()
    found: list[Tensor] = []
    other = threading.Thread(target=lambda: found.append(fast(2 * x)))
    other.start()
    other.join()
    assert torch.equal(first, kept), "the next call wrote into an answer"
    assert not torch.equal(found[0], kept)
    assert torch.equal(fast(x), kept)
    assert fast(x[:0]).shape == (0, 5)


@needs_card
@compiles
@pytest.mark.parametrize("thrifty", [False, True])
def test_compiled_training_errs_no_more_than_the_plain_one(thrifty: bool):
    model, x = network_for_cards(training=True), images(8).to(CUDA)
    gradients: list[dict[str, Tensor]] = []
    for form in ("float64", "plain", "compiled"):
        made = copy.deepcopy(model).double() if form == "float64" else copy.deepcopy(model)
        made.activation_checkpointing = thrifty
        called = for_training(made, compiled=True) if form == "compiled" else made
        assert any(isinstance(module, FlexAttention) for module in made.modules()) == (form == "compiled")
        with torch.autocast("cuda", torch.bfloat16, enabled=form != "float64"):
            logits = called(x.double() if form == "float64" else x)
        F.cross_entropy(logits.double(), torch.arange(8, device=CUDA) % 5).backward()
        gradients.append({name: p.grad.double() for name, p in made.named_parameters() if p.grad is not None})
    want, plain, compiled = gradients
    for part in (("table",), ("qkv", "project"), ("",)):
        names = [name for name in want if any(word in name for word in part)]
        shares = [
            sum(rms(found[name] - want[name]) / (rms(want[name]) + 1e-3) for name in names) / len(names)
            for found in (compiled, plain)
        ]
        assert shares[0] <= NO_MORE * shares[1] + 1e-3, f"{part}: errs by {shares[0]:.2%}, plain by {shares[1]:.2%}"


@needs_card
@compiles
def test_a_recorded_update_goes_on_training():
    config = config_of(head_dim=32, widths=(8, 32, 32, 64, 64))
    model = network(config, training=True).to(CUDA)
    update = record_update(make_update(for_training(model, compiled=True), config, 8, "bf16", CUDA))
    assert update is not None, "the update was not recorded"
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    update()
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert not [name for name in still if "weight" in name], f"{still} stay as they are"


@needs_card
def test_uncompiled_the_readable_attention_computes():
    model, x = network_for_cards(), images(2).to(CUDA)
    swapped = use_flex_attention(copy.deepcopy(model))
    with torch.no_grad():
        torch.testing.assert_close(swapped(x), model(x))
