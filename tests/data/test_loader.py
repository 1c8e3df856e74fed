from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from coatnet.config import AugmentConfig, PreprocessingConfig
from coatnet.data.image_sets import ArrayImages
from coatnet.data.loader import Batch, EvaluationLoader, TrainLoader
from coatnet.data.sources import labelled_folder
from coatnet.data.transforms import Augmentation, Preprocessing
from coatnet.errors import BadImageError, ConfigError, DataError

PREPROCESSING = PreprocessingConfig(image_size=(8, 8))
AUGMENTATION = Augmentation(AugmentConfig(randaugment_ops=1, randaugment_magnitude=5, erase_rate=0.5), PREPROCESSING)
# A machine of one core is warned of two workers.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def loader(images, **changes) -> TrainLoader:
    return TrainLoader(images, AUGMENTATION, **{"seed": 0, "global_batch_size": 4} | changes)


def assert_same(got: list[Batch], want: list[Batch], what: str) -> None:
    assert len(got) == len(want), f"{what}: {len(got)} batches, not {len(want)}"
    for number, pair in enumerate(zip(got, want, strict=True)):
        for field in dataclasses.fields(Batch):
            one, other = (getattr(batch, field.name) for batch in pair)
            assert torch.equal(one, other), f"{what}: {field.name} of batch {number} differ"


@pytest.fixture
def images(make_folder):
    return labelled_folder(make_folder({"ant": 5, "bee": 6}))


