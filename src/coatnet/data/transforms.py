"""From decoded pictures to the network's input: one preprocessing, and training's augmentation before it.

Pictures come as (H, W, 3) uint8 and leave as (C, h, w) uint8, C being 3, or 1 for grey; `normalise` makes them float32
on the device. Draws come from the generator that is handed in, never from a global one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from coatnet.config import AugmentConfig, PreprocessingConfig
from coatnet.data import draws
from coatnet.data.decode import MinSide, Pixels
from coatnet.data.draws import FloatArray

Box = tuple[int, int, int, int]  # top, left, height, width in px

GREY_AXES = 2  # of a grey picture in memory, which has no axis of channels
_LUMA = np.array([19595, 38470, 7471], dtype=np.uint32)  # ITU-R 601 in 1/65536, as Pillow rounds it


class Preprocessing:
    """What evaluation, predict, export and the server do to a picture; stored with the model."""

    def __init__(self, config: PreprocessingConfig) -> None:
        self.config = config

    def __call__(self, image: Pixels) -> Tensor:
        """Fit one picture: (H, W, 3) uint8 -> (C, h, w) uint8."""
        size, channels = self.config.image_size, len(self.config.mean)
        if self.config.fit == "resize":
            return _resize(_to_tensor(image, channels), size).contiguous()
        return _fit_crop(_to_tensor(_trim(image, size), channels), size, self.config.crop_ratio)

    def normalise(self, images: Tensor) -> Tensor:
        """Shift and scale by mean and std: (B, C, h, w) uint8 -> the same shape in float32, on the same device."""
        mean = torch.tensor(self.config.mean, device=images.device).view(-1, 1, 1) * 255
        std = torch.tensor(self.config.std, device=images.device).view(-1, 1, 1) * 255
        return images.float().sub_(mean).div_(std)


class Augmentation:
    """What training does to a picture: crop, flip, RandAugment, in this order. Source: Table 10."""

    def __init__(self, config: AugmentConfig, preprocessing: PreprocessingConfig) -> None:
        self.config = config
        self.size = preprocessing.image_size
        self.channels = len(preprocessing.mean)

    def __call__(self, image: Pixels, rng: np.random.Generator) -> Tensor:
        """Augment one picture: (H, W, 3) uint8 -> (C, h, w) uint8."""
        return self.read(lambda _min_side: image, rng)

    def read(self, read: Callable[[MinSide], Pixels], rng: np.random.Generator) -> Tensor:
        """Augment the picture that `read` gives, which may come shrunk as far as what will be seen of it allows."""
        config = self.config
        flip = rng.random() < config.flip_rate
        seen: list[tuple[Box, tuple[int, int]]] = []  # the box, and the size that it is a part of

        def min_side(size: tuple[int, int]) -> int:
            box: Box = (0, 0, size[0], size[1])
            if config.crop == "random_resized":
                box = random_box(size, config.crop_min_scale, rng)
            seen.append((box, size))
            return math.ceil(min(size) * max(self.size[0] / box[2], self.size[1] / box[3]))

        image = read(min_side)
        if not seen:  # no JPEG: nobody asked
            min_side((image.shape[0], image.shape[1]))
        if config.crop == "pad":
            out = self._pad_and_crop(image, rng, flip)
        else:
            out = _resize(_to_tensor(_cut(image, *seen[0]), self.channels), self.size)
            seen_CHW = out.numpy()[:, :, ::-1] if flip else out.numpy()
            out = torch.from_numpy(np.ascontiguousarray(seen_CHW))  # one pass, where torch would mirror first
        if config.randaugment_ops:
            from coatnet.data.randaugment import randaugment  # brings torchvision, slow to load; predict needs none

            out = randaugment(out, config.randaugment_ops, config.randaugment_magnitude, rng)
        return out

    def only_moves(self, shape: tuple[int, ...]) -> bool:
        """Whether pictures of this shape, (H, W) or (H, W, 3), are shifted and mirrored at most: `move` does many."""
        config, is_grey = self.config, len(shape) == GREY_AXES
        changes = config.crop == "random_resized" or config.randaugment_ops
        return not changes and shape[:2] == self.size and (is_grey or self.channels == shape[-1])

    def move(self, images: Pixels, draws_B3: FloatArray) -> Tensor:
        """Do to many pictures what `read` does to each, given the first numbers that each one's generator draws.

        images (B, H, W) or (B, H, W, 3) uint8 -> (B, C, H, W) uint8
        """
        images_BHWC = images[..., None] if images.ndim == 1 + GREY_AXES else images
        B, h, w, _ = images_BHWC.shape
        pads = [self._pad(side) if self.config.crop == "pad" else 0 for side in (h, w)]
        padded = np.pad(images_BHWC, ((0, 0), (pads[0],) * 2, (pads[1],) * 2, (0, 0)))
        tops, lefts = ((draws_B3[:, 1 + i] * (2 * pad + 1)).astype(np.int64) for i, pad in enumerate(pads))
        flips = draws_B3[:, 0] < self.config.flip_rate
        columns = np.where(flips[:, None], np.arange(w)[::-1], np.arange(w)) + lefts[:, None]
        rows = np.arange(h) + tops[:, None]
        moved = torch.from_numpy(padded[np.arange(B)[:, None, None], rows[:, :, None], columns[:, None, :]])
        return moved.permute(0, 3, 1, 2).expand(-1, self.channels, -1, -1).contiguous()

    def _pad_and_crop(self, image: Pixels, rng: np.random.Generator, flip: bool) -> Tensor:
        """Shift by up to a share of each side, black beyond the border: a padded random crop without the pad."""
        h, w = self.size
        if image.shape[:2] != self.size:
            image = cast(Pixels, _resize(_to_tensor(image, self.channels), self.size).permute(1, 2, 0).numpy())
        draws = rng.random(2)
        dy, dx = (self._shift(side, draw) for side, draw in zip(self.size, draws, strict=True))
        kept = _to_channels(image[max(0, dy) : h + min(0, dy), max(0, dx) : w + min(0, dx)], self.channels)
        out_CHW = np.zeros((self.channels, h, w), dtype=np.uint8)
        target = out_CHW[:, :, ::-1] if flip else out_CHW
        target[:, max(0, -dy) : h - max(0, dy), max(0, -dx) : w - max(0, dx)] = kept.transpose(2, 0, 1)
        return torch.from_numpy(out_CHW)

    def _shift(self, side: int, draw: float) -> int:
        """Turn a draw into a shift in px, uniform over -pad .. pad."""
        pad = self._pad(side)
        return int(draw * (2 * pad + 1)) - pad

    def _pad(self, side: int) -> int:
        """Return the largest shift in px."""
        return math.ceil(side * self.config.max_shift_ratio - 1e-9)  # a twelfth of 36 is 3, whatever floats say


def _cut(image: Pixels, box: Box, size: tuple[int, int]) -> Pixels:
    """Cut a box of a picture of that size out of what may have come shrunk."""
    top, left, height, width = box
    y, x = image.shape[0] / size[0], image.shape[1] / size[1]
    rows = slice(round(top * y), max(round(top * y) + 1, round((top + height) * y)))
    return image[rows, round(left * x) : max(round(left * x) + 1, round((left + width) * x))]


def _to_channels(image: Pixels, channels: int) -> Pixels:
    """Keep RGB, or make it grey: (H, W, 3 or 1) uint8 -> (H, W, C) uint8."""
    if image.shape[2] == channels:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=2)
    if image.strides[2] == 0:  # a grey picture shown as RGB without copying: any channel is its grey
        return image[:, :, :1]
    return ((image @ _LUMA + 0x8000) >> 16).astype(np.uint8)[:, :, None]


def _to_tensor(image: Pixels, channels: int) -> Tensor:
    """Make (H, W, 3) uint8 a tensor (C, H, W); RGB stays channels-last, which resizes fastest."""
    pixels = np.ascontiguousarray(_to_channels(image, channels))
    return torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy()).permute(2, 0, 1)


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize with antialiased bicubic, the filter of the reference: (C, H, W) -> (C, h, w) uint8, in any layout."""
    if image.shape[1:] != size:
        # By way of (1, H, W, C), so that a batch of one is seen to lie channels-last, which takes the fast way.
        batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
        image = F.interpolate(batch, size=size, mode="bicubic", antialias=True)[0]
    return image


