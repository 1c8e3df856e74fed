"""The command lines of docs/scaling.md run, each on two ranks."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data.large import write_shards
from docs.test_documents import ROOT, fences
from training.tiny import write_pictures

SCALING = ROOT / "docs" / "scaling.md"
QUICK = "--model coatnet_pico --epochs 1 --batch-size 8 --device cpu"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with PICTURES, shards, and programs that stand for a cluster's: they start what they are told to."""
    write_pictures(tmp_path / "PICTURES", per_class=8)
    write_shards(tmp_path / "PICTURES", tmp_path / "shards")
    programs = {
        "torchrun": f'exec {shlex.quote(sys.executable)} -m torch.distributed.run "$@"',
        "coatnet": f'exec {shlex.quote(sys.executable)} -m coatnet "$@"',
        "scontrol": "echo localhost; echo other",
        "srun": 'all=$(seq "$SLURM_NNODES"); for _ in $all; do "$@" & done; for _ in $all; do wait -n || exit 1; done',
    }
    (tmp_path / "bin").mkdir()
    for name, script in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(stat.S_IRWXU)
    return tmp_path


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("localhost", 0))
        return held.getsockname()[1]


def shell(script: str, place: Path, **variables: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(place / "cache"), **variables,
    }  # fmt: skip
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(["bash", "-c", script], cwd=place, env=environment, **pipes)


def on_two_ranks(script: str, *, ranks_here: int, port: int) -> str:
    """Return the script for a machine of so many ranks, with a run that is soon done."""
    script, found = re.subn(r"--nproc-per-node 8", f"--nproc-per-node {ranks_here}", script)
    assert found == 1, script
    script = script.replace(":29500", f":{port}")
    return re.sub(r"(--out \S*runs/\S+)", rf"\1 {QUICK}", script)


def ends_well(done: subprocess.Popen[str], run: Path, num_ranks: int = 2) -> str:
    out, err = done.communicate(timeout=500)
    assert done.returncode == 0, out[-2000:] + err[-3000:]
    assert json.loads((run / "record.json").read_text())["figures"]["num_ranks"] == num_ranks
    return out


def line_of(beginning: str) -> str:
    lines = [line for fence in fences(SCALING, "sh") for line in fence.splitlines()]
    found = [line for line in lines if line.startswith(beginning)]
    assert len(found) == 1, f"{beginning}: {found}"
    return found[0]


def test_no_line_is_left_out():
    lines = [line for fence in fences(SCALING, "sh") for line in fence.splitlines()]
    assert [line.split()[0] for line in lines] == ["coatnet", "tar", "torchrun", "torchrun"]
    assert SCALING.read_text().count("--nproc-per-node") == 4, "a torchrun line that no test knows"


def test_one_box(place: Path):
    script = line_of("tar ") + "\n" + on_two_ranks(line_of("torchrun --standalone"), ranks_here=2, port=0)
    ends_well(shell(f"set -e\n{script}", place), place / "runs/box")


@pytest.mark.slow
def test_one_laptop(place: Path):
    ends_well(shell(f"{line_of('coatnet')} {QUICK}", place), place / "runs/PICTURES", num_ranks=1)


@pytest.mark.slow
def test_several_machines(place: Path):
    """Two machines of one rank each, here on one."""
    script = on_two_ranks(line_of("torchrun --nnodes"), ranks_here=1, port=free_port())
    machines = [shell(script, place, HEAD="localhost") for _ in range(2)]
    for machine in machines:
        ends_well(machine, place / "runs/big")


@pytest.mark.slow
def test_slurm(place: Path):
    """The script as Slurm starts it, and once more, as it does after a requeue."""
    (script,) = fences(SCALING, "bash")
    variables = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]"}
    for said in ("recipe tiny_pictures", "resuming runs/slurm"):
        out = ends_well(
            shell(on_two_ranks(script, ranks_here=1, port=free_port()), place, **variables), place / "runs/slurm"
        )
        assert said in out


@pytest.mark.slow
def test_kubernetes(place: Path):
    """The pods' own script, two of them; the manifest names what it uses."""
    (text,) = fences(SCALING, "yaml")
    service, job = yaml.safe_load_all(text)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    (script,) = container["args"]
    assert f"--rdzv-endpoint {job['metadata']['name']}-0.{pod['subdomain']}:" in script, "the first pod's name"
    assert f"--nnodes {job['spec']['completions']} " in script
    for mount in ("/runs", "/shards"):
        assert mount in {entry["mountPath"] for entry in container["volumeMounts"]}
        script = script.replace(f"{mount}/", f"{place}{mount}/").replace(f" {mount} ", f" {place}{mount} ")
    script = on_two_ranks(script.replace("coatnet-0.coatnet", "localhost"), ranks_here=1, port=free_port())
    for pod_at_work in [shell(script, place) for _ in range(2)]:
        ends_well(pod_at_work, place / "runs/pods")
