"""Models and weights from anybody: loading runs no code, believes nothing, and says in a line or two what is wrong."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import coatnet
from coatnet import cli
from coatnet.bench.memory import peak_mib
from coatnet.errors import CoatnetError
from coatnet.files import MANIFEST, write_json, write_manifest
from coatnet.training import start
from coatnet.training.run_folder import RUN_MANIFEST
from training.tiny import CLASSES, MODEL, config_of, write_pictures
from untrusted.folders import Evil, read_header, renew_manifest, safetensors, save_model

SOURCES = sorted(Path(coatnet.__file__).parent.rglob("*.py"))
MAX_S = 3.0  # of processor time; most refusals take milliseconds
MAX_MIB = 64.0


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """A file that is there only if code of a stranger ran."""
    path = tmp_path / "it-ran"
    yield path
    assert not path.exists(), "code in a file was run"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("untrusted") / "pictures", per_class=8)


def assert_clean(message: str) -> None:
    assert len(message.splitlines()) <= 3, f"a message of many lines: {message}"
    assert len(message) < 1000, f"a message of {len(message)} characters: {message[:300]}"
    assert message.isprintable() or set(re.sub(r"[\x20-\x7e]", "", message)) == {"\n"}, repr(message)


def refuse(call: Callable[[], object], met: str) -> None:
    """Hold a call to a clean error, soon and with little memory."""
    said: list[str] = []

    def run() -> None:
        with pytest.raises(CoatnetError) as error:
            call()
        said.append(str(error.value))

    began_s = time.process_time()
    grown_mib = peak_mib(run, torch.device("cpu"))
    took_s = time.process_time() - began_s
    assert_clean(said[0])
    assert re.search(met, said[0]), said[0]
    assert took_s < MAX_S, f"refused after {took_s:.1f} s"
    assert grown_mib is None or grown_mib < MAX_MIB, f"refused at a cost of {grown_mib:.0f} MiB"


def refuse_model(folder: Path, met: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hold `coatnet.load` and the command line to the same refusal."""
    refuse(lambda: coatnet.load(folder), met)
    capsys.readouterr()
    status = cli.run(["predict", str(folder), str(data / "bird" / "000.png")])
    said = capsys.readouterr()
    assert status in (1, 2), f"exit status {status}"
    assert said.out == ""
    assert_clean(said.err.strip())
    assert "not your fault" not in said.err
    assert re.search(met, said.err), said.err


# ---------------------------------------------------------------------------------------------------- code in files


def evil_files(mark: Path) -> dict[str, bytes]:
    """Return pickles that leave the mark when they are unpickled, as torch.save and pickle write them."""

    def saved(value: object, **options: Any) -> bytes:
        out = io.BytesIO()
        torch.save(value, out, **options)
        return out.getvalue()

    return {
        "pickle": pickle.dumps(Evil(mark)),
        "pickle of a dict": pickle.dumps({"classifier.weight": Evil(mark)}, protocol=2),
        "torch.save": saved(Evil(mark)),
        "torch.save in a state dict": saved({"state_dict": {"classifier.weight": Evil(mark)}}),
        "torch.save of old": saved({"model": Evil(mark)}, _use_new_zipfile_serialization=False),
    }


KINDS = list(evil_files(Path("nowhere")))


def test_the_mark_is_left_where_code_runs(tmp_path: Path):
    """Else the tests below could not fail."""
    mark = tmp_path / "it-ran"
    for kind, content in evil_files(mark).items():
        if kind.startswith("torch.save"):
            torch.load(io.BytesIO(content), weights_only=False)
        else:
            pickle.loads(content)
        assert mark.exists(), kind
        mark.unlink()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["model.safetensors", "model.json", MANIFEST])
def test_a_pickle_in_place_of_a_models_file_is_refused(
    name: str, kind: str, model: Path, mark: Path, data: Path, capsys: pytest.CaptureFixture[str]
):
    (model / name).write_bytes(evil_files(mark)[kind])
    if name != MANIFEST:
        renew_manifest(model)
    refuse_model(model, r"cannot be read as (safetensors|JSON)", data, capsys)


