"""`coatnet bench` as it is used: turns, limits, peers at the same work, refusals, records, pictures."""

from __future__ import annotations

import json
import mmap
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from coatnet import native
from coatnet.bench.agreement import bench_agreement
from coatnet.bench.data import SIZES, bench_commands, bench_data, check_near, draw_folder, draw_picture
from coatnet.bench.growth import Point, draw_growth, steepest
from coatnet.bench.infer import bench_infer, lively
from coatnet.bench.machine import fastest_product, measure_rates, roofline, work_of
from coatnet.bench.memory import peak_mib
from coatnet.bench.peers import DifferentWorkError, check_same_answers, check_same_work, timm_twin
from coatnet.bench.small import RATE_ROUNDS, batches
from coatnet.bench.train import bench_train, make_update, measure_memory
from coatnet.bench.turns import ratio, take_turns
from coatnet.classifier import Classifier
from coatnet.cli import run
from coatnet.config import PreprocessingConfig
from coatnet.data.transforms import Preprocessing
from coatnet.errors import ConfigError, DataError
from coatnet.layout import count
from coatnet.zoo import ZOO

CPU = torch.device("cpu")
SMALL = replace(ZOO["coatnet_0"].config, image_size=(64, 64), num_classes=10)
linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the system does not tell peaks of memory"
)


def test_contenders_alternate_and_the_ratio_is_by_round():
    calls: list[str] = []

    def make(name: str, seconds: float) -> Any:
        def call() -> None:
            calls.append(name)
            time.sleep(seconds)

        return call

    timings = take_turns({"ours": make("ours", 0.01), "theirs": make("theirs", 0.03)}, rounds=3, turn_s=0)
    assert calls == ["ours", "ours", "theirs", "theirs"] * 3, "one untimed and one timed call each, in turns"
    found = ratio(timings["ours"], timings["theirs"])
    assert found.low <= found.median <= found.high
    assert found.median > 1.5, f"30 ms against 10 ms came as {found}"
    assert timings["ours"].low_s <= timings["ours"].median_s <= timings["ours"].high_s


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rates_and_roofline(precision: str):
    rates = measure_rates(fastest_product(precision, CPU), precision, CPU)
    assert rates.products_gmacs_per_s > 1, f"{rates.products_gmacs_per_s} G multiply-adds a second"
    parts = roofline(SMALL, rates, precision)
    assert set(parts) == {"products", "gelu", "softmax", "depthwise", "copy"}
    assert all(value > 0 for value in parts.values()), parts


def test_a_cache_line_goes_from_core_to_core():
    """In more than a core's own cache takes, and in less than a thread takes to be woken up."""
    if native.missing("fp32") is not None or (os.cpu_count() or 1) == 1:
        pytest.skip("no kernels, or no second core")
    trip_ns = measure_rates(fastest_product("fp32", CPU), "fp32", CPU).round_trip_ns
    assert trip_ns is not None
    assert 5 < trip_ns < 100_000, f"{trip_ns:.0f} ns"


def test_work_adds_up_to_the_counted_multiply_adds():
    work = work_of(SMALL)
    assert work.gmacs + work.depthwise_gmacs == pytest.approx(count(SMALL).gmacs)
    assert work_of(replace(SMALL, image_size=(128, 128))).gelu_g == pytest.approx(4 * work.gelu_g)


@linux
def test_peak_memory_is_that_of_the_call():
    def touch_new_pages() -> None:  # from the system: malloc may hand out memory that is resident already
        with mmap.mmap(-1, 64 * 2**20, flags=mmap.MAP_PRIVATE) as pages:
            for start in range(0, len(pages), mmap.PAGESIZE):
                pages[start] = 1

    grown = peak_mib(touch_new_pages, CPU)
    assert grown is not None
    assert 60 < grown < 90, f"64 MiB were taken, {grown:.0f} seen"


def test_networks_that_differ_are_refused():
    ours = lively(SMALL)
    with pytest.raises(DifferentWorkError, match="parameters"):
        check_same_work(ours, nn.Linear(2, 2))
    with pytest.raises(DifferentWorkError, match="multiply-adds"):
        check_same_work(ours, timm_twin(ours, conv_stride_mode="dw"))
    check_same_work(ours, timm_twin(ours))
    want = torch.randn(4, 10)
    assert check_same_answers(want + 1e-6, want, "fp32", "it") < 1e-4
    for wrong in (want + 0.1, want * float("nan")):
        with pytest.raises(DifferentWorkError, match="no ratio is printed"):
            check_same_answers(wrong, want, "fp32", "it")


