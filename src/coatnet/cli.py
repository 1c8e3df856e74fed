"""The command `coatnet`. Commands are thin: they read what was typed, call a room, and print what came back.

Exit status: 0 done, 1 could not (a message of a line or two), 2 called wrongly, 130 stopped by Ctrl-C. Torch loads only
where it is used.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

from coatnet import __version__
from coatnet.bench.cli import bench
from coatnet.errors import CoatnetError, ConfigError
from coatnet.plan.cli import plan
from coatnet.studies.cli import study
from coatnet.typed import STOPPED, Device, FloatPrecisionFlag, Json, parse_duration_s, parse_size, print_json

if TYPE_CHECKING:
    from coatnet.evaluation.metrics import Summary
    from coatnet.training.finish import Result

app = App(
    name="coatnet",
    help="CoAtNet: train it on your own pictures, look at what it learned, use it.",
    help_epilogue="Start with:  coatnet train PICTURES     (a folder with one folder of pictures a class)\n\n"
    "With --debug an error shows where in the code it arose.",
    help_format="plaintext",
    version=__version__,
    result_action="return_value",
)

app.command(bench)
app.command(plan)
app.command(study)


@app.command
def models(*, image_size: str | None = None, json: Json = False) -> None:
    """Show the family: parameters, multiply-adds, the paper's accuracy.

    Example: coatnet models --image-size 384

    Parameters
    ----------
    image_size: str
        Count at this size in px, like 384 or 192x256; absent, at each network's own.
    """
    from coatnet.family_table import rows, show

    found = rows(parse_size(image_size) if image_size else None)
    print_json(found) if json else show(found)


@dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """What `coatnet train` may be told; what is absent is chosen from the data and the machine."""

    model: str | None = None
    """A name from `coatnet models`."""
    recipe: str | None = None
    """A row of recipes.py, like small_scratch or imagenet_1k."""
    image_size: str | None = None
    """px, like 128 or 96x128 (height x width)."""
    epochs: float | None = None
    """Passes over the training pictures."""
    max_time: str | None = None
    """End within this time, like 20m; the rate's schedule ends with it."""
    batch_size: int | None = None
    """Pictures an update, over all ranks."""
    microbatch_size: int | None = None
    """Pictures held at once; smaller saves memory."""
    peak_lr: float | None = None
    """Highest learning rate."""
    weight_decay: float | None = None
    """Of weights; norms, biases and bias tables never decay."""
    label_smoothing: float | None = None
    """0 to below 1."""
    stochastic_depth: float | None = None
    """Rate at the last block, 0 to below 1."""
    flip_rate: float | None = None
    """Share of pictures mirrored; 0 where left and right matter."""
    erase_rate: float | None = None
    """Share of pictures of which a box is covered with noise, like 0.25: for runs of many epochs."""
    mixup: float | None = None
    """Alpha of mixup, like 0.8; 0 for none."""
    cutmix: float | None = None
    """Alpha of cutmix, like 1.0; 0 for none."""
    mix_share: float | None = None
    """Share of the run, from its start, in which pictures are mixed, like 0.75."""
    ema_decay: float | None = None
    """Of the weights' moving average, like 0.9999; 0 for none."""
    holdout: float | None = None
    """Percent of an unsplit folder set apart for validation; 0 trains on everything."""
    patience: int | None = None
    """Stop after so many epochs without improvement, and keep the best model."""
    init: str | None = None
    """Start from this run, model folder, .safetensors or .pt file."""
    freeze: Literal["S0", "S1", "S2", "S3", "S4"] | None = None
    """Leave everything up to this stage as it is."""
    precision: Literal["fp32", "bf16"] | None = None
    """Of the computation; weights are kept in fp32."""
    compile: bool | None = None
    """Compile the network with torch.compile: slower start, faster updates on a GPU."""
    shard: bool | None = None
    """Divide the network over the processes of torchrun, for one that does not fit into each."""
    activation_checkpointing: bool | None = None
    """Compute activations twice to hold fewer of them."""
    sync_batch_norm: bool | None = None
    """Take BatchNorm's statistics over all ranks, not each rank's own pictures."""
    device: str | None = None
    """cpu, cuda, cuda:0 or mps; absent, the best at hand."""
    workers: int | None = None
    """Processes that read pictures."""
    checkpoint_every: str | None = None
    """Time between checkpoints, like 5m."""
    keep_last: int | None = None
    """Checkpoints that stay: the newest so many."""
    keep_best: bool | None = None
    """Keep the checkpoint of the best validation too."""
    keep_every: int | None = None
    """Keep every so many-th checkpoint for good; 0 for none."""
    on_bad_image: Literal["skip", "stop"] | None = None
    """What to do with a file that cannot be read."""
    seed: int | None = None
    """Everything random follows from it."""

    def given(self) -> dict[str, Any]:
        """Return what was given, as it was typed."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def settings(self) -> dict[str, Any]:
        """Return what was given, under the config's names. Raises: ConfigError for what cannot be read."""
        given = self.given()
        for flag, name in _RENAMED.items():
            if flag in given:
                given[name] = given.pop(flag)
        if "image_size" in given:
            given["image_size"] = parse_size(given["image_size"])
        for name in ("max_time_s", "checkpoint_interval_s"):
            if name in given:
                given[name] = parse_duration_s(given[name])
        for name in ("mixup_alpha", "cutmix_alpha", "ema_decay", "holdout_percent", "keep_every"):
            if given.get(name) == 0:
                given[name] = None  # a config's word for off
        return given


