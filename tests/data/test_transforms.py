from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from coatnet.config import AugmentConfig, PreprocessingConfig
from coatnet.data import draws
from coatnet.data.decode import decode
from coatnet.data.transforms import Augmentation, Preprocessing, erase, erase_some, random_box

GREY = {"mean": (0.286,), "std": (0.353,)}


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (28, 28), (37, 500)])
@pytest.mark.parametrize("target", [(28, 28), (64, 48)])
@pytest.mark.parametrize("channels", [{}, GREY], ids=["rgb", "grey"])
def test_every_size_fits(size, target, channels):
    image, C = noise(*size, 3), 1 if channels else 3
    for fit in ("crop", "resize"):
        config = PreprocessingConfig(image_size=target, fit=fit, **channels)
        out = Preprocessing(config)(image)
        assert (out.shape, out.dtype) == ((C, *target), torch.uint8), f"{fit}: {tuple(out.shape)} {out.dtype}"
        assert out.is_contiguous()
    for crop in ("random_resized", "pad", "resize"):
        augment = AugmentConfig(crop=crop, randaugment_ops=2, randaugment_magnitude=15)
        for position in range(3):
            rng = draws.generator(0, "augment", 0, position)
            out = Augmentation(augment, config)(image, rng)
            assert (out.shape, out.dtype) == ((C, *target), torch.uint8), f"{crop}: {tuple(out.shape)} {out.dtype}"


@given(height=st.integers(1, 90), width=st.integers(1, 90))
@settings(max_examples=30, deadline=None)
def test_crop_is_the_references_resize_and_centre_crop(height, width):
    if max(height, width) > 4 * min(height, width):
        return  # here the ends are cut off first
    image = noise(height, width, 3)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    want = F.resize(tensor, [36], interpolation=InterpolationMode.BICUBIC, antialias=True)
    want = F.center_crop(want, [32, 32])
    got = Preprocessing(PreprocessingConfig(image_size=(32, 32)))(image)
    off = (got.int() - want.int()).abs().max().item()
    assert off <= 1, f"{height} x {width}: off by {off}"


def test_a_long_picture_is_cropped_at_its_centre():
    image = np.zeros((1, 5000, 3), dtype=np.uint8)
    image[:, 2490:2510] = 200
    out = Preprocessing(PreprocessingConfig(image_size=(32, 32)))(image)
    assert out.min() == out.max() == 200, f"its centre is 200, the crop holds {out.unique().tolist()}"


def test_normalise_is_by_mean_and_std():
    config = PreprocessingConfig(image_size=(2, 2))
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    got = Preprocessing(config).normalise(images)[0, :, 0, 0]
    want = (torch.tensor([0, 128, 255]) / 255 - torch.tensor(config.mean)) / torch.tensor(config.std)
    torch.testing.assert_close(got, want)


def test_grey_is_luma_and_a_grey_picture_stays_itself():
    preprocess = Preprocessing(PreprocessingConfig(image_size=(1, 3), fit="resize", **GREY))
    colours = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], dtype=np.uint8)
    assert preprocess(colours)[0, 0].tolist() == [76, 150, 29]
    flat = noise(1, 3, 1)
    shown = np.broadcast_to(flat, (1, 3, 3))
    torch.testing.assert_close(preprocess(shown), preprocess(np.ascontiguousarray(shown)))
    assert preprocess(shown)[0].tolist() == flat[:, :, 0].tolist()


@pytest.mark.parametrize("grey", [False, True])
def test_pad_is_a_zero_padded_random_crop_with_a_flip(grey):
    image = noise(16, 40, 1) if grey else noise(16, 40, 3)
    config = PreprocessingConfig(image_size=(16, 40), **(GREY if grey else {}))
    augment = Augmentation(AugmentConfig(crop="pad", max_shift_ratio=1 / 32), config)
    padded = np.pad(image, ((1, 1), (2, 2), (0, 0))).transpose(2, 0, 1)
    crops = {padded[:, y : y + 16, x : x + 40].tobytes(): (y, x, 0) for y in range(3) for x in range(5)}
    crops |= {padded[:, y : y + 16, x : x + 40][:, :, ::-1].tobytes(): (y, x, 1) for y in range(3) for x in range(5)}
    shown = np.broadcast_to(image, (16, 40, 3))
    met = {crops[augment(shown, draws.generator(0, "augment", 0, p)).numpy().tobytes()] for p in range(500)}
    assert len(met) == 30, f"{len(met)} of the 30 crops in 500 draws"


