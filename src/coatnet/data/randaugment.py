"""RandAugment on the reference's scale of magnitudes, where 10 is each operation's full range.

Source: Cubuk et al., arXiv 1909.13719; list and formulas as in `autoaugment.py` of TensorFlow's EfficientNet. The
recipes' magnitudes 15 and 20 go beyond the range, as they do there: nothing is clamped but what has no meaning.
Departs: contrast turns about the picture's mean grey (the reference divides by 256 where it means the pixel count), and
lengths in pixels, which the reference states for 224 px, grow with the picture.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color", "Contrast", "Brightness",
    "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout", "SolarizeAdd",
)  # fmt: skip
FULL = 10.0  # the magnitude of an operation's full range
GREY = 128  # what is shifted in from beyond the border
_REFERENCE_PX = 224


def randaugment(image: Tensor, num_ops: int, magnitude: float, rng: np.random.Generator) -> Tensor:
    """Apply `num_ops` operations drawn with replacement, all of one magnitude: (C, h, w) uint8 -> the same."""
    for _ in range(num_ops):
        operation = OPERATIONS[int(rng.random() * len(OPERATIONS))]
        image = apply(operation, image, magnitude, rng)
    return image


def apply(operation: str, image: Tensor, magnitude: float, rng: np.random.Generator) -> Tensor:
    """Apply one operation by its name; rotation, shear and translation take their sign from `rng`."""
    level = magnitude / FULL
    _, h, w = image.shape
    match operation:
        case "AutoContrast":
            return F.autocontrast(image)
        case "Equalize":
            return F.equalize(image)
        case "Invert":
            return F.invert(image)
        case "Posterize":
            return F.posterize(image, min(8, int(level * 4)))  # beyond 8 bits nothing is left to drop
        case "Solarize":
            return torch.where(
                image.int() < int(level * 256), image, 255 - image
            )  # as int: 256 would wrap to 0 in uint8
        case "SolarizeAdd":
            brighter = (image.int() + int(level * 110)).clamp_(0, 255).to(torch.uint8)
            return torch.where(image < 128, brighter, image)
        case "Color":
            return F.adjust_saturation(image, level * 1.8 + 0.1)
        case "Contrast":
            return F.adjust_contrast(image, level * 1.8 + 0.1)
        case "Brightness":
            return F.adjust_brightness(image, level * 1.8 + 0.1)
        case "Sharpness":
            return F.adjust_sharpness(image, level * 1.8 + 0.1)
        case "Cutout":
            return _cutout(image, (int(level * 40 * h / _REFERENCE_PX), int(level * 40 * w / _REFERENCE_PX)), rng)
        case _:
            return _move(operation, image, level if rng.random() < 0.5 else -level)


def _move(operation: str, image: Tensor, level: float) -> Tensor:
    """Rotate, shear or translate by a signed level, 1 being the full range."""
    _, h, w = image.shape
    match operation:
        case "Rotate":
            cos, sin = math.cos(math.radians(level * 30)), math.sin(math.radians(level * 30))
            y, x = (h - 1) / 2, (w - 1) / 2  # the centre stays
            return _warp(image, (cos, -sin, x - cos * x + sin * y), (sin, cos, y - sin * x - cos * y))
        case "ShearX":
            return _warp(image, (1, level * 0.3, 0), (0, 1, 0))
        case "ShearY":
            return _warp(image, (1, 0, 0), (level * 0.3, 1, 0))
        case "TranslateX":
            return _warp(image, (1, 0, level * 100 * w / _REFERENCE_PX), (0, 1, 0))
        case "TranslateY":
            return _warp(image, (1, 0, 0), (0, 1, level * 100 * h / _REFERENCE_PX))
        case _:
            raise ValueError(f"RandAugment has no operation {operation!r}. It has {', '.join(OPERATIONS)}.")


def _warp(image: Tensor, to_x: tuple[float, float, float], to_y: tuple[float, float, float]) -> Tensor:
    """Fetch each pixel (x, y) from the nearest to (to_x . (x, y, 1), to_y . (x, y, 1)), grey from beyond the border."""
    _, h, w = image.shape
    x, y = torch.arange(w), torch.arange(h)[:, None]
    from_x = (to_x[0] * x + to_x[1] * y + to_x[2]).round().long()  # (h, w)
    from_y = (to_y[0] * x + to_y[1] * y + to_y[2]).round().long()
    inside = (from_x >= 0) & (from_x < w) & (from_y >= 0) & (from_y < h)
    flat = (from_y.clamp_(0, h - 1) * w + from_x.clamp_(0, w - 1)).view(-1)
    moved = image.flatten(1).gather(1, flat.expand(len(image), -1)).view_as(image)
    return moved.masked_fill_(~inside, GREY)


def _cutout(image: Tensor, half: tuple[int, int], rng: np.random.Generator) -> Tensor:
    """Grey out a box of twice `half` px a side about a random pixel, as much of it as lies within."""
    _, h, w = image.shape
    y, x = int(rng.random() * h), int(rng.random() * w)
    out = image.clone()
    out[:, max(0, y - half[0]) : y + half[0], max(0, x - half[1]) : x + half[1]] = GREY
    return out
