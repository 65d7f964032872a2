import math

import piq
import pytest
import torch
from analytic import normal

from particledaps.evaluation.metrics import Evaluator, psnr_db, ssim, to_unit_range
from particledaps.operators.operator import IDENTITY
from particledaps.operators.phase_retrieval import PhaseRetrieval

SYMMETRIES = PhaseRetrieval().symmetries()


def images(count, seed, side=24, channels=3):
    return (0.5 * normal(count, channels, side, side, seed=seed, dtype=torch.float32)).clamp(-1, 1)


def flipped(x):
    return x.flip((-2, -1))


def test_range_map_clips():
    assert to_unit_range(torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 3.0])).tolist() == [0, 0, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize(("offset", "expected"), [(0.2, 20.0), (0.02, 40.0), (1.0, -10 * math.log10(0.25))])
def test_psnr_of_a_constant_offset(offset, expected):
    """An offset of 0.2 in [-1, 1] is 0.1 in [0, 1]."""
    truth = torch.full((2, 3, 16, 16), -0.5)
    assert psnr_db(truth + offset, truth).tolist() == pytest.approx([expected] * 2, abs=1e-3)


def test_psnr_of_the_truth_is_80_db():
    x = images(1, 1)
    assert psnr_db(x, x).item() == pytest.approx(80)


def test_psnr_ignores_what_clipping_removes():
    truth = torch.ones(1, 1, 16, 16)
    assert psnr_db(truth + 5, truth).item() == pytest.approx(80)


def test_psnr_and_ssim_are_those_of_piq():
    x, truth = 1.5 * images(4, 1), images(4, 2)
    unit = (x / 2 + 0.5).clamp(0, 1), (truth / 2 + 0.5).clamp(0, 1)
    expected_psnr = piq.psnr(*unit, data_range=1.0, reduction="none").double()
    expected_ssim = piq.ssim(*unit, kernel_size=11, kernel_sigma=1.5, data_range=1.0, reduction="none").double()
    torch.testing.assert_close(psnr_db(x, truth), expected_psnr, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ssim(x, truth), expected_ssim, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("a", "b"), [(0.2, 0.8), (0.5, 0.5), (0.0, 1.0)])
def test_ssim_of_constant_images_is_the_luminance_term(a, b):
    """Without variance SSIM is ``(2 a b + c1) / (a^2 + b^2 + c1)``, ``c1 = 0.01^2``."""
    x, truth = (torch.full((1, 3, 24, 24), 2 * v - 1) for v in (a, b))
    assert ssim(x, truth).item() == pytest.approx((2 * a * b + 1e-4) / (a * a + b * b + 1e-4), abs=1e-4)


@pytest.mark.parametrize("side", [4, 7, 8, 10, 11, 24])
def test_ssim_of_the_truth_is_one_at_any_size(side):
    x = images(2, 1, side)
    assert ssim(x, x).tolist() == pytest.approx([1, 1], abs=1e-6)


def test_aligned_scores_are_those_of_the_better_twin():
    truth = images(1, 1)
    noise = 0.1 * images(3, 2)
    x = torch.cat([truth + noise[0], flipped(truth) + noise[1], noise[2:]])
    scores = Evaluator(SYMMETRIES)(x, truth)
    assert scores.best_symmetry[:2] == ["identity", "rotate_180"]
    assert scores.raw["psnr"] == pytest.approx(psnr_db(x, truth.expand_as(x)).tolist())
    expected = psnr_db(flipped(x[1:2]), truth).item(), ssim(flipped(x[1:2]), truth).item()
    assert (scores.aligned["psnr"][1], scores.aligned["ssim"][1]) == pytest.approx(expected)
    assert scores.aligned["psnr"][0] == scores.raw["psnr"][0]


def test_aligned_psnr_is_the_maximum_over_symmetries():
    x, truth = images(16, 1), images(1, 2)
    scores = Evaluator(SYMMETRIES)(x, truth)
    both = torch.stack([psnr_db(s.apply(x), truth.expand_as(x)) for s in SYMMETRIES])
    assert scores.aligned["psnr"] == pytest.approx(both.amax(0).tolist())
    assert all(a >= r for a, r in zip(scores.aligned["psnr"], scores.raw["psnr"], strict=True))
    assert set(scores.best_symmetry) == {"identity", "rotate_180"}


def test_alignment_is_chosen_by_psnr_even_where_ssim_disagrees():
    """A ramp that fits upright and a texture that fits rotated: PSNR follows the ramp, SSIM the texture."""
    ramp = torch.linspace(-0.4, 0.4, 48).expand(1, 3, 48, 48)
    texture = 0.12 * normal(1, 3, 48, 48, seed=1, dtype=torch.float32)
    truth, x = ramp + texture, ramp + flipped(texture)
    assert psnr_db(x, truth) > psnr_db(flipped(x), truth)
    assert ssim(x, truth) < ssim(flipped(x), truth)
    scores = Evaluator(SYMMETRIES)(x, truth)
    assert scores.best_symmetry == ["identity"]
    assert scores.aligned["ssim"] == scores.raw["ssim"]


def test_without_ambiguity_aligned_is_raw():
    scores = Evaluator((IDENTITY,))(images(3, 1), images(1, 2))
    assert scores.aligned == scores.raw


def test_channel_aligned_scores_forgive_turned_channels():
    truth = images(1, 1)
    noisy = truth + 0.1 * images(3, 2)
    x = noisy.clone()
    x[1, 2:], x[2] = flipped(noisy[1:2])[0, 2:], flipped(noisy[2:])[0]
    operator = PhaseRetrieval()
    scores = Evaluator(operator.symmetries(), None, operator.channel_symmetries)(x, truth)
    assert scores.channel_aligned["psnr"] == pytest.approx(psnr_db(noisy, truth.expand_as(x)).tolist())
    assert scores.channel_aligned["ssim"] == pytest.approx(ssim(noisy, truth.expand_as(x)).tolist())
    assert scores.aligned["psnr"][1] < scores.channel_aligned["psnr"][1] - 3
    assert Evaluator(SYMMETRIES)(x, truth).channel_aligned == {}


def test_metrics_without_lpips_weights():
    evaluator = Evaluator(SYMMETRIES)
    assert evaluator.names == ("psnr", "ssim")
    assert set(evaluator(images(2, 1), images(1, 2)).raw) == {"psnr", "ssim"}


@pytest.mark.parametrize("channels", [1, 3])
def test_lpips_network_sees_three_channels_in_unit_range(channels):
    """A stand-in network: mean absolute difference."""
    seen = []

    def network(a, b):
        seen.extend([a, b])
        return (a - b).abs().mean((1, 2, 3), keepdim=True)

    x, truth = 1.5 * images(2, 1, channels=channels), images(1, 2, channels=channels)
    scores = Evaluator((IDENTITY,), network)(x, truth)
    expected = (to_unit_range(x) - to_unit_range(truth)).abs().mean((1, 2, 3))
    assert scores.raw["lpips"] == pytest.approx(expected.tolist())
    assert all(image.shape == (2, 3, 24, 24) and image.min() >= 0 and image.max() <= 1 for image in seen)
