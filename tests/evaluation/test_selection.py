import pytest
import torch
from analytic import normal, prior_of

from diffusion.analytic import GaussianDenoiser
from evaluation.orientation import NUM_DRAWS, SIGMAS, plausibility_loss
from evaluation.selection import RULE, select
from operators.phase_retrieval import PhaseRetrieval

SHAPE = (3, 16, 16)
VARIANCE = 0.05
SYMMETRIES = PhaseRetrieval().symmetries()
TOP_IS_BRIGHT = torch.linspace(0.6, -0.6, 16)[None, :, None].expand(SHAPE).contiguous()
PRIOR = prior_of(GaussianDenoiser(TOP_IS_BRIGHT, VARIANCE), SHAPE)


def draws(count, seed=1):
    return TOP_IS_BRIGHT + VARIANCE**0.5 * normal(count, *SHAPE, seed=seed, dtype=torch.float32)


def flipped(x):
    return x.flip((-2, -1))


def expected_loss(z):
    """Expectation over the noise: ``D(z + s e) - z = (k - 1)(z - mu) + k s e`` with ``k = v / (v + s^2)``."""
    total = 0
    for sigma in SIGMAS:
        k = VARIANCE / (VARIANCE + sigma**2)
        distance = (z - TOP_IS_BRIGHT).square().flatten(1).mean(1)
        total = total + ((1 - k) ** 2 * distance + k**2 * sigma**2) / sigma**2
    return total


def test_plausibility_is_the_weighted_denoising_loss():
    x = torch.cat([draws(2), flipped(draws(2))])
    torch.testing.assert_close(plausibility_loss(PRIOR, x), expected_loss(x), rtol=0.03, atol=0)


def test_plausibility_by_hand_with_its_noise():
    x = draws(2)
    generator, total = torch.Generator().manual_seed(7), torch.zeros(2)
    for sigma in SIGMAS:
        for _ in range(NUM_DRAWS):
            noisy = x + sigma * torch.randn(SHAPE, generator=generator)
            denoised = TOP_IS_BRIGHT + VARIANCE / (VARIANCE + sigma**2) * (noisy - TOP_IS_BRIGHT)
            total += (denoised - x).square().mean((1, 2, 3)) / sigma**2 / 4
    torch.testing.assert_close(plausibility_loss(PRIOR, x, seed=7), total, rtol=1e-5, atol=0)


def test_sigmas_and_draws_are_the_settled_ones():
    assert (SIGMAS, NUM_DRAWS) == ((0.3, 0.5, 0.8, 1.2, 2.0), 4)


def test_every_image_meets_the_same_noise():
    x = draws(3)
    together = plausibility_loss(PRIOR, x)
    alone = torch.cat([plausibility_loss(PRIOR, row[None]) for row in x])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)
    torch.testing.assert_close(plausibility_loss(PRIOR, torch.cat([x[:1]] * 2)).diff(), torch.zeros(1))


def test_plausibility_ignores_the_global_generator():
    torch.manual_seed(1)
    first = plausibility_loss(PRIOR, draws(1))
    torch.manual_seed(2)
    assert torch.equal(plausibility_loss(PRIOR, draws(1)), first)


def test_upright_images_are_more_plausible_than_rotated_ones():
    assert (plausibility_loss(PRIOR, draws(4)) < plausibility_loss(PRIOR, flipped(draws(4)))).all()


@pytest.mark.parametrize("best", [0, 1, 2])
def test_selection_takes_the_lowest_loss(best):
    loss = torch.tensor([70.0, 71.0, 72.0]).roll(best)
    chosen = select(PRIOR, draws(3), loss, SYMMETRIES)
    assert (chosen.index, chosen.symmetry, chosen.rule) == (best, "identity", RULE)
    assert chosen.scores == loss.tolist()


@pytest.mark.parametrize(("turn", "symmetry"), [(lambda x: x, "identity"), (flipped, "rotate_180")])
def test_selection_turns_the_answer_upright(turn, symmetry):
    chosen = select(PRIOR, turn(draws(2)), torch.tensor([3.0, 1.0]), SYMMETRIES)
    assert (chosen.index, chosen.symmetry) == (1, symmetry)
    assert min(chosen.plausibility, key=chosen.plausibility.get) == symmetry


def test_the_measurement_decides_before_the_prior():
    """A rotated answer with a lower loss wins over an upright, more plausible one."""
    x = torch.cat([draws(1), flipped(draws(1, seed=2))])
    assert select(PRIOR, x, torch.tensor([70.5, 70.0]), SYMMETRIES).index == 1


def test_plausibility_is_reported_for_each_view_of_the_chosen_particle():
    x = draws(2)
    chosen = select(PRIOR, x, torch.tensor([2.0, 1.0]), SYMMETRIES)
    views = torch.cat([x[1:], flipped(x[1:])]).clamp(-1, 1)
    assert list(chosen.plausibility) == ["identity", "rotate_180"]
    assert list(chosen.plausibility.values()) == pytest.approx(plausibility_loss(PRIOR, views).tolist())