def test_a_pickle_beside_a_models_files_is_not_looked_at(model: Path, mark: Path):
    for number, content in enumerate(evil_files(mark).values()):
        for name in ("model", "weights", "network", "pytorch_model"):
            for suffix in ("pt", "pth", "bin", "pkl"):
                (model / f"{name}{number or ''}.{suffix}").write_bytes(content)
    renew_manifest(model)
    assert coatnet.load(model).labels == CLASSES


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["evil.pt", "evil.pth", "evil.safetensors"])
def test_a_pickle_to_begin_from_is_refused(
    name: str, kind: str, mark: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / name
    path.write_bytes(evil_files(mark)[kind])
    refuse(lambda: start.read_weights(path), r"cannot be read as (safetensors|PyTorch weights)")
    words = ["train", str(data), "--out", str(tmp_path / "run"), "--init", str(path), "--image-size", "24"]
    assert cli.run([*words, "--model", "coatnet_nano", "--epochs", "1"]) == 1
    said = capsys.readouterr().err
    assert_clean(said.strip())
    assert "cannot be read as" in said
    assert not (tmp_path / "run").exists(), "something was written"


def test_processes_run_no_code_whatever_the_environment_allows(model: Path, mark: Path, data: Path, tmp_path: Path):
    evil = evil_files(mark)["torch.save in a state dict"]
    (tmp_path / "evil.pt").write_bytes(evil)
    (model / "model.safetensors").write_bytes(evil)
    renew_manifest(model)
    for words in (
        ["predict", model, data / "bird" / "000.png"],
        ["train", data, "--out", tmp_path / "run", "--init", tmp_path / "evil.pt", "--max-time", "1s"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "coatnet", *map(str, words)],
            env={**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 1, done.stderr
        assert "cannot be read as" in done.stderr
        assert "Traceback" not in done.stderr


# --------------------------------------------------------------------------------------------------------- weights


def real(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BROKEN_FILES = {
    "empty": (b"", "header"),
    "1 GB of header": (safetensors({}, claims=10**9), "claims 1,000,000,000 bytes"),
    "2**63 bytes of header": (safetensors({}, claims=2**63), "claims 9,223,372,036,854,775,808 bytes"),
    "overlapping": (safetensors({"a": real([2], 0, 8), "b": real([2], 4, 12)}, bytes(12)), "invalid offset"),
    "on one place": (safetensors({"a": real([2], 0, 8), "b": real([2], 0, 8)}, bytes(8)), "invalid offset"),
    "beyond the end": (safetensors({"a": real([2], 0, 8)}, bytes(4)), "not fully covered"),
    "far beyond the end": (safetensors({"a": real([2**40], 0, 2**42)}, bytes(4)), "not fully covered"),
    "backwards": (safetensors({"a": real([2], 8, 0)}, bytes(8)), "invalid offset"),
    "negative": (safetensors({"a": real([2], -8, 0)}, bytes(8)), "invalid"),
    "more numbers than there are": (safetensors({"a": real([2**40, 2**40], 0, 8)}, bytes(8)), "overflow"),
    "a size of 5,000 digits": (safetensors('{"a": {"shape": [' + "9" * 5000 + "]}}"), "digits"),
    "a type that is none": (safetensors({"a": real([2], 0, 8, "F33")}, bytes(8)), "invalid JSON in header"),
    "the same name twice": (
        safetensors(f'{{"a": {json.dumps(real([2], 0, 8))}, "a": {json.dumps(real([2], 0, 8))}}}', bytes(8)),
        "'a' comes twice",
    ),
    "nested without end": (safetensors('{"a": ' + "[" * 100_000), "nested too deeply"),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_broken_safetensors(case: str, model: Path, data: Path, capsys: pytest.CaptureFixture[str]):
    content, met = BROKEN_FILES[case]
    (model / "model.safetensors").write_bytes(content)
    refuse(lambda: start.read_weights(model / "model.safetensors"), met)
    renew_manifest(model)
    refuse_model(model, r"cannot be read as safetensors", data, capsys)


def change_tensor(model: Path, name: str, **changes: Any) -> None:
    header, content = read_header((model / "model.safetensors").read_bytes())
    header[name] |= changes
    (model / "model.safetensors").write_bytes(safetensors(header, content))
    renew_manifest(model)


@pytest.mark.parametrize(
    ("changes", "met"),
    [
        ({"dtype": "I32"}, r"classifier\.weight: file \(3, 32\) int32, model \(3, 32\)"),
        ({"dtype": "F16", "shape": [3, 64]}, r"classifier\.weight: file \(3, 64\), model \(3, 32\)"),
        ({"dtype": "F8_E4M3", "shape": [3, 128]}, r"classifier\.weight: file \(3, 128\) float8_e4m3fn"),
        ({"dtype": "F4", "shape": [3, 256]}, r"classifier\.weight: file \(3, \d+\) float4"),
        ({"dtype": "C64", "shape": [3, 16]}, r"classifier\.weight: file \(3, 16\) complex64"),
        ({"dtype": "BOOL", "shape": [3, 128]}, r"classifier\.weight: file \(3, 128\) bool"),
        ({"shape": [32, 3]}, r"classifier\.weight: file \(32, 3\), model \(3, 32\)"),
        ({"shape": [96]}, r"classifier\.weight: file \(96,\), model \(3, 32\)"),
    ],
)
def test_tensors_of_another_type_or_shape(
    changes: dict[str, Any], met: str, model: Path, data: Path, capsys: pytest.CaptureFixture[str]
):
    change_tensor(model, "classifier.weight", **changes)
    refuse_model(model, met, data, capsys)


def test_a_tensors_name_cannot_draw_on_the_screen(model: Path, data: Path, capsys: pytest.CaptureFixture[str]):
    header, content = read_header((model / "model.safetensors").read_bytes())
    header["\x1b[31m\n" + "x" * 100_000] = real([0], len(content), len(content))
    (model / "model.safetensors").write_bytes(safetensors(header, content))
    renew_manifest(model)
    refuse_model(model, r"\\x1b\[31m\\nxxx", data, capsys)


def saved(path: Path, value: object) -> Path:
    torch.save(value, path)
    return path


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("suffix", ["pt", "pth"])
def test_foreign_weights_are_taken(suffix: str, prefix: str, wrapper: str | None, model: Path, tmp_path: Path):
    want = load_file(model / "model.safetensors")
    state = {prefix + name: tensor for name, tensor in want.items()}
    path = saved(tmp_path / f"foreign.{suffix}", {wrapper: state, "epoch": 3} if wrapper else state)
    network = start.build(MODEL, seed=9)
    assert start.initialise(network, path, CLASSES) == []
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, want[name]), name


def squeezed(path: Path) -> Path:
    """Return an archive whose 20 MB of zeros take 20 KB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02X" + (20_000_000).to_bytes(4, "little") + bytes(20_000_000) + b".")
        archive.writestr("x/version", "3")
    return path


FOREIGN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "not there": (lambda path: path, "it is not there"),
    "no archive": (lambda path: (path.write_bytes(b"weights"), path)[1], "no archive of torch.save"),
    "cut short": (
        lambda path: (saved(path, {"a": torch.zeros(99)}).write_bytes(path.read_bytes()[:400]), path)[1],
        "no archive of torch.save",
    ),
    "compressed": (squeezed, "it is compressed"),
    "no tensors": (lambda path: saved(path, {"a": [1, 2]}), "holds no weights"),
    "nothing": (lambda path: saved(path, {}), "holds no weights"),
    "a tensor alone": (lambda path: saved(path, torch.zeros(3)), "holds no weights"),
    "a whole module": (lambda path: saved(path, torch.nn.Linear(2, 2)), "cannot be read as PyTorch weights"),
    "sparse": (lambda path: saved(path, {"a": torch.eye(3).to_sparse()}), "holds no weights"),
    "one number, a trillion times": (
        lambda path: saved(path, {"a": torch.zeros(1).expand(10**6, 10**6)}),
        "holds no weights",
    ),
    "shapes without numbers": (lambda path: saved(path, {"a": torch.zeros(10**12, device="meta")}), "holds no weights"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_files_that_hold_something_else(case: str, tmp_path: Path):
    make, met = FOREIGN[case]
    path = make(tmp_path / "foreign.pt")
    refuse(lambda: start.read_weights(path), met)


@pytest.mark.parametrize(
    ("name", "change", "met"),
    [
        ("classifier.weight", lambda tensor: tensor.long(), r"classifier\.weight: file \(3, 32\) int64"),
        ("s3.0.attention.weigh.bias.table", lambda tensor: tensor[0], r"bias\.table: file \(\d+, \d+\), model"),
        ("s3.0.attention.weigh.bias.table", lambda tensor: tensor[:, :0], r"bias\.table: file \(\d+, 0, \d+\)"),
        ("s3.0.attention.weigh.bias.table", lambda tensor: tensor[:1], r"bias\.table: file \(1, "),
    ],
)
def test_foreign_tensors_that_do_not_fit(
    name: str, change: Callable[[Tensor], Tensor], met: str, model: Path, tmp_path: Path
):
    state = load_file(model / "model.safetensors")
    assert name in state, f"a name of {sorted(state)}"
    path = saved(tmp_path / "foreign.pt", state | {name: change(state[name]).clone()})
    refuse(lambda: start.initialise(start.build(MODEL, seed=1), path, CLASSES), met)


# ----------------------------------------------------------------------------------------------- cards and manifests


TRILLION = 10**12
HUGE: dict[str, dict[str, Any]] = {
    "blocks": {"depths": [1, TRILLION, 1, 1, 1]},
    "blocks of the stem": {"depths": [TRILLION, 1, 1, 1, 1]},
    "a thousand blocks": {"depths": [1000] * 5, "widths": [4096] * 5},
    "channels": {"widths": [8, 8, 16, 32, 32 * TRILLION]},
    "classes": {"num_classes": TRILLION},
    "channels in": {"in_channels": TRILLION},
    "a picture": {"image_size": [TRILLION, TRILLION]},
    "a large picture": {"image_size": [16_000, 16_000], "strides": [1, 1, 1, 1, 1]},
    "windows": {"attention": "window", "window_size": TRILLION},
    "patches": {"layout": "vit_rel", "depths": [1], "widths": [32], "patch_size": TRILLION},
    "a number of 4,000 digits": {"num_classes": 10**4000},
    "a rate of 4,000 digits": {"batch_norm_momentum": 10**4000},
    "2**63": {"widths": [8, 8, 16, 2**63, 2**63]},
}


def rewrite_card(model: Path, change: Callable[[dict[str, Any]], object]) -> None:
    card = json.loads((model / "model.json").read_text())
    change(card)
    write_json(model / "model.json", card)
    renew_manifest(model)


@pytest.mark.parametrize("case", HUGE)
def test_a_card_that_asks_for_a_huge_network(case: str, model: Path, data: Path, capsys: pytest.CaptureFixture[str]):
    """Refused before memory is taken for it; the weights beside it are 100 KB."""
    rewrite_card(model, lambda card: card["model"].update(HUGE[case]))
    refuse_model(model, r"parameters, but the weights beside it|must be|at least 0 and below", data, capsys)


@pytest.mark.parametrize("case", ["blocks", "channels", "classes", "a number of 4,000 digits"])
def test_a_run_whose_config_asks_for_a_huge_network(
    case: str, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    values = config_of(data, run).to_dict()
    values["model"] |= HUGE[case]
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    (model / "model.safetensors").rename(run / "checkpoints" / "step-00000001" / "network.safetensors")
    write_json(run / "config.json", values)
    write_json(run / "start.json", {})
    write_manifest(run, ["config.json", "start.json"], RUN_MANIFEST)
    grown_mib = peak_mib(lambda: cli.run(["train", "--resume", "--out", str(run)]), torch.device("cpu"))
    said = capsys.readouterr().err
    assert re.search("parameters, but the weights beside it|must be", said), said
    assert_clean(said.strip())
    assert grown_mib is None or grown_mib < MAX_MIB, f"refused at a cost of {grown_mib:.0f} MiB"


STRANGE_JSON = {
    "nested without end": ("[" * 100_000, "nested too deeply"),
    "nested in keys": ('{"a":' * 100_000, "nested too deeply"),
    "a number of 5,000 digits": ('{"format": ' + "9" * 5_000 + "}", "4300 digits"),
    "a key that comes twice": ('{"format": 1, "format": 1}', "'format' comes twice"),
    "no text": (b"\xff\xfe\x00", "utf-8"),
    "nothing": ("", "Expecting value"),
    "more than can be": (" " * (65 * 2**20), "larger than 64 MiB"),
}


@pytest.mark.parametrize("case", STRANGE_JSON)
@pytest.mark.parametrize("name", ["model.json", MANIFEST])
def test_strange_json(name: str, case: str, model: Path, data: Path, capsys: pytest.CaptureFixture[str]):
    content, met = STRANGE_JSON[case]
    (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if name != MANIFEST:
        renew_manifest(model)
    refuse_model(model, rf"{name} cannot be read as JSON: .*{met}", data, capsys)


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("change", "met"),
    [
        (lambda card: card.update(format=10**4000), r"has format 1000.*\.\.\..*Upgrade coatnet"),
        (lambda card: card.update(labels=[nested(200)] * 3), "labels holds"),
        (lambda card: card.update(loss="x" * 10**6), r"loss is 'x+\.\.\.x+'"),
        (lambda card: card["model"].update({"y" * 10**6: 1}), r"no field 'y+\.\.\.y+'"),
        (lambda card: card["model"].update(layout="C" * 10**6), r"layout is 'C+\.\.\.C+'"),
        (lambda card: card["model"].update(depths=[1] * 10**5), "depths is"),
        (lambda card: card["model"].update(depths=nested(200)), "depths is"),
        (lambda card: card["model"].update(name=nested(200)), "name is"),
        (lambda card: card["model"].update(widths=[8, 8, 16, 32, "\x1b[2J\n"]), r"widths is .*\\x1b\[2J"),
        (lambda card: card["preprocessing"].update(mean=[0.5] * 10**5), "mean"),
        (lambda card: card["preprocessing"].update(std=[float("nan")] * 3), "std above 0"),
        (lambda card: card["preprocessing"].update(image_size=[10**9, 10**9]), "1 to 16384"),
    ],
)
def test_strange_values_in_a_card(
    change: Callable[[dict[str, Any]], object], met: str, model: Path, data: Path, capsys: pytest.CaptureFixture[str]
):
    rewrite_card(model, change)
    refuse_model(model, met, data, capsys)


@pytest.mark.parametrize(
    ("name", "met"),
    [
        ("../../etc/passwd", "not in the folder"),
        ("/etc/passwd", "not in the folder"),
        ("sub/../../outside", "not in the folder"),
        ("..\\..\\outside", "not in the folder"),
        ("C:\\outside", "not in the folder"),
        ("..", "not in the folder"),
        (".", "is missing"),
        ("", "is missing"),
        ("a" * 5000, "cannot be read|is missing"),
        ("a\0b", "is missing"),
        ("\x1b[2J\n", r"\\x1b\[2J\\n is missing"),
        ("model.json/x", "is missing|cannot be read"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_a_manifest_cannot_lead_out_of_its_folder(
    name: str, met: str, model: Path, data: Path, capsys: pytest.CaptureFixture[str]
):
    """Nothing outside is opened, though what lies there may be what the manifest says."""
    (model.parent / "outside").write_text("outside")
    hashes = json.loads((model / MANIFEST).read_text())["sha256"]
    write_json(model / MANIFEST, {"sha256": {name: "0" * 64, **hashes}})
    refuse_model(model, met, data, capsys)


@pytest.mark.parametrize("value", [None, 3, ["x"], {"x": "y"}, nested(200)], ids=["null", "3", "list", "dict", "deep"])
def test_a_manifest_of_something_else(value: Any, model: Path, data: Path, capsys: pytest.CaptureFixture[str]):
    hashes = json.loads((model / MANIFEST).read_text())["sha256"]
    write_json(model / MANIFEST, {"sha256": {**hashes, "x": value}})
    refuse_model(model, "lists no files", data, capsys)


# ---------------------------------------------------------------------------------------------------- our own source

MODULES_THAT_RUN_CODE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
CALLS_THAT_RUN_CODE = {"eval", "exec", "compile"}


def dangers(source: str) -> Iterator[str]:
    """Yield what in a source could run code that a file holds."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{name}" for name in names)]
            bad = [name for name in names if name.split(".")[0] in MODULES_THAT_RUN_CODE or name == "torch.load"]
            yield from (f"line {node.lineno} imports {name}" for name in bad)
        elif isinstance(node, ast.Call):
            called, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            if called in CALLS_THAT_RUN_CODE:
                yield f"line {node.lineno} calls {called}"
            if called in ("torch.load", "torch.serialization.load") and given.get("weights_only") != "True":
                yield f"line {node.lineno} calls torch.load without weights_only=True"
            if called in ("torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"):
                yield f"line {node.lineno} calls {called}"
            if given.get("allow_pickle", "False") != "False" or given.get("shell", "False") != "False":
                yield f"line {node.lineno} calls {called} with allow_pickle or shell"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.name)
def test_our_source_unpickles_and_evaluates_nothing(file: Path):
    found = list(dangers(file.read_text()))
    assert not found, f"{file.name}: " + "; ".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "from torch import load",
        "import torch; torch.load(path)",
        "import torch; torch.load(path, weights_only=False)",
        "import torch; torch.load(path, weights_only=flag)",
        "eval(text)",
        "exec(text)",
        "import yaml; yaml.load(text)",
        "numpy.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
        "torch.hub.load(name)",
    ],
)
def test_it_sees_what_could_run_code(source: str):
    assert list(dangers(source)), f"{source} went unseen"


@pytest.mark.parametrize("source", ["torch.load(path, weights_only=True)", "network.eval()", "torch.compile(network)"])
def test_it_leaves_the_rest_alone(source: str):
    assert not list(dangers(source))