def test_infer_measures_ours_alone_and_writes_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["bench", "infer", "--image-size", "64", "--batch", "1,3", "--dtype", "fp32", "--against", "none"]
    words += ["--json", "--threads", "1", "--out"]
    assert run([*words, str(tmp_path / "record.json")]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((tmp_path / "record.json").read_text())
    assert record["kind"] == "bench infer"
    assert record["host"]["torch_threads"] == 1
    for row, batch in zip(record["figures"]["rows"], (1, 3), strict=True):
        assert row["batch"] == batch
        assert row["ratio"] is None
        assert row["images_per_s"]["coatnet"] == pytest.approx(batch / row["timings"]["coatnet"]["median_s"])
        assert row["limit_images_per_s"] > 0
        (share,) = row["percent_of_limit"].values()
        assert 0 < share < 120, "of what products alone allow in the same rounds"
        assert len(row["percent_of_limit_by_round"]["coatnet"]) == len(row["timings"]["coatnet"]["rounds_s"])
        if native.missing("fp32") is None:
            met_ms = 1e3 / row["images_per_s"]["coatnet"]
            assert 0.3 * met_ms < sum(row["profile_ms"].values()) < 3 * met_ms, row["profile_ms"]


@pytest.mark.slow
def test_infer_against_every_peer():
    pytest.importorskip("openvino")
    pytest.importorskip("onnxruntime")
    rows = bench_infer(
        SMALL, batches=[2], precisions=["fp32", "bf16", "int8"],
        libraries=["timm", "onnxruntime", "openvino"], device=CPU, rounds=1,
    )  # fmt: skip
    names = [set(row["images_per_s"]) for row in rows]
    assert names[0] == {"coatnet", "timm eager", "timm compiled", "timm in ONNX Runtime", "timm in OpenVINO"}
    assert names[1] == {"coatnet", "timm eager", "timm compiled", "timm in OpenVINO"}
    assert names[2] == {"coatnet", "timm in OpenVINO"}
    assert all(row["ratio"]["median"] > 0 for row in rows)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_train_measures_updates_and_memory(precision: str):
    config = replace(SMALL, depths=(2, 1, 1, 1, 1))
    row = bench_train(config, batch=4, precision=precision, libraries=[], device=CPU, rounds=1)
    assert row["images_per_s"]["coatnet"] > 0
    assert row["peak_memory_mib"]["coatnet"] is None or row["peak_memory_mib"]["coatnet"] > 1


def test_update_changes_the_weights():
    model = lively(SMALL)
    before = model.classifier.weight.clone()
    make_update(model, SMALL, 4, "bf16", CPU)()
    assert not torch.equal(model.classifier.weight, before)


@linux
def test_memory_of_timm_is_measured_in_a_process_of_its_own():
    peak = measure_memory("timm eager", SMALL, 2, "bf16")
    assert peak is not None
    assert peak > 50, f"{peak} MiB with 25 M parameters' gradients and averages"


def test_data_measures_both_pipelines():
    rows = bench_data(rounds=1, turn_s=0.05)
    assert [row["work"] for row in rows] == [f"JPEG to tensor {w}x{h}" for h, w in SIZES]
    assert all(row["ratio"]["median"] > 0.5 for row in rows), [row["ratio"] for row in rows]


def test_drawn_pictures_are_as_large_as_photographs(tmp_path: Path):
    draw_folder(tmp_path, 375, 500, 20)
    sizes = [path.stat().st_size for path in tmp_path.rglob("*.jpg")]
    assert len(sizes) == 20
    assert 20_000 < min(sizes) < max(sizes) < 200_000, f"{min(sizes)} to {max(sizes)} bytes"
    assert draw_picture(30, 40, 0).size == (40, 30)


def test_growth_is_drawn(tmp_path: Path):
    points = [Point("1", 1, 4.0, 20.0, 19.0, 21.0), Point("2", 2, 4.0, 18.0, 17.0, 19.0)]
    assert steepest(points) == pytest.approx(20 / 18)
    rows = [{name: getattr(point, name) for name in Point.__slots__} for point in points]
    figures = {
        "curves": dict.fromkeys(("batch", "image size", "network"), rows), "model": "coatnet_0",
        "steeper": {"batch": 1.1, "image size": 1.1, "network": 1.1}, "work": "growth bf16",
        "threads": 2, "allowed": 1.2,
    }  # fmt: skip
    draw_growth(figures, tmp_path / "growth.png")
    with Image.open(tmp_path / "growth.png") as picture:
        assert picture.width > 1000


def test_agreement_of_a_saved_model(tmp_path: Path):
    for part in ("train", "test"):
        draw_folder(tmp_path / "pictures" / part, 40, 40, 24, num_classes=3)
    config = replace(ZOO["coatnet_pico"].config, num_classes=3)
    preprocessing = Preprocessing(PreprocessingConfig(image_size=config.image_size))
    classes = ("class0", "class1", "class2")
    Classifier(network=lively(config), preprocessing=preprocessing, labels=classes).save(tmp_path / "model")
    (row,) = bench_agreement(tmp_path / "model", str(tmp_path / "pictures"), ["bf16"])
    assert row["n"] == 24
    assert row["agreement_percent"] >= 75, f"{row['agreement_percent']:.1f} % of random weights' answers agree"
    with pytest.raises(DataError, match="has no test part"):
        bench_agreement(tmp_path / "model", str(tmp_path / "pictures" / "train"), ["bf16"])


@pytest.mark.slow
def test_whole_commands_are_timed_and_their_answers_compared():
    pytest.importorskip("timm")
    pytest.importorskip("openvino")
    first, evaluation = bench_commands(ZOO["coatnet_0"].config, num_images=32, rounds=1)
    assert set(first["images_per_s"]) == {"coatnet predict", "timm eager"}
    assert evaluation["work"] == "evaluation of 32 JPEGs, bf16"
    assert len(evaluation["timings"]["coatnet eval"]["rounds_s"]) == 2, evaluation
    for row in (first, evaluation):
        assert row["ratio"]["low"] > 0.3, row


def test_commands_with_other_answers_have_no_ratio():
    check_near([0.5, 0.5], [0.51, 0.49], "probabilities")
    for wrong in ([0.6, 0.4], [float("nan"), 0.5]):
        with pytest.raises(DifferentWorkError, match=r"The probabilities are \[0.5, 0.5\], timm's"):
            check_near([0.5, 0.5], wrong, "probabilities")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("infer --batch 0", "Give whole numbers of 1 or more"),
        ("infer --dtype fp8", "There is no 'fp8' to choose"),
        ("infer --against tim", "Did you mean 'timm'"),
        ("infer --model coatnet_9", "There is no model 'coatnet_9'"),
        ("infer --threads -1 --image-size 32 --against none", "threads are -1"),
        ("train --against openvino", "openvino cannot train this network"),
        ("infer --model coatnet_nano --against timm", "timm has no coatnet_nano"),
    ],
)
def test_bad_requests(words: str, said: str, capsys: pytest.CaptureFixture[str]):
    assert run(["bench", *words.split()]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_missing_peer_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ConfigError, match=r"timm is not installed. pip install 'coatnet\[bench\]'"):
        timm_twin(lively(SMALL))