_RENAMED = {
    "epochs": "num_epochs",
    "max_time": "max_time_s",
    "batch_size": "global_batch_size",
    "stochastic_depth": "stochastic_depth_rate",
    "mixup": "mixup_alpha",
    "cutmix": "cutmix_alpha",
    "holdout": "holdout_percent",
    "patience": "patience_epochs",
    "workers": "num_workers",
    "checkpoint_every": "checkpoint_interval_s",
}


@app.command
def train(
    data: str | None = None,
    *,
    out: Path | None = None,
    resume: Annotated[bool, Parameter(negative="")] = False,
    overwrite: Annotated[bool, Parameter(negative="")] = False,
    reproduce: Path | None = None,
    flags: Annotated[TrainFlags, Parameter(name="*")] = TrainFlags(),
    json: Json = False,
) -> int:
    """Train a network on labelled pictures and leave a run folder with model and report.

    Example: coatnet train PICTURES --max-time 20m

    Parameters
    ----------
    data: str
        Folder of class/picture.jpg, or with train/, val/, test/ of such; tar shards (a folder, or
        'train-{000..146}.tar'); a folder of parquet files; hf:owner/name; fashion-mnist,
        digits, or letters (letters:N: N pictures for training).
    out: Path
        Run folder; absent, runs/NAME after the data.
    resume: bool
        Go on with the run in --out, or with the newest one below runs/; where there is none yet, begin it.
    overwrite: bool
        Replace the run that is there.
    reproduce: Path
        Do this run again, with its settings, and hold the outcome to it, bit for bit.
    """
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other. Give one.")
    from coatnet.ranks import is_first_rank
    from coatnet.training.command import reproduce_run, train_from_flags

    if reproduce is None:
        result = train_from_flags(data, out, resume=resume, overwrite=overwrite, given=flags.settings(), quiet=json)
    elif data is None and not (resume or overwrite or flags.given()):
        result = reproduce_run(reproduce, out, quiet=json)
    else:
        raise ConfigError("--reproduce takes everything from the run but --out. Leave the rest away.")
    if json and is_first_rank():
        print_json(_result_figures(result))
    return STOPPED if result.stopped_by == signal.SIGINT else 0  # SIGTERM was obeyed: nothing failed


