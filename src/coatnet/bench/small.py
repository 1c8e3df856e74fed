"""`coatnet bench small`: small rows of ours against timm's resnet10t on Fashion-MNIST, with equal time to learn.

How fast each trains is measured in turns first. Each then sees as many pictures as that many minutes pay for: what else
runs on the machine meanwhile changes no accuracy. Both shift by up to 1 px and mirror. Ours sees each picture 50 to 120
times, so nine tenths of the run mix it too (CutMix); the peer's recipe is a plain one: AdamW, one cycle to 3e-3, label
smoothing 0.1, batch 256, bf16.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F

from coatnet.bench.peers import contenders, import_peer
from coatnet.bench.turns import ratio, take_turns
from coatnet.classifier import load
from coatnet.data import fashion_mnist
from coatnet.errors import CoatnetError, ConfigError
from coatnet.fast.engines import optimize
from coatnet.files import write_json
from coatnet.model.network import CoAtNet

PEER = "resnet10t"
PEER_BATCH, PEER_PEAK_LR, PEER_WEIGHT_DECAY, LABEL_SMOOTHING, MAX_SHIFT_PX = 256, 3e-3, 0.05, 0.1, 1
PEER_RECIPE = [PEER_BATCH, PEER_PEAK_LR, PEER_WEIGHT_DECAY, LABEL_SMOOTHING, MAX_SHIFT_PX]
OUR_RECIPE = ["--cutmix", "1", "--mix-share", "0.9"]  # beside what `coatnet train` chooses; docs/log.md, 2026-11-28
NUM_TRAIN = 60_000
RATE_ROUNDS, RATE_S = 9, 12.0  # a shared machine moves by half within a minute: many short turns
INFERENCE_BATCH, ROUNDS, TURN_S = 64, 5, 1.0


def bench_small(models: Sequence[str], *, minutes: float, num_seeds: int, folder: Path) -> list[dict[str, Any]]:
    """Train all with every seed, and time their inference; return two rows of figures for each model.

    What is done lies in `folder` and is not done again. Raises: ConfigError without timm, or where the
    folder's rates are of other models; CoatnetError if a run fails.
    """
    import_peer("timm")
    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    networks = (*models, PEER)
    asked = {"networks": networks, "rounds": RATE_ROUNDS, "threads": torch.get_num_threads()}
    rates = _kept(folder / "rates.json", asked, partial(_rates, models, folder))
    images = {name: int(60 * minutes * statistics.median(rates[name])) for name in networks}
    top1 = _accuracies(images, num_seeds, folder)
    accuracies = [
        {
            "work": f"accuracy after {minutes:g} minutes", "model": model, "peer": PEER, "n": 10_000,
            "rates": {name: rates[name] for name in (model, PEER)},
            "images": {name: images[name] for name in (model, PEER)},
            "top1_percent": {name: top1[name] for name in (model, PEER)}, "num_seeds": num_seeds, "minutes": minutes,
            "seconds": time.perf_counter() - start,
        }
        for model in models
    ]  # fmt: skip
    return accuracies + _inference(models, folder)


def _accuracies(images: dict[str, int], num_seeds: int, folder: Path) -> dict[str, list[float]]:
    """Train each network on so many pictures with every seed; return its accuracies by seed."""
    tasks = [(name, seed) for seed in range(num_seeds) for name in images]
    stderr = Console(stderr=True)
    with (
        Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as bar,
        ThreadPoolExecutor(torch.get_num_threads()) as pool,  # one training a core: no thread waits for another
    ):
        shown = bar.add_task("training", total=len(tasks))

        def one(task: tuple[str, int]) -> float:
            name, seed = task
            train = _train_peer if name == PEER else partial(_train_ours, name)
            asked = {"images": images[name], "recipe": PEER_RECIPE if name == PEER else OUR_RECIPE}
            found = _kept(folder / f"{name}-{seed}.json", asked, lambda: train(folder, seed, images[name], 1))
            bar.advance(shown)
            return found["top1_percent"]

        done = dict(zip(tasks, pool.map(one, tasks), strict=True))
    return {name: [done[name, seed] for seed in range(num_seeds)] for name in images}


def _kept(path: Path, asked: dict[str, Any], make: Callable[[], Any]) -> Any:
    """Return what was made by the same request before, else make it. Raises: ConfigError if it was by another one."""
    if not path.is_file():
        write_json(path, {"asked": asked, "found": make()})
    held, wanted = json.loads(path.read_text()), json.loads(json.dumps(asked))
    if held["asked"] != wanted:
        raise ConfigError(f"{path} is of {held['asked']}, and {wanted} is asked. Give another folder to --runs.")
    return held["found"]


def _rates(models: Sequence[str], folder: Path) -> dict[str, list[float]]:
    """Return images/s of each network, a figure each round, in turns, on all threads."""
    threads, found = torch.get_num_threads(), {name: list[float]() for name in (*models, PEER)}
    for _ in range(RATE_ROUNDS):
        for name, rates in found.items():
            train = _train_peer if name == PEER else partial(_train_ours, name)
            with TemporaryDirectory(dir=folder) as run:
                rates.append(train(Path(run), 0, NUM_TRAIN * 100, threads, max_time_s=RATE_S)["images_per_s"])
    return found


def _train_ours(
    model: str, folder: Path, seed: int, images: int, threads: int, max_time_s: float | None = None
) -> dict[str, Any]:
    """Run `coatnet train` for so many pictures, or for a time."""
    run = folder / f"{model}-{seed}"
    settings = ["--model", model, "--holdout", "0", "--epochs", f"{images / NUM_TRAIN:.4f}", "--seed", str(seed)]
    settings += ["--out", str(run), "--resume"]
    settings += OUR_RECIPE + ([] if max_time_s is None else ["--max-time", f"{max_time_s:g}s"])
    _call([sys.executable, "-m", "coatnet", "train", "fashion-mnist", *settings], threads)
    record = json.loads((run / "record.json").read_text())
    return {key: record["figures"][key] for key in ("top1_percent", "images_per_s", "epochs")}


def _train_peer(folder: Path, seed: int, images: int, threads: int, max_time_s: float | None = None) -> dict[str, Any]:
    """Run this file's own loop in a process of its own."""
    task = {"seed": seed, "images": images, "max_time_s": max_time_s, "out": str(folder / f"{PEER}-{seed}.pt")}
    return json.loads(_call([sys.executable, "-m", "coatnet.bench.small", json.dumps(task), str(threads)], threads))