@pytest.fixture
def holed(make_folder):
    """Eleven pictures of which three cannot be read."""
    folder = make_folder({"ant": 5, "bee": 6})
    for name in ("ant/003.png", "ant/004.png", "bee/005.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:40])
    return labelled_folder(folder)


def test_batches_are_full_and_straddle_epochs(images):
    batches = list(loader(images).batches(0, 11))
    assert {tuple(batch.images.shape) for batch in batches} == {(4, 3, 8, 8)}
    assert (batches[0].images.dtype, batches[0].targets.dtype) == (torch.uint8, torch.int64)
    assert torch.cat([batch.positions for batch in batches]).tolist() == list(range(44))
    assert torch.cat([batch.epochs for batch in batches]).tolist() == [p // 11 for p in range(44)]
    assert batches[2].epochs.tolist() == [0, 0, 0, 1]
    for epoch in range(4):
        targets = torch.cat([batch.targets[batch.epochs == epoch] for batch in batches])
        assert targets.bincount().tolist() == [5, 6], f"epoch {epoch} showed {targets.bincount().tolist()}"


def test_any_step_can_be_entered(images):
    whole = list(loader(images).batches(0, 9))
    for start in (1, 2, 5):
        assert_same(list(loader(images).batches(start, 9)), whole[start:], f"entered at {start}")


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_ranks_share_each_batch(images, num_ranks):
    whole = list(loader(images).batches(0, 5))
    ranks = [loader(images, rank=rank, num_ranks=num_ranks).batches(0, 5) for rank in range(num_ranks)]
    joined = [
        Batch(*(torch.cat([getattr(share, field.name) for share in shares]) for field in dataclasses.fields(Batch)))
        for shares in zip(*ranks, strict=True)
    ]
    assert_same(joined, whole, f"{num_ranks} ranks")


def test_seeds_and_epochs_differ(images):
    one, other = next(loader(images).batches(0, 1)), next(loader(images, seed=1).batches(0, 1))
    assert not torch.equal(one.images, other.images), "two seeds gave the same first batch"


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(holed, num_workers):
    """Pictures, places and bad files are those of the plain loop; the training's generator is left alone."""
    plain, spawned = loader(holed), loader(holed, num_workers=num_workers)
    want = list(plain.batches(3, 8))
    state = torch.get_rng_state()
    got = list(spawned.batches(3, 8))
    assert torch.equal(torch.get_rng_state(), state), "the workers drew from the global generator"
    assert_same(got, want, f"{num_workers} workers")
    assert spawned.bad_images == plain.bad_images


def test_a_bad_files_place_is_taken_by_the_next_of_the_list(holed):
    skipping = loader(holed)
    for _ in range(2):
        batches = list(skipping.batches(0, 11))
    assert sorted(skipping.bad_images) == ["ant/003.png", "ant/004.png", "bee/005.png"]
    assert all(name in reason for name, reason in skipping.bad_images.items()), skipping.bad_images
    assert {len(batch) for batch in batches} == {4}
    first_epoch = torch.cat([batch.targets for batch in batches])[:11]
    # ant 3 and 4 give way to bee 0, bee 5 to ant 0.
    assert first_epoch.bincount().tolist() == [4, 7], f"{first_epoch.bincount().tolist()}"
    assert_same(list(loader(holed).batches(6, 11)), batches[6:], "entered behind the bad files")


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_stop_stops_with_the_files_name_in_one_line(holed, num_workers):
    stopping = loader(holed, on_bad_image="stop", num_workers=num_workers)
    with pytest.raises(BadImageError, match=r"^[^\n]*\.png: damaged[^\n]*$"):
        list(stopping.batches(0, 3))


def test_nothing_to_read_is_said(images):
    for index in range(len(images)):
        images.path(index).write_bytes(b"none")
    with pytest.raises(DataError, match="None of the 11 training pictures can be read"):
        list(loader(images).batches(0, 1))


def test_more_ranks_than_pictures_are_refused(images):
    with pytest.raises(ConfigError, match="global_batch_size is 4 for 8 ranks"):
        loader(images, num_ranks=8)


def test_split_cuts_a_batch_in_order(images):
    batch = next(loader(images, global_batch_size=7).batches(0, 1))
    parts = list(batch.split(3))
    assert [len(part) for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
    assert torch.equal(torch.cat([part.positions for part in parts]), batch.positions)


def test_evaluation_shows_each_readable_picture_once(holed):
    preprocessing, shown = Preprocessing(PREPROCESSING), list[int]()
    evaluation = EvaluationLoader(holed, preprocessing, batch_size=3)
    for batch in evaluation:
        assert len(batch) <= 3
        for picture, index, target in zip(batch.images, batch.positions.tolist(), batch.targets, strict=True):
            assert torch.equal(picture, preprocessing(holed.read(index)))
            assert target == holed.targets[index]
            shown.append(index)
    assert shown == [0, 1, 2, 5, 6, 7, 8, 9]
    assert sorted(evaluation.bad_images) == ["ant/003.png", "ant/004.png", "bee/005.png"]


@pytest.mark.parametrize(
    "augment", [{"crop": "pad"}, {"crop": "pad", "max_shift_ratio": 0.2}, {"crop": "resize", "erase_rate": 0.5}]
)
@pytest.mark.parametrize("colours", [(3, 3), (1, 3), (1, 1)])
def test_pictures_in_memory_are_moved_at_once_as_one_by_one(augment, colours, monkeypatch):
    """The same bits as the way through each picture alone."""
    held, wanted = colours
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 9, 12, 3) if held == 3 else (40, 9, 12), dtype=np.uint8)
    shown = ArrayImages(pixels, np.arange(40) % 4, tuple("abcd"), "train", rng.permutation(40)[:30])
    values = (0.5,) * wanted
    augmentation = Augmentation(
        AugmentConfig(**augment), PreprocessingConfig(image_size=(9, 12), mean=values, std=values)
    )
    batches = TrainLoader(shown, augmentation, seed=0, global_batch_size=4).batches
    at_once = list(batches(0, 12))
    monkeypatch.setattr(Augmentation, "only_moves", lambda *_: False)
    assert_same(at_once, list(batches(0, 12)), "at once")


@pytest.mark.slow
def test_workers_end_with_a_killed_parent(images, tmp_path):
    """Kill -9 the parent: it can clean up nothing, and its workers still go."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys, time\nfrom multiprocessing import active_children\nfrom pathlib import Path\n"
        "from coatnet.config import AugmentConfig, PreprocessingConfig\nfrom coatnet.data.loader import TrainLoader\n"
        "from coatnet.data.sources import labelled_folder\nfrom coatnet.data.transforms import Augmentation\n"
        "if __name__ == '__main__':\n"
        "    augmentation = Augmentation(AugmentConfig(), PreprocessingConfig(image_size=(8, 8)))\n"
        "    loader = TrainLoader(labelled_folder(Path(sys.argv[1])), augmentation,"
        " seed=0, global_batch_size=4, num_workers=1)\n"
        "    batches = loader.batches(0, 1000)\n    next(batches)\n"
        "    print(*(child.pid for child in active_children()), flush=True)\n    time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, script, images.folder], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert workers, "the parent named no worker"
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while (alive := [pid for pid in workers if _runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not alive, f"workers {alive} ran on for 20 s"


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
