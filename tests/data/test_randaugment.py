from __future__ import annotations

import numpy as np
import pytest
import torch

from coatnet.data import draws
from coatnet.data.randaugment import OPERATIONS, apply, randaugment

RAMP = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(3, 1, 1)


def rng(position: int = 0) -> np.random.Generator:
    return draws.generator(0, "t", 0, position)


@pytest.mark.parametrize("magnitude", [0, 5, 10, 15, 20, 30])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("shape", [(3, 20, 30), (1, 5, 7), (3, 1, 1), (3, 2, 9)])
def test_every_operation_keeps_shape_and_dtype_at_every_magnitude(operation, magnitude, shape):
    image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = image.clone()
    out = apply(operation, image, magnitude, rng())
    assert (out.shape, out.dtype) == (image.shape, torch.uint8), f"{tuple(out.shape)} {out.dtype}"
    assert torch.equal(image, before), f"{operation} changed the picture it was given"


def test_there_are_the_references_sixteen():
    assert len(set(OPERATIONS)) == 16


# What the reference's formulas give: bits kept, solarize threshold, amount added, enhancement factor.
@pytest.mark.parametrize(
    ("magnitude", "bits", "threshold", "added", "factor"),
    [(5, 2, 128, 55, 1.0), (10, 4, 256, 110, 1.9), (15, 6, 384, 165, 2.8), (20, 8, 512, 220, 3.7)],
)
def test_magnitudes_are_on_the_references_scale(magnitude, bits, threshold, added, factor):
    values = RAMP[0].flatten().int()

    def out(operation: str) -> torch.Tensor:
        return apply(operation, RAMP, magnitude, rng())[0].flatten().int()

    assert out("Posterize").unique().numel() == 2**bits
    torch.testing.assert_close(out("Solarize"), torch.where(values < threshold, values, 255 - values))
    torch.testing.assert_close(out("SolarizeAdd"), torch.where(values < 128, (values + added).clamp(max=255), values))
    torch.testing.assert_close(out("Brightness"), (values * factor).clamp(max=255).int(), atol=1, rtol=0)
    mean = values.float().mean()
    turned = (mean + (values - mean) * factor).clamp(0, 255).int()
    torch.testing.assert_close(out("Contrast"), turned, atol=3, rtol=0)  # the mean grey is a whole number there


@pytest.mark.parametrize(("magnitude", "px"), [(5, 50), (10, 100), (15, 150), (20, 200)])
def test_translation_is_in_px_of_224_and_grey_comes_in(magnitude, px):
    image = torch.zeros(3, 224, 224, dtype=torch.uint8)
    for operation, axis in (("TranslateX", 1), ("TranslateY", 0)):
        shifted = [apply(operation, image, magnitude, rng(position))[0] == 128 for position in range(20)]
        widths = {int(grey.any(1 - axis).sum()) for grey in shifted}
        assert widths == {px}, f"{operation} at {magnitude} moved by {widths} px"
        assert len({bool(grey[0, 0]) for grey in shifted}) == 2, f"{operation} went one way only"
    half = apply("TranslateX", image[:, :112, :112], magnitude, rng())[0] == 128
    assert int(half.any(0).sum()) == px // 2, "a picture of half the size moves by half the pixels"


@pytest.mark.parametrize(("magnitude", "degrees"), [(5, 15), (10, 30), (15, 45), (20, 60)])
def test_rotation_is_in_degrees_about_the_centre(magnitude, degrees):
    image = torch.zeros(1, 101, 101, dtype=torch.uint8)
    image[0, 50, 51:] = 255  # a ray from the centre to the right
    for position in range(4):
        y, x = torch.nonzero(apply("Rotate", image, magnitude, rng(position))[0] == 255, as_tuple=True)
        angles = torch.atan2((y - 50).float(), (x - 50).float()).rad2deg().abs()
        angle = angles[torch.hypot(y - 50.0, x - 50.0) > 20].mean().item()
        assert angle == pytest.approx(degrees, abs=1), f"magnitude {magnitude} turned by {angle:.1f} degrees"


@pytest.mark.parametrize(("magnitude", "slope"), [(5, 0.15), (10, 0.3), (15, 0.45), (20, 0.6)])
def test_shear_has_its_slope(magnitude, slope):
    image = torch.zeros(1, 100, 300, dtype=torch.uint8)
    image[:, :, 150] = 255
    x = (apply("ShearX", image, magnitude, rng())[0] == 255).int().argmax(1)
    assert abs(int(x[99]) - int(x[0])) == pytest.approx(99 * slope, abs=1.5)
    column = apply("ShearY", image.transpose(1, 2), magnitude, rng())[0]
    y = (column == 255).int().argmax(0)
    assert abs(int(y[99]) - int(y[0])) == pytest.approx(99 * slope, abs=1.5)


@pytest.mark.parametrize(("magnitude", "side"), [(5, 40), (10, 80), (15, 120), (20, 160)])
def test_cutout_has_its_side(magnitude, side):
    image = torch.zeros(1, 224, 224, dtype=torch.uint8)
    sides = [int((apply("Cutout", image, magnitude, rng(p))[0] == 128).any(0).sum()) for p in range(60)]
    assert max(sides) == side, f"the widest of 60 was {max(sides)} px"


def test_operations_are_drawn_evenly_and_by_the_generator_alone():
    image = torch.randint(0, 256, (3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    first = [randaugment(image, 2, 15, rng(position)) for position in range(50)]
    again = [randaugment(image, 2, 15, rng(position)) for position in range(50)]
    assert all(map(torch.equal, first, again))
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    assert len({out.numpy().tobytes() for out in first}) > 40


def test_an_unknown_operation_is_named():
    with pytest.raises(ValueError, match="no operation 'Twirl'"):
        apply("Twirl", RAMP, 5, rng())