def _call(words: list[str], threads: int) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise CoatnetError(f"{' '.join(words[:4])} failed: {(done.stderr.strip() or 'silently').splitlines()[-1]}")
    return done.stdout


def make_peer() -> nn.Module:
    """Build timm's resnet10t for grey pictures of ten classes."""
    return import_peer("timm").create_model(PEER, num_classes=10, in_chans=1)


def _pictures(part: str) -> tuple[Tensor, Tensor]:
    """Return all pictures (M, 1, 28, 28) float32, normalised, and their labels (M,)."""
    pixels, labels = fashion_mnist.load(fashion_mnist.find(), part)
    return (torch.from_numpy(pixels.copy())[:, None] / 255 - 0.286) / 0.353, torch.from_numpy(labels)


def batches(pixels: Tensor, labels: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches without end, shuffled each epoch, each picture shifted and mirrored by chance."""
    rng = torch.Generator().manual_seed(seed)
    side, px = pixels.shape[-1], MAX_SHIFT_PX
    padded = F.pad(pixels, (px, px, px, px), value=pixels.min().item())
    steps = torch.arange(side)
    while True:
        for rows in torch.randperm(len(pixels), generator=rng).split(PEER_BATCH):
            if len(rows) < PEER_BATCH:
                continue
            top, left = torch.randint(2 * px + 1, (2, len(rows), 1), generator=rng)
            mirrored = torch.rand(len(rows), 1, generator=rng) < 0.5
            columns = torch.where(mirrored, steps.flip(0), steps) + left
            lines = steps + top
            yield padded[rows[:, None, None], 0, lines[:, :, None], columns[:, None, :]][:, None], labels[rows]


def train_peer(seed: int, images: int, max_time_s: float | None, out: Path) -> dict[str, float]:
    """Train the peer on so many pictures, save its weights, and return its accuracy on the test part and its rate."""
    torch.manual_seed(seed)
    model = make_peer().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    updates = images // PEER_BATCH
    optimizer = torch.optim.AdamW(model.parameters(), PEER_PEAK_LR, weight_decay=PEER_WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEER_PEAK_LR, total_steps=updates + 1)
    stream = batches(*_pictures("train"), seed)
    start, done = time.perf_counter(), 0
    while done < updates and (max_time_s is None or time.perf_counter() - start < max_time_s):
        pictures, targets = next(stream)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(pictures.to(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        done += 1
    seconds = time.perf_counter() - start
    torch.save(model.state_dict(), out)
    pictures, targets = _pictures("test")
    model.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = torch.cat([model(some).argmax(1) for some in pictures.split(500)])
    right = (found == targets).sum().item()
    rate = done * PEER_BATCH / seconds
    return {"top1_percent": 100 * right / len(targets), "images_per_s": rate, "epochs": done * PEER_BATCH / NUM_TRAIN}


def _inference(models: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """Time the trained networks' best forms in bf16, in turns; return a row for each of ours."""
    peer = make_peer().eval()
    peer.load_state_dict(torch.load(folder / f"{PEER}-0.pt", weights_only=True))
    images = _pictures("test")[0][:INFERENCE_BATCH]
    libraries = ("timm", "openvino")
    peers = {name: make() for name, make in contenders(peer, libraries, "bf16", images, []).items()}
    forms: dict[str, Any] = {model: _form(load(folder / f"{model}-0").network) for model in models} | peers
    start = time.perf_counter()
    timings = take_turns({name: partial(form, images) for name, form in forms.items()}, rounds=ROUNDS, turn_s=TURN_S)
    images_per_s = {name: len(images) / timing.median_s for name, timing in timings.items()}
    best = max(peers, key=lambda name: images_per_s[name])
    return [
        {
            "work": f"inference bf16, {model} and {PEER}", "model": model, "batch": len(images),
            "threads": torch.get_num_threads(),
            "images_per_s": {name: images_per_s[name] for name in (model, *peers)},
            "timings": {name: timings[name].to_dict() for name in (model, *peers)},
            "best_peer": best, "ratio": asdict(ratio(timings[model], timings[best])),
            "seconds": time.perf_counter() - start,
        }
        for model in models
    ]  # fmt: skip


def _form(network: CoAtNet) -> Callable[[Tensor], Tensor]:
    """Return the fast form, which takes grey pictures as the peer does."""
    form, channels = optimize(network, precision="bf16"), network.config.in_channels
    return lambda images: form(images.expand(-1, channels, -1, -1))


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    asked = json.loads(sys.argv[1])
    print(json.dumps(train_peer(asked["seed"], asked["images"], asked["max_time_s"], Path(asked["out"]))))
