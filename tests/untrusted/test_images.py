"""Pictures from anybody: a bad-image error or a picture, soon, whatever was done to the file."""

from __future__ import annotations

import contextlib
import io
import sys
import time
import zlib
from pathlib import Path

import fuzz_images
import pytest
import torch
from image_mutations import KINDS, Seed, make, seeds
from PIL import Image

from coatnet.bench.memory import peak_mib
from coatnet.data.decode import MAX_BLOCKS, MAX_RUN_LENGTH_PIXELS, decode, read_size
from coatnet.errors import BadImageError
from coatnet.files import read_json
from untrusted import broken_decoders

SEEDS = [pytest.param(seed, id=f"{kind}{number}") for kind in KINDS for number, seed in enumerate(seeds()[kind])]


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


# ------------------------------------------------------------------------------------------------------ mutations


@pytest.mark.parametrize(
    ("num", "num_workers"), [(4_000, 1), pytest.param(1_000_000, 2, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_mutated_files_give_a_picture_or_a_bad_image_error(num: int, num_workers: int, tmp_path: Path):
    found = fuzz_images.fuzz(fuzz_images.look, range(num), seed=1, num_workers=num_workers, aside=tmp_path)
    assert not found.faults, f"kept in {tmp_path}: {found.faults}"
    for kind, counts in found.counts.items():
        assert sum(counts.values()) == num // len(KINDS), f"{kind}: {counts}"
        assert min(counts["images"], counts["bad_image_errors"]) > num / 100, f"{kind} is mutated too little or much"


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_mutated_was_a_good_picture(seed: Seed):
    """And the numbers that are changed are where they are said to be."""
    pixels = decode(seed.content)
    assert read_size(seed.content) == pixels.shape[:2]
    assert seed.sizes
    assert seed.lengths
    places = [place for part in seed.parts for place in part]
    assert places, "no parts to swap or repeat"
    assert max(places) <= len(seed.content)


def test_a_file_follows_from_its_seed_and_index():
    first = [make(0, index) for index in range(200)]
    assert [make(0, index) for index in range(200)] == first
    assert [kind for kind, _ in first[:5]] == list(KINDS)
    assert len({content for _, content in first + [make(1, index) for index in range(200)]}) > 350


def test_crashes_hangs_and_exceptions_are_counted_kept_and_outlived(tmp_path: Path):
    look = broken_decoders.with_every_fault
    found = fuzz_images.fuzz(look, range(30), seed=0, num_workers=2, aside=tmp_path, hang_s=0.3)
    met = {outcome: found.total(outcome) for outcome in fuzz_images.OUTCOMES}
    assert met == {"images": 26, "bad_image_errors": 0, "crashes": 1, "hangs": 2, "other_exceptions": 1}
    harmful = (broken_decoders.CRASHES, broken_decoders.LOOPS, broken_decoders.SLEEPS, broken_decoders.RAISES)
    for index in harmful:
        kind, content = make(0, index)
        assert (tmp_path / f"{index}.{kind.lower()}").read_bytes() == content
    assert {fault.split(":")[0] for fault in found.faults} == {str(index) for index in harmful}
    assert any("no such palette" in fault for fault in found.faults)


def test_growing_memory_is_a_fault(tmp_path: Path):
    num = fuzz_images.NUM_WARM + 2 * fuzz_images.NUM_BETWEEN + 1
    found = fuzz_images.fuzz(broken_decoders.with_a_leak, range(num), seed=0, num_workers=1, aside=tmp_path)
    want = 2 * fuzz_images.NUM_BETWEEN / 8
    assert 0.9 * want < found.growth_mib < 1.5 * want, f"{found.growth_mib:.0f} MiB were found, {want:.0f} leaked"
    assert "memory grew" in found.faults[-1]


def test_a_long_run_may_be_done_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "record.json"

    def status_of(start: int, num: int) -> object:
        words = ["--start", start, "--num", num, "--out", out, "--aside", tmp_path / "aside"]
        monkeypatch.setattr(sys, "argv", [fuzz_images.__file__, *map(str, words)])
        with pytest.raises(SystemExit) as end:
            fuzz_images.main()
        return end.value.code

    assert status_of(0, 60) == 0
    assert status_of(60, 40) == 0
    record = read_json(out)
    assert (record["kind"], record["n"], record["seeds"]) == ("fuzz images", 100, [0])
    assert (record["figures"]["start"], record["figures"]["stop"]) == (0, 100)
    assert sum(record["figures"]["totals"].values()) == 100
    assert all(sum(counts.values()) == 20 for counts in record["figures"]["counts"].values())
    assert "ends at 100" in str(status_of(300, 5))


# ---------------------------------------------------------------------------------------------------------- bombs


def claim(seed: Seed, side: int) -> bytes:
    """Return a small file whose header claims a square of so many px."""
    content = bytearray(seed.content)
    width, height = seed.sizes[:2]
    for place in (width, height):
        value = side - 1 if seed.kind == "WEBP" else side
        content[place.start : place.start + place.num_bytes] = value.to_bytes(place.num_bytes, place.order)
    return bytes(content)


PNG_BOMB = encode(Image.new("1", (16384, 16384)), "PNG")
BOMBS = {"PNG": PNG_BOMB} | {
    kind: claim(next(seed for seed in seeds()[kind] if kind != "WEBP" or b"VP8X" in seed.content), 16384)
    for kind in ("JPEG", "WEBP", "BMP", "GIF")
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_file_of_a_huge_picture_costs_next_to_nothing(kind: str):
    """Under 10 ms and 5 MB: the best of ten tries, since other programs run too."""
    bomb = BOMBS[kind]
    assert len(bomb) < 33 * 2**10

    def refuse() -> None:
        with pytest.raises(BadImageError, match="megapixels"):
            decode(bomb)

    refuse()
    times_s: list[float] = []
    for _ in range(10):
        began = time.perf_counter()
        refuse()
        times_s.append(time.perf_counter() - began)
    assert min(times_s) < 0.010, f"{kind}: {1e3 * min(times_s):.1f} ms at best"
    grown = [peak_mib(refuse, torch.device("cpu")) for _ in range(3)]
    assert None not in grown, "this system does not tell how much memory is used"
    assert min(figure for figure in grown if figure is not None) < 5e6 / 2**20, f"{kind}: {grown} MiB"


def refused_within_a_second(content: bytes, met: str) -> None:
    began = time.perf_counter()
    with pytest.raises(BadImageError, match=met):
        decode(content)
    took_s = time.perf_counter() - began
    assert took_s < 1.0, f"refused after {took_s:.1f} s"


def test_run_lengths_of_many_pixels_are_refused():
    """Pillow unpacks them in Python: 200 bytes kept it busy for ten seconds."""
    seed = next(seed for seed in seeds()["BMP"] if seed.content[30] == 1)
    refused_within_a_second(claim(seed, 9_000), "81 megapixels in run lengths, at most 10 are read")
    side = int(MAX_RUN_LENGTH_PIXELS**0.5)
    assert read_size(claim(seed, side)) == (side, side)


@pytest.mark.parametrize("copies", [40, 4_000])
def test_a_jpeg_of_endless_scans_is_refused(copies: int):
    """Each scan is a few bytes and goes over every pixel: 0.15 s of work each at this size."""
    whole = encode(Image.new("L", (9_000, 9_000), 128), "JPEG", progressive=True)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    assert read_size(whole) == (9_000, 9_000), "a progressive picture as programs write it is read"
    refused_within_a_second(whole[:-2] + copies * last + b"\xff\xd9", rf"{copies + 6} scans of 81 megapixels")


def test_many_scans_of_a_small_picture_are_read():
    whole = encode(Image.new("L", (16, 16), 128), "JPEG", progressive=True)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    assert decode(whole[:-2] + 200 * last + b"\xff\xd9").shape == (16, 16, 3)


def test_metadata_in_endless_pieces_is_refused():
    """Pillow joins EXIF blocks one by one, and unpacks up to 1 MB from each colour profile."""
    jpeg, png = encode(Image.new("RGB", (8, 8)), "JPEG"), encode(Image.new("RGB", (8, 8)), "PNG")
    exif = b"\xff\xe1\xff\xffExif\0\0" + bytes(65533 - 6)
    data = b"x\0\0" + zlib.compress(bytes(2**20 - 1))
    profile = len(data).to_bytes(4, "big") + b"iCCP" + data + zlib.crc32(b"iCCP" + data).to_bytes(4, "big")
    met = f"more than {MAX_BLOCKS} blocks of metadata"
    refused_within_a_second(jpeg[:2] + 500 * exif + jpeg[2:], met)
    refused_within_a_second(png[:33] + 4_000 * profile + png[33:], met)
    assert decode(jpeg[:2] + 8 * exif + jpeg[2:]).shape == (8, 8, 3), "a phone's picture with its preview is read"


def test_no_warning_gets_out(recwarn: pytest.WarningsRecorder):
    for index in range(300):
        with contextlib.suppress(BadImageError):
            decode(make(5, index)[1])
    assert not recwarn.list, f"a warning got out: {[str(warning.message) for warning in recwarn.list]}"
