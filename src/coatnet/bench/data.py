"""`coatnet bench data`: JPEG files to training tensors on one core, and whole commands from a cold shell.

The pictures are drawn here: smooth colours at several scales with a little noise, saved as a camera would, quality 90.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image

from coatnet.bench.infer import lively
from coatnet.bench.peers import DifferentWorkError, import_peer
from coatnet.bench.turns import Timing, ratio, take_turns
from coatnet.classifier import Classifier
from coatnet.config import AugmentConfig, ModelConfig, PreprocessingConfig
from coatnet.data.image_sets import FolderImages
from coatnet.data.sources import open_data
from coatnet.data.transforms import Augmentation, Preprocessing
from coatnet.errors import CoatnetError
from coatnet.model.layers import BATCH_NORM_EPS, LAYER_NORM_EPS

SIZES = ((375, 500), (1200, 1600))  # px, height and width
NUM_FILES = 16
PX = 224
ROUNDS, COMMAND_ROUNDS, EVALUATION_ROUNDS = 15, 5, 2
EVALUATION_BATCH = 16
MOST_APART = 0.02  # of a probability, or of the pictures that are right: decoders and resizing differ by a little


def draw_picture(height: int, width: int, seed: int) -> Image.Image:
    """Draw a picture whose JPEG is about as large as a photograph's."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for cells in (3, 12, 48, 160):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) / cells**0.5
    total += rng.normal(0, 4, total.shape)
    return Image.fromarray(np.uint8(255 * (total - total.min()) / np.ptp(total)))


def draw_folder(folder: Path, height: int, width: int, count: int, num_classes: int = 2) -> Path:
    """Write `count` JPEGs into class folders; each seed's picture is drawn once and repeated after `NUM_FILES`."""
    drawn: list[bytes] = []
    for number in range(count):
        path = folder / f"class{number % num_classes}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(drawn) < NUM_FILES:
            draw_picture(height, width, number).save(path, quality=90)
            drawn.append(path.read_bytes())
        else:
            path.write_bytes(drawn[number % NUM_FILES])
    return folder


def bench_data(*, rounds: int = ROUNDS, turn_s: float = 1.0) -> list[dict[str, Any]]:
    """Measure decode, RandomResizedCrop 224 and flip on one core: ours against ImageFolder's PIL pipeline."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    try:
        for height, width in SIZES:
            with TemporaryDirectory() as folder:
                draw_folder(Path(folder), height, width, NUM_FILES)
                calls = {"coatnet": _ours(Path(folder)), "PIL ImageFolder": _imagefolder(Path(folder))}
                start = time.perf_counter()
                timings = take_turns(calls, rounds=rounds, turn_s=turn_s)
                rows.append(_row(f"JPEG to tensor {width}x{height}", timings, 1, start))
    finally:
        torch.set_num_threads(before)
    return rows


def _row(work: str, timings: dict[str, Timing], images: int, start: float) -> dict[str, Any]:
    ours, theirs = list(timings)
    return {
        "work": work, "images_per_s": {name: images / timing.median_s for name, timing in timings.items()},
        "timings": {name: timing.to_dict() for name, timing in timings.items()}, "best_peer": theirs,
        "ratio": asdict(ratio(timings[ours], timings[theirs])), "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def _ours(folder: Path) -> Callable[[], object]:
    images = open_data(str(folder), holdout_percent=None).train
    assert isinstance(images, FolderImages)
    augment = Augmentation(
        AugmentConfig(crop="random_resized", flip_rate=0.5), PreprocessingConfig(image_size=(PX, PX))
    )
    rng, numbers = np.random.default_rng(0), itertools.cycle(range(len(images)))
    return lambda: augment.read(lambda min_side: images.read(next(numbers), min_side=min_side), rng)


def _imagefolder(folder: Path) -> Callable[[], object]:
    """The pipeline of PyTorch's own ImageNet example, with the filter that ours uses."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [
        transforms.RandomResizedCrop(PX, interpolation=bicubic), transforms.RandomHorizontalFlip(),
        transforms.PILToTensor(),
    ]  # fmt: skip
    images = ImageFolder(str(folder), transforms.Compose(steps))
    numbers = itertools.cycle(range(len(images)))
    return lambda: images[next(numbers)]


TIMM_PREDICT = """
import json, sys, torch, timm
from PIL import Image
from timm.data import create_transform
torch.set_num_threads(int(sys.argv[4]))
model = timm.create_model(sys.argv[1] + '_224', num_classes=2, conv_stride_mode='1x1', conv_pool_type='max2',
                          transformer_pool_type='max2', stem_bias=True).eval()
for module in model.modules():
    if hasattr(module, 'eps'):
        module.eps = float(sys.argv[5 if isinstance(module, torch.nn.BatchNorm2d) else 6])
model.load_state_dict(torch.load(sys.argv[2], weights_only=True))
look = create_transform(224, crop_pct=0.875)
with torch.inference_mode():
    print(json.dumps(model(look(Image.open(sys.argv[3]).convert('RGB'))[None]).softmax(1)[0].tolist()))
"""
TIMM_EVAL = """
import sys, time, torch, timm, openvino, numpy
from timm.data import create_dataset, create_loader
settings = {'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_PRECISION_HINT': 'bf16',
            'INFERENCE_NUM_THREADS': int(sys.argv[3])}
model = openvino.Core().compile_model(sys.argv[1], 'CPU', settings)
request = model.create_infer_request()
data = create_dataset('', root=sys.argv[2])
loader = create_loader(data, 224, 16, use_prefetcher=False, num_workers=int(sys.argv[4]), crop_pct=0.875,
                       interpolation='bicubic', persistent_workers=False)
right = 0
for images, targets in loader:
    right += int((request.infer([images.numpy()], share_inputs=True)[0].argmax(1) == targets.numpy()).sum())
print(right)
"""