def _trim(image: Pixels, size: tuple[int, int]) -> Pixels:
    """Cut off evenly what the centre crop would drop of a very long picture: 1 x 5000 px must not become huge."""
    H, W = image.shape[:2]
    h, w = size
    long_h, long_w = 4 * max(1, math.ceil(W * h / w)), 4 * max(1, math.ceil(H * w / h))
    top, left = max(0, (H - long_h) // 2), max(0, (W - long_w) // 2)
    return image[top : H - top, left : W - left]


def _fit_crop(image: Tensor, size: tuple[int, int], crop_ratio: float) -> Tensor:
    """Resize so that size / crop_ratio is just covered, then cut out the centre: (C, H, W) -> (C, h, w) uint8."""
    (H, W), (h, w) = image.shape[1:], size
    cover_h, cover_w = int(h / crop_ratio), int(w / crop_ratio)
    image = _resize(image, (max(cover_h, H * cover_w // W), max(cover_w, W * cover_h // H)))
    top, left = round((image.shape[1] - h) / 2), round((image.shape[2] - w) / 2)
    return image[:, top : top + h, left : left + w].contiguous()


def random_box(size: tuple[int, ...], min_scale: float, rng: np.random.Generator) -> Box:
    """Draw a box of min_scale .. 1 of the area and of ratio 3/4 .. 4/3; after ten misses, the largest central one.

    Source: Inception's crop (Szegedy et al., arXiv 1409.4842, section 6), as torchvision's RandomResizedCrop draws it.
    """
    H, W = size
    low, high = 3 / 4, 4 / 3
    for _ in range(10):
        area = H * W * rng.uniform(min_scale, 1.0)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        height, width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < height <= H and 0 < width <= W:
            return int(rng.integers(H - height + 1)), int(rng.integers(W - width + 1)), height, width
    height, width = min(H, max(1, round(W / low))), min(W, max(1, round(H * high)))
    return (H - height) // 2, (W - width) // 2, height, width


def erase_some(images: Tensor, rate: float, *, seed: int, epochs: draws.IntArray, positions: draws.IntArray) -> None:
    """Erase from about so great a share of a batch: images (B, C, h, w) uint8, in place; epochs, positions (B,)."""
    chances_B = draws.uniforms(seed, "erase", epochs, positions, 1)[:, 0]
    for row in np.flatnonzero(chances_B < rate).tolist():
        erase(images[row], draws.generator(seed, "erased box", int(epochs[row]), int(positions[row])))


def erase(image: Tensor, rng: np.random.Generator) -> None:
    """Put noise over a box of 2 .. 33 % of the area and of ratio 0.3 .. 3.3 of an image (C, h, w) uint8, in place.

    Source: Zhong et al., arXiv 1708.04896.
    """
    C, h, w = image.shape
    for _ in range(10):
        area = h * w * rng.uniform(0.02, 0.33)
        ratio = math.exp(rng.uniform(math.log(0.3), math.log(3.3)))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < height < h and 0 < width < w:
            top, left = int(rng.integers(h - height + 1)), int(rng.integers(w - width + 1))
            noise = rng.integers(0, 256, (C, height, width), dtype=np.uint8)
            image[:, top : top + height, left : left + width] = torch.from_numpy(noise)
            return