@given(height=st.integers(1, 300), width=st.integers(1, 300), position=st.integers(0, 10_000))
@settings(deadline=None)
def test_random_boxes_lie_within_and_have_the_ratio(height, width, position):
    top, left, h, w = random_box((height, width), 0.08, draws.generator(0, "t", 0, position))
    assert min(top, left) >= 0, f"box at {top}, {left}"
    assert min(h, w) >= 1, f"box of {h} x {w}"
    assert top + h <= height, f"{top} + {h} of {height}"
    assert left + w <= width, f"{left} + {w} of {width}"
    if min(h, w) > 20:
        assert 0.7 < w / h < 1.43, f"ratio {w / h:.2f}"


def test_random_boxes_cover_the_scales():
    boxes = [random_box((200, 200), 0.08, draws.generator(0, "t", 0, position)) for position in range(1000)]
    shares = np.array([h * w / 200**2 for _, _, h, w in boxes])
    assert 0.07 < shares.min() < 0.12, f"smallest share {shares.min():.3f}"
    assert shares.max() > 0.9, f"largest share {shares.max():.3f}"
    assert np.corrcoef([top for top, *_ in boxes], [left for _, left, *_ in boxes])[0, 1] < 0.9


def test_no_crop_of_a_shrunk_jpeg_is_magnified_and_it_shows_the_same_part(tmp_path):
    """Crops of a large JPEG, decoded shrunk where that will do, are those of the whole picture, but for the filter."""
    y, x = np.mgrid[0:480, 0:640]
    picture = np.uint8(np.stack([y / 2, x / 3, (x + y) / 5], axis=2))
    path = tmp_path / "a.jpg"
    Image.fromarray(picture).save(path, quality=95, subsampling=0)
    augment = Augmentation(AugmentConfig(crop_min_scale=0.08), PreprocessingConfig(image_size=(150, 120)))
    sides = []
    for position in range(60):
        asked = []

        def read(min_side, asked=asked):
            pixels = decode(path, min_side=lambda size: asked.append(min_side(size)) or asked[-1])
            sides.append(pixels.shape[0])
            assert pixels.shape[0] >= min(asked[0], 480), f"{asked[0]} px were asked for, {pixels.shape[0]} came"
            return pixels

        shrunk = augment.read(read, draws.generator(0, "t", 0, position))
        whole = augment(decode(path), draws.generator(0, "t", 0, position))
        apart = (shrunk.float() - whole.float()).abs().mean().item()
        assert apart < 1.5, f"crop {position} differs by {apart:.2f} of 255 on average"
    assert {480, 240} <= set(sides), f"decoded to {set(sides)} px alone"


def test_erase_covers_part_with_noise():
    images = torch.zeros(100, 3, 40, 40, dtype=torch.uint8)
    for position, image in enumerate(images):
        erase(image, draws.generator(0, "t", 0, position))
    shares = (images != 0).any(1).float().mean((1, 2))
    assert shares.min() > 0.01, f"a box of {shares.min():.3f}"
    assert shares.max() < 0.35, f"a box of {shares.max():.3f}"
    erase(images[0, :, :1, :1], draws.generator(0, "t", 0, 0))  # no box fits


@pytest.mark.parametrize("rate", [0.25, 1.0])
def test_about_the_asked_share_is_erased(rate):
    images, places = torch.zeros(1000, 1, 8, 8, dtype=torch.uint8), np.arange(1000)
    erase_some(images, rate, seed=0, epochs=places // 600, positions=places)
    share = (images != 0).flatten(1).any(1).float().mean().item()
    assert abs(share - rate) < 0.05, f"{share:.3f} of the pictures"


def test_rates_of_zero_and_one_are_never_and_always():
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    image[:, :4] = 255
    config = PreprocessingConfig(image_size=(8, 8))
    for rate in (0.0, 1.0):
        augment = Augmentation(AugmentConfig(crop="resize", flip_rate=rate), config)
        lefts = {augment(image, draws.generator(0, "augment", 0, p))[0, 0, 0].item() for p in range(20)}
        assert lefts == {0 if rate else 255}, f"flip_rate {rate}: the left side was {lefts}"
