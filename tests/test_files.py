"""Files and folders that are whole or not there, and that notice a single changed bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coatnet.errors import ModelFileError
from coatnet.files import MANIFEST, new_folder, read_json, sha256_of, verify_folder, write_atomic, write_json

NEEDED = ("a.bin", "sub/b.txt")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with new_folder(tmp_path / "model") as aside:
        (aside / "a.bin").write_bytes(b"\x00\x01\x02")
        (aside / "sub").mkdir()
        (aside / "sub" / "b.txt").write_text("b")
    return tmp_path / "model"


def test_sha256_of_a_known_text(tmp_path: Path):
    (tmp_path / "abc").write_text("abc")
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_write_atomic_makes_folders_replaces_and_leaves_nothing_else(tmp_path: Path):
    path = tmp_path / "deep" / "file.txt"
    write_atomic(path, "old")
    write_atomic(path, "new")
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path):
    path = tmp_path / "file.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert read_json(path) == {"old": 1}


def test_json_keeps_the_order_of_keys(tmp_path: Path):
    write_json(tmp_path / "x.json", {"b": [1, 2], "a": None})
    assert list(read_json(tmp_path / "x.json")) == ["b", "a"]


def test_json_that_is_missing_or_broken(tmp_path: Path):
    with pytest.raises(ModelFileError, match="is not there"):
        read_json(tmp_path / "none.json")
    (tmp_path / "broken.json").write_bytes(b"{\xff")
    with pytest.raises(ModelFileError, match="cannot be read as JSON"):
        read_json(tmp_path / "broken.json")


def test_new_folder_lists_every_file(folder: Path):
    assert set(read_json(folder / MANIFEST)["sha256"]) == {"a.bin", "sub/b.txt"}
    verify_folder(folder, NEEDED)


def test_new_folder_replaces_the_old_one_whole(folder: Path):
    with new_folder(folder) as aside:
        (aside / "c.txt").write_text("c")
    assert sorted(file.name for file in folder.iterdir()) == ["c.txt", MANIFEST]
    assert list(folder.parent.iterdir()) == [folder]


def test_a_folder_that_fails_half_way_leaves_the_old_one(folder: Path):
    with pytest.raises(RuntimeError), new_folder(folder) as aside:  # noqa: PT012
        (aside / "half.txt").write_text("half")
        raise RuntimeError
    verify_folder(folder, NEEDED)
    assert not (folder / "half.txt").exists()
    assert list(folder.parent.iterdir()) == [folder]


def test_what_is_needed_must_be_listed(folder: Path):
    with pytest.raises(ModelFileError, match=r"does not list c\.bin"):
        verify_folder(folder, ("a.bin", "c.bin"))


def test_every_single_flipped_bit_is_noticed(folder: Path):
    """The manifest's own bits too: none of them may turn the check off."""
    for file in (folder / "a.bin", folder / "sub" / "b.txt", folder / MANIFEST):
        whole = file.read_bytes()
        for position in range(8 * len(whole)):
            damaged = bytearray(whole)
            damaged[position // 8] ^= 1 << position % 8
            file.write_bytes(damaged)
            with pytest.raises(ModelFileError):
                verify_folder(folder, NEEDED)
        file.write_bytes(whole)
    verify_folder(folder, NEEDED)


def test_a_missing_file_is_named(folder: Path):
    (folder / "a.bin").unlink()
    with pytest.raises(ModelFileError, match=r"a\.bin is missing"):
        verify_folder(folder, NEEDED)


@pytest.mark.parametrize("manifest", [[], {}, {"sha256": {}}, {"sha256": ["a.bin"]}, None])
def test_a_manifest_that_lists_nothing_vouches_for_nothing(folder: Path, manifest: object):
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ModelFileError, match=r"lists no files|does not list"):
        verify_folder(folder, NEEDED)
