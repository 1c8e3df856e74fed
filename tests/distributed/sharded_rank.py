"""Ranks as processes that do jobs, for test_sharded.py: `python sharded_rank.py GROUPS.json`.

A group is a number of ranks and the jobs that they do one after the other; groups run one after the other. A job names
what to do and where its findings go: a safetensors file of whole tensors, or JSON. Ranks are forked from one process
that has loaded torch, which takes longer than most jobs; torchrun itself is tested in test_equality.py.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which DTensor asks for; these three load slowly: once here, not in each rank
import torch.distributed.checkpoint.hf_storage
import torch.distributed.fsdp
from safetensors.torch import save_file

from coatnet import zoo
from coatnet.config import TrainConfig
from coatnet.data.loader import Batch
from coatnet.model.network import CoAtNet
from coatnet.ranks import Ranks, join
from coatnet.training import checkpoint, loop, run_folder, sharded, update
from coatnet.training.run import Run, Tick
from coatnet.training.saver import Saver
from coatnet.training.stop import StopRequest, listening


def write_whole(run: Run, file: str) -> None:
    """Write every tensor of the state, whole, as rank 0 sees it."""
    state = run.state
    tensors = sharded._tensors(checkpoint._networks(state), checkpoint._moments(state))
    whole = {name: run.ranks.whole(tensor).contiguous() for name, tensor in tensors.items()}
    if run.ranks.is_first:
        save_file(whole, file)


def note(ranks: Ranks, file: str, figures: Any) -> None:
    """Write what each rank found, a list by rank."""
    found = ranks.union({str(ranks.rank): json.dumps(figures)})
    if ranks.is_first:
        Path(file).write_text(json.dumps([json.loads(found[str(rank)]) for rank in range(ranks.size)]))


def set_up(ranks: Ranks, job: dict[str, Any], stop: StopRequest | None = None) -> Run:
    config = TrainConfig.from_dict(job["config"])
    resumes = job.get("resumes", False)
    run = loop._set_up(config, ranks, stop or StopRequest(), resumes, None)
    if ranks.is_first and not resumes:
        run_folder.begin(config, run.data, ranks.size)
    ranks.wait()
    return run


def train(ranks: Ranks, job: dict[str, Any]) -> None:
    """Train from the start or a checkpoint to the end or the update at which Ctrl-C comes."""
    with listening() as asked:
        run = set_up(ranks, job, asked)
        if "found_at_start" in job:
            write_whole(run, job["found_at_start"])

        def stop(tick: Tick) -> None:
            if tick.step == job["stop_after"] and tick.message is None:
                os.kill(os.getpid(), signal.SIGINT)

        if "stop_after" in job and ranks.is_first:
            run.listener = stop
        saver = Saver(Path(run.config.out), checkpoint.Retention(), run.tell)
        loop._train_to_end(run, saver)
        saver.close()
    assert run.is_over == ("stop_after" not in job)
    write_whole(run, job["found"])


def fail_to_save(ranks: Ranks, job: dict[str, Any]) -> None:
    """Save while the second rank can write next to nothing, as on a full disk, then again when it can."""
    run = set_up(ranks, job)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write fails with an error
    if ranks.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    error = ""
    try:
        checkpoint.save_shards(Path(run.config.out), run.state, ranks)
    except OSError as met:
        error = f"{type(met).__name__}: {met}"
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    ranks.wait()
    left = sorted(path.name for path in (Path(run.config.out) / "checkpoints").rglob("*"))
    ranks.wait()
    folder = checkpoint.save_shards(Path(run.config.out), run.state, ranks)
    ranks.wait()
    note(ranks, job["found"], {"error": error, "left": left, "then": checkpoint.find_newest(folder.parents[1])[1]})


def divide_on_meta(ranks: Ranks, job: dict[str, Any]) -> None:
    """Build the largest networks without memory, divide them, and count what this rank would hold."""
    found = {}
    for name in job["names"]:
        begun = time.perf_counter()
        with torch.device("meta"):
            network = CoAtNet(zoo.find(name).config)
        ranks.shard(network, [network.s0, *network.blocks])
        parameters = list(network.parameters())
        assert all(p.device.type == "meta" for p in parameters)
        found[name] = {
            "whole": sum(p.numel() for p in parameters),
            "mine": sum(p.to_local().numel() for p in parameters),  # pyright: ignore
            "seconds": time.perf_counter() - begun,
        }
    note(ranks, job["found"], found)


def step(ranks: Ranks, job: dict[str, Any]) -> None:
    """Do one update on made-up pictures; note what it came to and the most memory this rank ever held."""
    run = set_up(ranks, job)
    before = {name: tensor.detach().clone() for name, tensor in list(run.network.named_parameters())[-4:]}
    num = run.config.global_batch_size // ranks.size
    side = run.config.model.image_size
    generator = torch.Generator().manual_seed(ranks.rank)
    batch = Batch(
        images=torch.randint(0, 256, (num, 3, *side), dtype=torch.uint8, generator=generator),
        targets=torch.arange(num) % run.config.model.num_classes,
        epochs=torch.zeros(num, dtype=torch.int64),
        positions=torch.arange(num) + num * ranks.rank,
    )
    begun = time.perf_counter()
    assert update.step(run, batch)
    seconds = time.perf_counter() - begun
    after = dict(run.network.named_parameters())
    figures = {
        "seconds": seconds,
        "loss": run.state.loss_sum,
        "moved": [
            name for name, tensor in before.items() if not torch.equal(tensor.to_local(), after[name].to_local())
        ],  # pyright: ignore
        "whole": sum(p.numel() for p in after.values()),
        "mine": sum(p.to_local().numel() for p in after.values()),  # pyright: ignore
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    note(ranks, job["found"], figures)


def copy(ranks: Ranks, job: dict[str, Any]) -> None:
    if ranks.is_first:
        shutil.copytree(job["source"], job["found"])


JOBS: dict[str, Callable[[Ranks, dict[str, Any]], None]] = {
    "train": train,
    "fail_to_save": fail_to_save,
    "divide_on_meta": divide_on_meta,
    "step": step,
    "copy": copy,
}


def do(jobs: list[dict[str, Any]]) -> None:
    """Be one rank: join the group that the environment tells of and do the jobs."""
    torch.set_num_threads(1)
    with join("cpu") as ranks:
        for job in jobs:
            begun = time.perf_counter()
            JOBS[job["do"]](ranks, job)
            if ranks.is_first:
                print(f"{job['do']}: {time.perf_counter() - begun:.1f} s")


def fork(jobs: list[dict[str, Any]], rank: int, size: int, port: int) -> int:
    """Begin a rank; return its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        group = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in group.items()}
        do(jobs)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    for group in json.loads(Path(sys.argv[1]).read_text()):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        running = {fork(group["jobs"], rank, group["ranks"], port) for rank in range(group["ranks"])}
        while running:
            child, status = os.wait()
            running.remove(child)
            if status:
                for other in running:
                    os.kill(other, signal.SIGKILL)
                sys.exit("A rank failed.")


if __name__ == "__main__":
    main()