@app.command(name="eval")
def evaluate(
    run: Path,
    data: str,
    *,
    part: Literal["train", "val", "test"] | None = None,
    batch_size: int = 64,
    device: Device = "auto",
    workers: int = 0,
    precision: FloatPrecisionFlag = "fp32",
    json: Json = False,
) -> None:
    """Measure a trained model on labelled pictures: accuracy with 95 % intervals, class by class.

    Example: coatnet eval runs/PICTURES PICTURES --part val

    Parameters
    ----------
    run: Path
        Run folder or model folder.
    data: str
        Folder of class/picture.jpg, or with train/, val/, test/ of such; tar shards (a folder, or
        'train-{000..146}.tar'); a folder of parquet files; hf:owner/name; fashion-mnist,
        digits, or letters (letters:N: N pictures for training).
    part: str
        Which part of the data; absent, test, else val, else everything.
    """
    from coatnet.evaluation.command import evaluate_run, show

    summary, name, bad_images = evaluate_run(
        run, data, part=part, batch_size=batch_size, device=device, num_workers=workers, precision=precision
    )
    if json:
        print_json({"data": data, "part": name, "bad_images": bad_images, **summary.to_dict()})
    else:
        show(summary, name, bad_images)


@app.command
def predict(
    run: Path,
    images: Annotated[list[str], Parameter(allow_leading_hyphen=True, negative="")],
    *,
    k: int = 5,
    format: Literal["table", "csv", "jsonl"] = "table",  # noqa: A002 - what users call it
    device: Device = "auto",
    precision: FloatPrecisionFlag = "fp32",
) -> None:
    """Name what is on pictures: the k most probable labels of each.

    Example: coatnet predict runs/PICTURES "holiday/*.jpg" --format csv

    Parameters
    ----------
    run: Path
        Run folder or model folder.
    images: list[str]
        Files, folders, globs, or - for paths on standard input.
    k: int
        How many labels for each.
    format: str
        A table to read, CSV, or a JSON object a line.
    """
    from coatnet.evaluation.command import predict_files

    if num_bad := predict_files(run, images, k=k, output=format, device=device, precision=precision):
        raise CoatnetError(f"{num_bad} of the files could not be read; they are named above.")


def _result_figures(result: Result) -> dict[str, Any]:
    summary: Summary | None = result.summary
    return {
        "run": str(result.run),
        "part": result.part,
        "top1_percent": summary.top1_percent if summary else None,
        "top1_interval": summary.top1_interval if summary else None,
        "n": summary.n if summary else 0,
        "seconds": round(result.seconds, 3),
        "num_bad_images": result.num_bad_images,
        "was_interrupted": result.was_interrupted,
    }


def run(tokens: Sequence[str]) -> int:
    """Run one command line and return its exit status."""
    try:
        status = app([token for token in tokens if token != "--debug"], exit_on_error=False)
        sys.stdout.flush()
        return status or 0
    except CycloptsError:
        return 2  # it has said why
    except KeyboardInterrupt:
        print("coatnet: stopped.", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:  # whoever read our output has gone; what is left of it goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if "--debug" in tokens:
            raise
        print(f"coatnet: {_in_words(error)}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def _in_words(error: Exception) -> str:
    """Say in a line or two what went wrong."""
    if isinstance(error, CoatnetError | OSError):
        return str(error)
    first = next(iter(str(error).splitlines()), "")
    if "out of memory" in first.lower():
        return f"{first.rstrip('.')}. Give a smaller --microbatch-size, --image-size or --model."
    return f"{type(error).__name__}: {first.rstrip('.')}. This is not your fault; --debug shows where it arose."


def main() -> None:
    """Run the command line that was typed. What a terminal cannot show, file names of any bytes say, is escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    gc.set_threshold(100_000)  # looking through all of torch for garbage, while it is imported, takes long
    status = run(sys.argv[1:])
    if sys.argv[1:2] == ["predict"]:
        gc.freeze()  # looking through it once more at the end would take as long as the prediction
    sys.exit(status)
