"""The commands below `coatnet bench`: what they take, which measurement they call. Torch loads only where one runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from coatnet.config import FloatPrecision, ModelConfig, Precision
from coatnet.errors import ConfigError, name_hint
from coatnet.typed import Device, Json, parse_size, print_json
from coatnet.zoo import find

if TYPE_CHECKING:
    import torch

    from coatnet.bench.peers import Library

PRECISIONS = ("fp32", "bf16", "int8")
LIBRARIES = ("timm", "onnxruntime", "openvino")  # peers.Library

bench = App(
    name="bench",
    help="Measure speed and memory in turns with timm, ONNX Runtime and OpenVINO at the same work.",
    help_epilogue="Start with:  coatnet bench infer --dtype bf16",
    help_format="plaintext",
)

Against = Annotated[str, Parameter(help="Peers, with commas: timm, onnxruntime, openvino; none for ours alone.")]
Threads = Annotated[int, Parameter(help="0 for as many as torch takes.")]
Out = Annotated[Path | None, Parameter(help="Write the record here, as --json prints it.")]
Rows = list[dict[str, Any]]


@bench.command
def infer(
    *,
    model: str = "coatnet_0",
    image_size: str | None = None,
    batch: str = "1,16",
    dtype: str = "fp32,bf16,int8",
    against: Against = "timm,onnxruntime,openvino",
    threads: Threads = 0,
    device: Device = "auto",
    out: Out = None,
    json: Json = False,
) -> None:
    """Compare inference: our fast form with timm's network as each library runs it.

    Example: coatnet bench infer --batch 1 --dtype fp32 --against timm

    On a card: coatnet bench infer --device cuda --batch 1,64 --dtype bf16

    Parameters
    ----------
    batch: str
        Images at once, with commas.
    dtype: str
        fp32, bf16, int8, with commas. int8 is measured on the CPU alone.
    """
    config, batches, precisions = config_of(model, image_size), parse_counts(batch), parse_choices(dtype, PRECISIONS)
    libraries = parse_libraries(against)

    def rows() -> Rows:
        from coatnet.bench.infer import bench_infer

        return bench_infer(
            config, batches=batches, precisions=precisions, libraries=libraries, device=_take_device(device)
        )

    _measure("infer", rows, threads, out, json)


@bench.command
def train(
    *,
    model: str = "coatnet_0",
    image_size: str | None = None,
    batch: int = 16,
    dtype: FloatPrecision = "bf16",
    against: Against = "timm",
    threads: Threads = 0,
    device: Device = "auto",
    out: Out = None,
    json: Json = False,
) -> None:
    """Compare training: one update of ours with one of timm's, eager and compiled, and the memory that they take.

    Example: coatnet bench train --batch 8

    On a card: coatnet bench train --device cuda --batch 128
    """
    config, libraries = config_of(model, image_size), parse_libraries(against)

    def rows() -> Rows:
        from coatnet.bench.train import bench_train

        return [bench_train(config, batch=batch, precision=dtype, libraries=libraries, device=_take_device(device))]

    _measure("train", rows, threads, out, json)


@bench.command
def data(
    *,
    commands: bool = False,
    images: int = 2000,
    threads: Threads = 0,
    out: Out = None,
    json: Json = False,
) -> None:
    """Compare JPEG files to training tensors on one core with PIL's pipeline.

    Example: coatnet bench data

    Parameters
    ----------
    commands: bool
        Also compare `coatnet predict` and `coatnet eval`, as typed into a cold shell, with timm's ways.
    images: int
        JPEGs of the folder that is evaluated.
    """

    def rows() -> Rows:
        from coatnet.bench.data import bench_commands, bench_data

        return bench_data() + (bench_commands(config_of("coatnet_0"), num_images=images) if commands else [])

    _measure("data", rows, threads, out, json)


@bench.command
def growth(
    *,
    model: str = "coatnet_0",
    dtype: Precision = "bf16",
    plot: Path | None = None,
    threads: Threads = 0,
    out: Out = None,
    json: Json = False,
) -> None:
    """Measure how the rate falls as batch, image size and network grow.

    Example: coatnet bench growth --dtype fp32 --plot growth.png
    """
    config = config_of(model)

    def rows() -> Rows:
        from coatnet.bench.growth import bench_growth, draw_growth

        figures = bench_growth(config, dtype)
        if plot is not None:
            draw_growth(figures, plot)
        return [figures]

    _measure("growth", rows, threads, out, json)


@bench.command
def agreement(
    run: Path,
    data: str,
    *,
    dtype: str = "bf16,int8",
    threads: Threads = 0,
    out: Out = None,
    json: Json = False,
) -> None:
    """Measure how often a trained model answers as in fp32, and what accuracy that costs, on the test part.

    Example: coatnet bench agreement runs/PICTURES PICTURES

    Parameters
    ----------
    run: Path
        Run folder or model folder.
    data: str
        Folder with train/ (int8 is calibrated on some of it) and test/.
    """
    precisions = parse_choices(dtype, ("bf16", "int8"))

    def rows() -> Rows:
        from coatnet.bench.agreement import bench_agreement

        return bench_agreement(run, data, precisions)

    _measure("agreement", rows, threads, out, json)


@bench.command
def small(
    *,
    model: str = "coatnet_pico",
    minutes: float = 20.0,
    seeds: int = 3,
    runs: Path = Path("runs/small"),
    threads: Threads = 0,
    out: Out = None,
    json: Json = False,
) -> None:
    """Compare small rows with timm's resnet10t on Fashion-MNIST: accuracy after equal time, and inference.

    Example: coatnet bench small --minutes 1

    Parameters
    ----------
    model: str
        Names from `coatnet models`, with commas.
    minutes: float
        Of training on all threads, for each network and seed.
    runs: Path
        Where the trainings lie; those that are done are not run again.
    """
    models = [config_of(name.strip()).name for name in model.split(",")]

    def rows() -> Rows:
        from coatnet.bench.small import bench_small

        return bench_small(models, minutes=minutes, num_seeds=seeds, folder=runs)

    _measure("small", rows, threads, out, json)


def _take_device(name: str) -> torch.device:
    """Return the device of that name; a card becomes the one that this process computes on."""
    import torch

    from coatnet.ranks import find_device

    device = find_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    return device


def _measure(kind: str, rows: Callable[[], Rows], threads: int, out: Path | None, json: bool) -> None:
    from coatnet.bench.show import measure

    record = measure(kind, rows, threads=threads, out=out, quiet=json)
    if json:
        print_json(record)


def config_of(name: str, image_size: str | None = None) -> ModelConfig:
    """Return a network's config at this size, or its own. Raises: ConfigError with the nearest name."""
    config = find(name).config
    return replace(config, image_size=parse_size(image_size)) if image_size else config


def parse_counts(text: str) -> list[int]:
    """Return the numbers of "1,16". Raises: ConfigError unless all are whole and 1 or more."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(f"Numbers came as '{text}'. Give whole numbers of 1 or more, like 1,16.")
    return [int(part) for part in parts]


def parse_choices(text: str, allowed: tuple[str, ...]) -> list[Any]:
    """Return the words of "fp32,bf16". Raises: ConfigError with the nearest word."""
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if part not in allowed:
            raise ConfigError(f"There is no '{part}' to choose. {name_hint(part, allowed)}")
    return parts


def parse_libraries(text: str) -> list[Library]:
    """Return the peers named, none for "none". Raises: ConfigError with the nearest name."""
    return [] if text == "none" else parse_choices(text, LIBRARIES)
