"""A rank that dies, stands still or is cut off: the group starts again and goes on, and nothing hangs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coatnet.training import checkpoint
from training.process import HARD, environment, finish
from training.tiny import assert_same_end, history_of, write_pictures

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ALONE = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "3"]
FLAGS = (*HARD, "--epochs", "16")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found by /proc")


def train_words(data: Path, run: Path, *how: str) -> list[str]:
    return [*TORCHRUN, *how, "-m", "coatnet", "train", str(data), "--out", str(run), *FLAGS]


def rank_process(rank: int, run: Path) -> int:
    """Return the process that is this rank of the run's group."""
    for folder in Path("/proc").iterdir():
        try:
            words, variables = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:
            continue
        is_rank = f"\0RANK={rank}\0".encode() in b"\0" + variables
        if is_rank and str(run).encode() in words and b"torch.distributed.run" not in words:
            return int(folder.name)
    raise AssertionError(f"rank {rank} does not run")


def wait_for_checkpoint(run: Path, after: int = 0, timeout_s: float = 120) -> int:
    """Wait until a checkpoint of a later step is there; return its step."""
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        steps = [int(folder.name[5:]) for folder in (run / "checkpoints").glob("step-*")]
        if max(steps, default=0) > after:
            return max(steps)
        time.sleep(0.02)
    raise AssertionError(f"no checkpoint after step {after} in {timeout_s} s")


@pytest.mark.parametrize(
    ("number", "hang_s"),
    [(signal.SIGKILL, 60.0), pytest.param(signal.SIGSTOP, 90.0, marks=pytest.mark.slow)],
    ids=["killed", "standing still"],
)
def test_a_rank_that_is_gone_costs_no_more_than_a_restart(number: signal.Signals, hang_s: float, tmp_path: Path):
    data, run = write_pictures(tmp_path / "pictures"), tmp_path / "run"
    whole = finish(train_words(data, tmp_path / "whole", *ALONE))
    assert whole.returncode == 0, whole.stderr[-3000:]
    words = train_words(data, run, *ALONE)
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(words, env=environment(), stdout=log, stderr=log) as group,
    ):
        step = wait_for_checkpoint(run)
        victim = rank_process(1, run)
        os.kill(victim, number)
        start_s = time.monotonic()
        later = wait_for_checkpoint(run, after=step + 3, timeout_s=hang_s)
        restart_s = time.monotonic() - start_s
        assert group.wait(300) == 0, (tmp_path / "log").read_text()[-3000:]
    text = (tmp_path / "log").read_text()
    resumed = re.findall(r"resumed from step-0*(\d+)", text)
    assert resumed, text[-3000:]
    assert int(resumed[0]) >= step, "at most what came after the newest checkpoint is lost"
    assert later > step
    print(f"step {later} was reached {restart_s:.1f} s after the loss")
    assert_same_end(run, tmp_path / "whole")


def test_sigterm_to_the_group_leaves_a_checkpoint(tmp_path: Path):
    data, run = write_pictures(tmp_path / "pictures"), tmp_path / "run"
    with subprocess.Popen(
        train_words(data, run, *ALONE), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as group:
        step = wait_for_checkpoint(run)
        group.send_signal(signal.SIGTERM)
        start_s = time.monotonic()
        group.wait(60)
    assert time.monotonic() - start_s < 30, "the grace time of Slurm and Kubernetes"
    newest, damage = checkpoint.find_newest(run, keeps_average=True)
    assert newest is not None
    assert int(newest.name[5:]) >= step
    assert not damage


HOSTS = {"a": "10.77.0.1", "b": "10.77.0.2"}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def two_hosts() -> Iterator[dict[str, str]]:
    """Make two network namespaces with addresses of their own and a cable between them."""
    names = {host: f"coatnet-{host}-{os.getpid()}" for host in HOSTS}
    try:
        for name in names.values():
            ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may make network namespaces")
    cable = [f"cn{os.getpid() % 10000}{host}" for host in HOSTS]
    ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
    for (host, name), end in zip(names.items(), cable, strict=True):
        ip("link", "set", end, "netns", name)
        ip("-n", name, "addr", "add", f"{HOSTS[host]}/24", "dev", end)
        ip("-n", name, "link", "set", end, "up")
        ip("-n", name, "link", "set", "lo", "up")
    yield {**names, **{f"cable {host}": end for host, end in zip(HOSTS, cable, strict=True)}}
    for name in names.values():
        subprocess.run(f"ip netns pids {name} | xargs -r kill -9", shell=True, check=False)
        ip("netns", "del", name)


def host_words(hosts: dict[str, str], host: str, data: Path, run: Path) -> list[str]:
    how = [
        "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "5", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", f"{HOSTS['a']}:29400", "--rdzv-id", "run", "--local-addr", HOSTS[host],
        "--rdzv-conf", f"is_host={host == 'a'},join_timeout=120,keep_alive_interval=2,keep_alive_max_attempt=3",
    ]  # fmt: skip
    return ["ip", "netns", "exec", hosts[host], *train_words(data, run, *how), "--resume"]


@pytest.mark.slow
def test_a_host_cut_off_and_brought_back(two_hosts: dict[str, str], tmp_path: Path):
    """Two hosts, a rank on each; the cable of one is pulled, and put back when both have noticed."""
    data, run = write_pictures(tmp_path / "pictures"), tmp_path / "run"
    whole = finish(train_words(data, tmp_path / "whole", *ALONE))
    assert whole.returncode == 0, whole.stderr[-3000:]

    def begin(host: str) -> subprocess.Popen[bytes]:
        variables = environment(GLOO_SOCKET_IFNAME=two_hosts[f"cable {host}"])
        with (tmp_path / f"log {host}").open("a") as log:
            return subprocess.Popen(host_words(two_hosts, host, data, run), env=variables, stdout=log, stderr=log)

    groups = {host: begin(host) for host in HOSTS}
    step = wait_for_checkpoint(run)
    ip("-n", two_hosts["b"], "link", "set", two_hosts["cable b"], "down")
    cut_s = time.monotonic()
    for host, words in (("a", "rank 1 has not been heard|has lost the others"), ("b", "has not reached the others")):
        wait_for_words(tmp_path / f"log {host}", words, timeout_s=60)
    noticed_s = time.monotonic() - cut_s
    ip("-n", two_hosts["b"], "link", "set", two_hosts["cable b"], "up")
    back_s = time.monotonic()
    wait_for_checkpoint(run, after=step + 3, timeout_s=300)
    print(f"noticed after {noticed_s:.0f} s, going on {time.monotonic() - back_s:.0f} s after it was back")
    for host, group in groups.items():
        assert group.wait(300) == 0, (tmp_path / f"log {host}").read_text()[-3000:]
    assert_same_end(run, tmp_path / "whole")
    assert history_of(run)


def wait_for_words(log: Path, pattern: str, timeout_s: float) -> None:
    end_s = time.monotonic() + timeout_s
    while not re.search(pattern, log.read_text()):
        assert time.monotonic() < end_s, log.read_text()[-3000:]
        time.sleep(0.1)
