from __future__ import annotations

import numpy as np
import pytest
import torch

from coatnet.data.mixing import mix

KINDS = [(0.8, None), (None, 1.0), (0.8, 1.0)]


def batch(num: int = 64, start: int = 128):
    """Pictures of one value each, their number, so that a pixel tells whose it was."""
    numbers = torch.arange(start, start + num)
    images = numbers.double().view(-1, 1, 1, 1).expand(num, 2, 12, 16).clone()
    targets = torch.nn.functional.one_hot(numbers - start, num).double()
    return images, targets, numbers


def run(images, targets, positions, mixup, cutmix, seed=0):
    return mix(images, targets, positions, seed=seed, mixup_alpha=mixup, cutmix_alpha=cutmix)


@pytest.mark.parametrize(("mixup", "cutmix"), KINDS)
def test_targets_say_how_much_of_each_picture_is_there(mixup, cutmix):
    images, targets, positions = batch()
    mixed, soft = run(images, targets, positions, mixup, cutmix)
    torch.testing.assert_close(soft.sum(1), torch.ones(64).double())
    for row, position in enumerate(positions.tolist()):
        partner = row ^ 1
        own = ((mixed[row] - (position ^ 1)) / (position - (position ^ 1))).mean()
        torch.testing.assert_close(soft[row, row], own, atol=1e-6, rtol=0, msg=lambda t, r=row: f"picture {r}: {t}")
        torch.testing.assert_close(soft[row, row] + soft[row, partner], torch.tensor(1.0).double())


@pytest.mark.parametrize(("mixup", "cutmix"), KINDS)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_mix_as_one_does(mixup, cutmix, num_ranks):
    whole = batch()
    want = run(*whole, mixup, cutmix)
    shares = [run(*parts, mixup, cutmix) for parts in zip(*(part.chunk(num_ranks) for part in whole), strict=True)]
    for index, name in enumerate(("images", "targets")):
        torch.testing.assert_close(torch.cat([share[index] for share in shares]), want[index], msg=name)


def test_both_kinds_come_about_equally_often():
    images, targets, positions = batch(400)
    mixed, _ = run(images, targets, positions, 0.8, 1.0)
    whole = (mixed[::2] == mixed[::2, :, :1, :1]).flatten(1).all(1)  # one value throughout: mixup, or an empty box
    share = whole.double().mean().item()
    assert 0.4 < share < 0.62, f"{share:.2f} of the pairs were mixed up"


def test_shares_have_betas_spread():
    _, targets, positions = batch(1000)
    images = torch.zeros(1000, 1, 1, 1).double()
    _, soft = run(images, targets, positions, 0.8, None)
    kept = soft.diagonal()[::2].numpy()
    assert abs(kept.mean() - 0.5) < 0.05, f"mean {kept.mean():.3f}"
    assert abs(kept.var() - 1 / (4 * (2 * 0.8 + 1))) < 0.02, f"variance {kept.var():.3f}"


def test_one_without_a_neighbour_stays_itself():
    images, targets, positions = batch(5, start=127)  # 127 is the odd half of a pair, 128..131 are two pairs
    mixed, soft = run(images, targets, positions, 0.8, None)
    assert torch.equal(mixed[0], images[0])
    assert torch.equal(soft[0], targets[0])
    assert not torch.equal(mixed[1], images[1])


def test_off_is_off_and_dtypes_stay():
    images, targets, positions = batch(8)
    assert run(images, targets, positions, None, None)[0] is images
    mixed, soft = run(images.bfloat16(), targets.float(), positions, 0.8, 1.0)
    assert (mixed.dtype, soft.dtype) == (torch.bfloat16, torch.float32)


def test_seeds_and_pairs_differ():
    images, targets, positions = batch()
    kept = run(images, targets, positions, 0.8, None)[1].diagonal().numpy()
    other = run(images, targets, positions, 0.8, None, seed=1)[1].diagonal().numpy()
    assert len(np.unique(kept.round(9))) == 32, f"32 pairs drew {len(np.unique(kept.round(9)))} shares"
    assert not np.isclose(kept, other).any(), "two seeds drew the same share"