@pytest.mark.slow
def test_small_trains_both_once_and_compares_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("timm")
    asked = {"networks": ["coatnet_pico", "resnet10t"], "rounds": RATE_ROUNDS, "threads": torch.get_num_threads()}
    rates = {"coatnet_pico": [90.0, 110.0], "resnet10t": [150.0]}
    (tmp_path / "rates.json").write_text(json.dumps({"asked": asked, "found": rates}))
    words = ["bench", "small", "--model", "coatnet_pico", "--minutes", "0.1", "--seeds", "1", "--runs", str(tmp_path)]
    assert run([*words, "--json"]) == 0
    accuracy, inference = json.loads(capsys.readouterr().out)["figures"]["rows"]
    assert accuracy["images"] == {"coatnet_pico": 600, "resnet10t": 900}, "six seconds at the rates met"
    assert all(len(values) == 1 and 0 < values[0] < 100 for values in accuracy["top1_percent"].values())
    assert inference["ratio"]["median"] > 0, inference
    marker = tmp_path / "coatnet_pico-0.json"
    held = json.loads(marker.read_text())
    marker.write_text(json.dumps({**held, "found": {**held["found"], "top1_percent": 12.5}}))
    assert run(words) == 0
    assert "coatnet_pico: top-1 12.50 %" in capsys.readouterr().out, "what is done is not done again"
    words[words.index("0.1")] = "0.2"
    assert run(words) == 2
    said = capsys.readouterr().err
    assert "'images': 600" in said, said
    assert "Give another folder to --runs" in said, said


def test_the_peers_batches_shift_and_mirror():
    pixels = torch.arange(16.0).reshape(1, 1, 4, 4).repeat(256, 1, 1, 1)
    images, labels = next(batches(pixels, torch.zeros(256), seed=0))
    assert (images.shape, labels.shape) == ((256, 1, 4, 4), (256,))
    seen = {tuple(image.flatten().tolist()) for image in images}
    assert len(seen) == 18, f"9 shifts, mirrored or not: {len(seen)} pictures"
    assert tuple(pixels[0].flip(-1).flatten().tolist()) in seen
