from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from coatnet.data import decode as module
from coatnet.data.decode import decode, read_size
from coatnet.errors import BadImageError


def smooth(height: int = 24, width: int = 36) -> np.ndarray:
    """A picture whose pixels tell where they are, and which lossy formats keep."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), np.full_like(x, 90)], -1).astype(
        np.uint8
    )


def encode(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA", "CMYK", "I;16"])
def test_every_kind_and_mode_gives_rgb(kind, mode):
    source = Image.fromarray(smooth())
    image = Image.fromarray(smooth()[:, :, 0].astype(np.uint16) * 257) if mode == "I;16" else source.convert(mode)
    try:
        content = encode(image, kind, **{"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {}))
    except (OSError, ValueError):
        content = b""
    if not content or (mode == "I;16" and kind != "PNG"):  # Pillow writes 8 bits then, clipped
        pytest.skip(f"{kind} cannot hold {mode}")
    pixels = decode(content)
    assert pixels.dtype == np.uint8, f"{kind} {mode} came as {pixels.dtype}"
    assert pixels.shape == (24, 36, 3), f"{kind} {mode} came as {pixels.shape}"
    assert read_size(content) == (24, 36)
    want = np.asarray(source.convert("L" if mode == "I;16" else mode).convert("RGB")).astype(int)
    if mode == "I;16":
        want = np.repeat(smooth()[:, :, :1], 3, axis=2).astype(int)
    off = np.abs(pixels - want).mean()
    assert off < 8, f"{kind} {mode} is off by {off:.1f} of 255 in the mean"


def test_jpeg_has_pillows_bits():
    content = encode(smooth(50, 70), "JPEG", quality=90)
    np.testing.assert_array_equal(decode(content), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"subsampling": 0},
        {"progressive": True},
        {"restart_marker_rows": 1},
        {"comment": b"a comment" * 99},
        {"exif": Image.Exif()},
        {"icc_profile": b"a profile"},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_every_kind_of_jpeg_has_pillows_bits_and_tells_its_size_once(mode, options):
    content = encode(Image.fromarray(smooth(50, 70)).convert(mode), "JPEG", quality=90, **options)
    asked: list[tuple[int, int]] = []

    def whole(size: tuple[int, int]) -> int:
        asked.append(size)
        return 50

    want = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    np.testing.assert_array_equal(decode(content, min_side=whole), want)
    assert read_size(content) == (50, 70)
    assert asked == ([] if mode == "CMYK" else [(50, 70)]), f"it was told {asked}"


def test_a_damaged_jpeg_tells_its_size_once():
    asked: list[tuple[int, int]] = []
    with pytest.raises(BadImageError):
        decode(JPEG[: len(JPEG) // 2], min_side=lambda size: asked.append(size) or 1)
    assert asked in ([], [(24, 36)]), f"it was told {asked}"


def test_sixteen_bits_are_scaled_not_clipped():
    grey = np.array([[0, 128, 257, 32768, 65535]], dtype=np.uint16)
    assert decode(encode(grey, "PNG"))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_what_is_transparent_shows_white():
    rgba = np.zeros((4, 6, 4), dtype=np.uint8)
    rgba[:, :3] = (10, 20, 30, 255)
    rgba[:, 3:] = (200, 0, 0, 0)
    palette = Image.new("P", (6, 4), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert decode(encode(rgba, "PNG"))[0, [0, 5]].tolist() == [[10, 20, 30], [255, 255, 255]]
    assert decode(encode(palette, "PNG", transparency=1))[0, 0].tolist() == [255, 255, 255]
    assert decode(encode(palette, "GIF", transparency=1))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_come_upright(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(smooth(), kind, exif=exif.tobytes())
    want = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
    np.testing.assert_array_equal(decode(content), want, err_msg=f"{kind}, orientation {orientation}")
    assert read_size(content) == want.shape[:2]


def test_a_broken_exif_block_leaves_the_picture():
    content = encode(smooth(), "JPEG", exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff" + b"\xff" * 40)
    assert decode(content).shape == (24, 36, 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_extreme_sizes(kind, size):
    assert decode(encode(smooth(*size), kind)).shape == (*size, 3)


@given(height=st.integers(1, 400), width=st.integers(1, 400), min_side=st.integers(1, 400))
@settings(max_examples=40, deadline=None)
def test_a_shrunk_jpeg_is_never_smaller_than_asked(height, width, min_side):
    pixels = decode(encode(np.zeros((height, width, 3), np.uint8), "JPEG"), min_side=min_side)
    got, had = min(pixels.shape[:2]), min(height, width)
    assert got >= min(min_side, had), f"{height} x {width} came as {pixels.shape}, asked for {min_side} or more"
    assert had < 2 * min_side or got < 2 * min_side + 2 or got == -(-had // 8), (
        f"{had} px shrank to {got} only, asked for {min_side}"
    )


def test_animations_give_their_first_frame():
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    assert decode(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))[0, 0].tolist() == [255, 0, 0]


PNG, JPEG, GIF, WEBP, BMP = (encode(smooth(), kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP"))


@pytest.mark.parametrize("content", [PNG, JPEG, GIF, WEBP, BMP], ids=["PNG", "JPEG", "GIF", "WEBP", "BMP"])
def test_what_is_cut_short_is_bad(content):
    for share in (0.1, 0.5, 0.8):
        with pytest.raises(BadImageError, match=r"^cut\.x: [^\n]+$"):
            decode(content[: int(len(content) * share)], name="cut.x")


@given(
    content=st.sampled_from([PNG, JPEG, GIF, WEBP, BMP]),
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8),
    cut=st.integers(0, 200),
)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_changed_bytes_give_a_picture_or_a_bad_image_error(content, changes, cut):
    mutated = bytearray(content[: len(content) - cut] if cut < len(content) else content)
    for place, value in changes:
        mutated[place % len(mutated)] = value
    try:
        pixels = decode(bytes(mutated), name="x")
    except BadImageError as error:
        met = str(error)
    else:
        met = f"{pixels.dtype}, {pixels.ndim} dimensions"
        assert met == "uint8, 3 dimensions"
    assert "\n" not in met, f"more than one line: {met}"


def test_each_refusal_says_why(tmp_path: Path, monkeypatch):
    def refusal(content: bytes | Path) -> str:
        with pytest.raises(BadImageError) as met:
            decode(content)
        with pytest.raises(BadImageError):
            read_size(content)
        return str(met.value)

    (tmp_path / "empty.jpg").touch()
    assert refusal(tmp_path / "empty.jpg") == f"{tmp_path}/empty.jpg: empty (0 bytes)."
    assert refusal(tmp_path / "none.jpg").endswith("none.jpg: cannot be read (No such file or directory).")
    assert refusal(tmp_path).endswith("not a file.")
    assert "not a picture of a known kind" in refusal(b"II*\0 a TIFF is none")
    assert "not a picture of a known kind" in refusal(encode(smooth(), "TIFF"))
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 2**20)
    assert refusal(b"x" * (2**20 + 2**19 + 1)) == "picture: 2 MiB, at most 1 MiB are read."


@pytest.mark.parametrize(("side", "met"), [(9_800, "96 megapixels, at most 50"), (15_000, "far more than 50")])
def test_too_many_pixels_are_refused_from_the_header(side, met, monkeypatch, recwarn):
    monkeypatch.setattr(module, "MAX_PIXELS", 50_000_000)
    bomb = encode(Image.new("1", (side, side)), "PNG")
    with pytest.raises(BadImageError, match=met):
        decode(bomb)
    assert not recwarn.list, f"a warning got out: {[str(w.message) for w in recwarn.list]}"


def test_too_many_pixels_are_refused_in_a_plain_jpeg(monkeypatch):
    monkeypatch.setattr(module, "MAX_PIXELS", 24 * 36 - 1)
    with pytest.raises(BadImageError, match="megapixels"):
        decode(JPEG)


def test_a_large_picture_within_the_limit_gives_no_warning():
    assert read_size(encode(Image.new("1", (9_900, 9_900)), "PNG")) == (9_900, 9_900)


def test_memory_errors_are_not_the_pictures_fault(monkeypatch):
    def out_of_memory(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(module.simplejpeg, "decode_jpeg", out_of_memory)
    with pytest.raises(MemoryError):
        decode(JPEG)
