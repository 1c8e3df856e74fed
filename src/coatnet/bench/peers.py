"""timm's CoAtNet at the same work, in each form in which a user could run it.

`timm_twin` builds timm's network with the paper's choices and gives it our weights; `check_same_work` refuses a
comparison of networks that differ in parameters, multiply-adds or answers.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from coatnet.errors import CoatnetError, ConfigError
from coatnet.fast.compiling import compile_for_sizes, many_forms
from coatnet.layout import count
from coatnet.model.layers import BATCH_NORM_EPS, LAYER_NORM_EPS
from coatnet.model.network import CoAtNet

Library = Literal["timm", "onnxruntime", "openvino"]
TOLERANCE = {"fp32": 1e-5, "bf16": 0.02, "int8": 0.15}  # of outputs, against their standard deviation; root mean square
PAPERS_CHOICES: dict[str, Any] = {
    "conv_stride_mode": "1x1",
    "conv_pool_type": "max2",
    "transformer_pool_type": "max2",
    "stem_bias": True,
}
NAMES: dict[str, Any] = {  # ours -> timm's, in this order
    r"^s0\.0\.": "stem.conv1.",
    r"^s0\.1\.": "stem.norm1.",
    r"^s0\.3\.": "stem.conv2.",
    r"^s([1-4])\.": lambda m: f"stages.{int(m[1]) - 1}.blocks.",
    r"\.shortcut\.[01]\.": ".shortcut.expand.",
    r"\.squeeze_excite\.reduce\.": ".se.fc1.",
    r"\.squeeze_excite\.expand\.": ".se.fc2.",
    r"\.expand_norm\.": ".norm1.",
    r"\.depthwise_norm\.": ".norm2.",
    r"\.norm\.": ".pre_norm.",
    r"(\d)\.expand\.": r"\1.conv1_1x1.",
    r"\.depthwise\.": ".conv2_kxk.",
    r"\.shrink\.": ".conv3_1x1.",
    r"\.attention_norm\.": ".norm1.",
    r"\.ffn_norm\.": ".norm2.",
    r"\.ffn\.0\.": ".mlp.fc1.",
    r"\.ffn\.2\.": ".mlp.fc2.",
    r"\.attention\.qkv\.": ".attn.qkv.",
    r"\.attention\.project\.": ".attn.proj.",
    r"\.attention\.weigh\.bias\.table": ".attn.rel_pos.relative_position_bias_table",
    r"^norm\.": "head.norm.",
    r"^pre_logits\.": "head.pre_logits.fc.",
    r"^classifier\.": "head.fc.",
}


def timms_name(name: str, theirs: dict[str, Tensor]) -> str:
    """Return timm's name of one of our weights."""
    for pattern, replacement in NAMES.items():
        name = re.sub(pattern, replacement, name)
    in_a_block_that_strides = name.replace(".norm1.", ".norm1.norm.")
    return in_a_block_that_strides if in_a_block_that_strides in theirs else name