def bench_commands(config: ModelConfig, *, num_images: int, rounds: int = COMMAND_ROUNDS) -> list[dict[str, Any]]:
    """Measure the first prediction from a cold shell and an evaluation of a folder, as commands, in turns."""
    import_peer("timm")
    with TemporaryDirectory() as name:
        folder = Path(name)
        model = lively(replace(config, num_classes=2))
        preprocessing = Preprocessing(PreprocessingConfig(image_size=config.image_size))
        Classifier(network=model, preprocessing=preprocessing, labels=("class0", "class1")).save(folder / "model")
        pictures = draw_folder(folder / "pictures", *SIZES[0], num_images)
        return [
            _first_prediction(config, folder, next(pictures.rglob("*.jpg")), rounds),
            _evaluation(folder, pictures, num_images),
        ]


def _first_prediction(config: ModelConfig, folder: Path, picture: Path, rounds: int) -> dict[str, Any]:
    from coatnet.bench.peers import timm_twin
    from coatnet.classifier import load

    twin = timm_twin(load(folder / "model").network)
    torch.save(twin.state_dict(), folder / "timm.pt")
    settings = (torch.get_num_threads(), BATCH_NORM_EPS, LAYER_NORM_EPS)
    ours = _Command("-m", "coatnet", "predict", folder / "model", picture, "--format", "jsonl")
    theirs = _Command("-c", TIMM_PREDICT, config.name, folder / "timm.pt", picture, *settings)
    start = time.perf_counter()
    timings = take_turns({"coatnet predict": ours, "timm eager": theirs}, rounds=rounds, turn_s=0, warm_up=False)
    found = {answer["label"]: answer["probability"] for answer in json.loads(ours.said)["best"]}
    check_near([found[label] for label in sorted(found)], json.loads(theirs.said), "probabilities")
    return _row("first prediction, cold shell", timings, 1, start)


def _evaluation(folder: Path, pictures: Path, num_images: int) -> dict[str, Any]:
    """Compare in bf16, timm's loader feeding timm's network in OpenVINO: its best path by `bench infer`."""
    import_peer("openvino")
    import openvino  # pyright: ignore[reportMissingImports]

    from coatnet.bench.peers import timm_twin
    from coatnet.classifier import load
    from coatnet.fast.openvino_form import convert

    model = convert(timm_twin(load(folder / "model").network), (3, PX, PX))
    model.reshape([-1 if num_images % EVALUATION_BATCH else EVALUATION_BATCH, 3, PX, PX])  # fixed it is faster
    openvino.save_model(model, folder / "timm.xml", compress_to_fp16=False)
    few = draw_folder(folder / "few", *SIZES[0], EVALUATION_BATCH * 10)

    def timm(images: Path, workers: int) -> _Command:
        return _Command("-c", TIMM_EVAL, folder / "timm.xml", images, torch.get_num_threads(), workers)

    tries = take_turns({str(n): timm(few, n) for n in (0, 1)}, rounds=1, turn_s=0)
    workers = int(min(tries, key=lambda name: tries[name].median_s))
    ours = _Command("-m", "coatnet", "eval", folder / "model", pictures, "--precision", "bf16", "--json")
    theirs = timm(pictures, workers)
    start, calls = time.perf_counter(), {"coatnet eval": ours, f"timm, {workers} workers": theirs}
    timings = take_turns(calls, rounds=EVALUATION_ROUNDS, turn_s=0, warm_up=False)
    share = json.loads(ours.said)["top1_percent"] / 100
    check_near([share], [json.loads(theirs.said) / num_images], "shares of right answers")
    return _row(f"evaluation of {num_images} JPEGs, bf16", timings, num_images, start)


class _Command:
    """A program of Python's in a process of its own, with as many threads as this one; `said` is what it printed."""

    def __init__(self, *words: object) -> None:
        self.words = [sys.executable, *map(str, words)]
        self.said = ""

    def __call__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        done = subprocess.run(self.words, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            last = (done.stderr.strip() or "silently").splitlines()[-1]
            raise CoatnetError(f"{' '.join(self.words[:4])} failed: {last}")
        self.said = done.stdout


def check_near(ours: list[float], theirs: list[float], what: str) -> None:
    """Raise DifferentWorkError where two commands' answers are not the same but for decoding."""
    if not np.allclose(ours, theirs, rtol=0, atol=MOST_APART):
        raise DifferentWorkError(f"The {what} are {ours}, timm's {theirs}: no ratio is printed.")