def timms_weights(model: CoAtNet, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reorder our weights for timm, whose q, k and v are side by side within each head.

    Raises: ConfigError unless each of timm's weights is met exactly once.
    """
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        target = timms_name(name, theirs)
        if target not in theirs or target in found:
            raise ConfigError(
                f"{model.config.name}: our {name} is no weight of timm's. Name a network of timm's plain rows."
            )
        if name.endswith("table"):
            value = value.flatten(1).T
        elif ".qkv." in name:
            value = value.unflatten(0, (3, -1, model.config.head_dim)).transpose(0, 1).flatten(0, 2)
        found[target] = value.reshape(theirs[target].shape)
    left = sorted(set(theirs) - set(found) - {name for name in theirs if name.endswith("relative_position_index")})
    if left:
        raise ConfigError(f"{model.config.name}: timm has more weights: {', '.join(left[:3])}.")
    return found


def timm_twin(model: CoAtNet, **changes: Any) -> nn.Module:
    """Build timm's network of the same name with our weights, the paper's choices and our eps. Raises: ConfigError."""
    timm = import_peer("timm")
    config = model.config
    try:
        twin = timm.create_model(
            f"{config.name}_224",
            img_size=config.image_size,
            num_classes=config.num_classes,
            **{**PAPERS_CHOICES, **changes},
        )
    except RuntimeError:
        raise ConfigError(f"timm has no {config.name}. It has coatnet_0 to coatnet_5.") from None
    twin.load_state_dict(timms_weights(model, twin.state_dict()), strict=False)
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = BATCH_NORM_EPS, config.batch_norm_momentum
        elif isinstance(module, nn.LayerNorm):
            module.eps = LAYER_NORM_EPS
    return twin.eval()


def import_peer(name: str) -> Any:
    """Import a library that only `bench` needs. Raises: ConfigError with what to install."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what others' packages warn of is not ours to mend
            return __import__(name)
    except ImportError:
        raise ConfigError(
            f"{name} is not installed. pip install 'coatnet[bench]', or leave it out of --against."
        ) from None


Forward = Callable[[Tensor], Tensor]


def contenders(
    twin: nn.Module, libraries: Sequence[Library], precision: str, images: Tensor, calibration: Sequence[Tensor]
) -> dict[str, Callable[[], Forward]]:
    """Return what makes timm's network in every form that the libraries offer in this precision, each by its name."""
    found: dict[str, Callable[[], Forward]] = {}
    on_cpu = images.device.type == "cpu"
    if "timm" in libraries and precision != "int8":
        found["timm eager"] = lambda: _eager(twin, precision)
        found["timm compiled"] = lambda: _compiled(twin, precision, images)
    if "onnxruntime" in libraries and precision == "fp32" and on_cpu:
        found["timm in ONNX Runtime"] = lambda: _onnxruntime(twin, images)
    if "openvino" in libraries and on_cpu:
        found["timm in OpenVINO"] = lambda: _openvino(twin, precision, images, calibration)
    return found


def _eager(twin: nn.Module, precision: str) -> Forward:
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model = copy.deepcopy(twin).to(dtype=dtype, memory_format=torch.channels_last)  # pyright: ignore

    def forward(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(images.to(dtype, memory_format=torch.channels_last)).float()

    return forward


def _compiled(twin: nn.Module, precision: str, images: Tensor) -> Forward:
    """Compile with frozen weights, as inductor is fastest; on a GPU with CUDA graphs."""
    import torch._inductor.config as inductor

    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model = copy.deepcopy(twin).to(dtype=dtype, memory_format=torch.channels_last)  # pyright: ignore
    mode = "max-autotune" if images.device.type == "cuda" else "default"
    compiled = compile_for_sizes(model, mode)

    def forward(images: Tensor) -> Tensor:
        with torch.no_grad(), many_forms(), inductor.patch(freezing=images.device.type == "cpu"):
            return compiled(images.to(dtype, memory_format=torch.channels_last)).float()

    return forward


def _onnxruntime(twin: nn.Module, images: Tensor) -> Forward:
    import io

    onnxruntime: Any = import_peer("onnxruntime")
    import_peer("onnxscript")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(copy.deepcopy(twin), (images,), dynamo=True, verbose=False)
        content = io.BytesIO()
        assert program is not None
        program.save(content)  # pyright: ignore[reportArgumentType]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content.getvalue(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.contiguous().numpy()})[0])


def _openvino(twin: nn.Module, precision: str, images: Tensor, calibration: Sequence[Tensor]) -> Forward:
    """Take its LATENCY hint, the fastest of its hints for one batch at a time on few cores."""
    import_peer("openvino")
    from coatnet.fast.openvino_form import compile_for_cpu, convert, quantize

    model = convert(twin, tuple(images.shape[1:]))
    if precision == "int8":
        import_peer("nncf")
        model = quantize(model, calibration)
    model.reshape(list(images.shape))
    request = compile_for_cpu(model, precision).create_infer_request()  # pyright: ignore
    return lambda images: torch.from_numpy(request.infer([images.contiguous().numpy()])[0].copy())


class DifferentWorkError(CoatnetError):
    """Two networks that were to be compared do not do the same work."""


def check_same_work(ours: CoAtNet, theirs: nn.Module) -> None:
    """Compare parameters and multiply-adds. Raises: DifferentWorkError."""
    from torch.utils.flop_counter import FlopCounterMode

    mine, other = (sum(p.numel() for p in model.parameters()) for model in (ours, theirs))
    if mine != other:
        raise DifferentWorkError(f"We have {mine:,} parameters, the other {other:,}: no ratio is printed.")
    images = torch.zeros(1, ours.config.in_channels, *ours.config.image_size)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        copy.deepcopy(theirs).to("cpu")(images)
    mine, other = count(ours.config).gmacs, counter.get_total_flops() / 2e9
    if abs(mine - other) > 0.005 * mine:
        raise DifferentWorkError(f"We need {mine:.3f} G multiply-adds, the other {other:.3f}: no ratio is printed.")


def share_of(found: Tensor, want: Tensor) -> float:
    """Return the root mean square of an error as a share of the deviation of what is wanted."""
    return ((found - want).square().mean().sqrt() / want.std()).item()


def check_same_answers(found: Tensor, want: Tensor, precision: str, name: str) -> float:
    """Return how far answers differ, as a share of their deviation. Raises: DifferentWorkError beyond the tolerance."""
    error = share_of(found, want)
    if not error <= TOLERANCE[precision]:
        raise DifferentWorkError(
            f"{name} in {precision} differs from the fp32 network by {error:.2%} of the logits' deviation, "
            f"more than {TOLERANCE[precision]:.2%}: no ratio is printed."
        )
    return error
