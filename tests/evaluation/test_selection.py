import math

import pytest
import torch
from analytic import normal, prior_of

from particledaps.diffusion.analytic import GaussianDenoiser
from particledaps.evaluation.orientation import LOG_STEP, NUM_DRAWS, SIGMAS, plausibility_loss, prior_energy
from particledaps.evaluation.selection import RULES, Candidates, score_candidates, select
from particledaps.operators.phase_retrieval import PhaseRetrieval

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


MEASUREMENT = PhaseRetrieval().measure(draws(1, seed=5), torch.Generator().manual_seed(6))


def choose(x, loss, rule="loss"):
    return select(PRIOR, PhaseRetrieval(), Candidates(x, torch.as_tensor(loss), MEASUREMENT), rule)


@pytest.mark.parametrize("best", [0, 1, 2])
def test_the_default_rule_takes_the_lowest_loss(best):
    loss = torch.tensor([70.0, 71.0, 72.0]).roll(best)
    chosen = choose(draws(3), loss)
    assert (chosen.index, chosen.symmetry, chosen.rule) == (best, "identity", "loss_then_orientation")
    assert chosen.scores == loss.tolist()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("turn", "symmetry"), [(lambda x: x, "identity"), (flipped, "rotate_180")])
def test_the_answer_is_turned_upright_by_every_rule(rule, turn, symmetry):
    chosen = choose(turn(draws(2)), [3.0, 1.0], rule)
    assert chosen.symmetry == symmetry
    assert min(chosen.plausibility, key=chosen.plausibility.get) == symmetry


def test_the_measurement_decides_before_the_prior():
    """A rotated answer with a lower loss wins over an upright, more plausible one."""
    x = torch.cat([draws(1), flipped(draws(1, seed=2))])
    assert choose(x, [70.5, 70.0]).index == 1


def test_plausibility_is_reported_for_each_view_of_the_chosen_particle():
    x = draws(2)
    chosen = choose(x, [2.0, 1.0])
    views = torch.cat([x[1:], flipped(x[1:])]).clamp(-1, 1)
    assert list(chosen.plausibility) == ["identity", "rotate_180"]
    assert list(chosen.plausibility.values()) == pytest.approx(plausibility_loss(PRIOR, views).tolist())


def test_plausibility_rule_prefers_what_the_prior_would_draw_and_ignores_the_loss_and_the_turn():
    drawn, odd = flipped(draws(1)), draws(1) + 3 * VARIANCE**0.5 * normal(1, *SHAPE, seed=3, dtype=torch.float32)
    assert choose(torch.cat([odd, drawn]), [1.0, 9.0], "plausibility").index == 1


def test_high_snr_rule_leaves_the_weak_entries_out():
    """One candidate errs where the measurement is nothing but noise, the other where it is strong."""
    operator, truth = PhaseRetrieval(), draws(1, seed=5)
    y = operator(truth)
    error = torch.zeros_like(truth)
    error[..., ::2, ::2], error[..., 1::2, 1::2] = 0.3, 0.3
    error[..., ::2, 1::2], error[..., 1::2, ::2] = -0.3, -0.3  # the highest frequency, where y is weak
    x = torch.cat([truth + 0.02, truth + error])
    total, strong = operator.loss(x, y), operator.high_snr_loss(x, y)
    assert total[1] > 10 * total[0]
    assert score_candidates(PRIOR, operator, Candidates(x, total, y), "high_snr").tolist() == strong.tolist()
    by_hand = ((operator(x) - y) * (y > 3 * operator.noise_sigma / 2**0.5)).square().flatten(1).sum(1)
    torch.testing.assert_close(strong, by_hand, rtol=1e-4, atol=1e-5)


def test_posterior_rule_is_a_sum_in_nats():
    x, loss = draws(3).clamp(-1, 1), torch.tensor([70.0, 70.2, 69.9])
    scores = score_candidates(PRIOR, PhaseRetrieval(), Candidates(x, loss, MEASUREMENT), "posterior")
    plausibility = torch.minimum(plausibility_loss(PRIOR, x), plausibility_loss(PRIOR, flipped(x)))
    torch.testing.assert_close(scores, loss / (2 * 0.05**2) + prior_energy(PRIOR, plausibility))


def test_posterior_takes_another_tau():
    x, loss = draws(3).clamp(-1, 1), torch.tensor([3.0, 1.0, 2.0])
    candidates = Candidates(x, loss, MEASUREMENT, tau=0.1)
    plausibility = torch.minimum(plausibility_loss(PRIOR, x), plausibility_loss(PRIOR, flipped(x)))
    scores = score_candidates(PRIOR, PhaseRetrieval(), candidates, "posterior")
    torch.testing.assert_close(scores, loss / (2 * 0.1**2) + prior_energy(PRIOR, plausibility))


def test_prior_energy_is_the_log_density_over_the_sigmas_it_sees():
    """For a Gaussian prior the integral between two sigmas is known: its slope in z is that of the smoothed densities.

    ``-log p`` differs between two points by the integral of the difference of the denoising losses; between sigma_a
    and sigma_b it is the difference of the quadratic forms ``|z - mu|^2 / 2 (v + s^2)``.
    """
    near, far = TOP_IS_BRIGHT[None], (TOP_IS_BRIGHT + 0.6)[None]
    energy = prior_energy(PRIOR, plausibility_loss(PRIOR, torch.cat([near, far]), seed=1))
    edges = [SIGMAS[0] * math.exp(-LOG_STEP / 2), SIGMAS[-1] * math.exp(LOG_STEP / 2)]
    distance = (far - near).square().sum().item()
    known = distance / 2 * (1 / (VARIANCE + edges[0] ** 2) - 1 / (VARIANCE + edges[1] ** 2))
    assert (energy[1] - energy[0]).item() == pytest.approx(known, rel=0.03)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="rule='best'"):
        choose(draws(2), [1.0, 2.0], "best")


@pytest.mark.parametrize(
    ("losses", "margin", "expected"),
    [
        ([70.0, 69.5], 0.7, 0),
        ([70.0, 69.2], 0.7, 1),
        ([70.0, 69.5, 69.1, 68.5], 0.7, 2),  # the third is lower than the first by 0.9, the last than it by 0.6
        ([70.0, 69.9], 0.0, 1),
        ([70.0, 70.0], 0.0, 0),
        ([70.0], 5.0, 0),
    ],
)
def test_fresh2_keeps_the_first_unless_a_later_one_is_lower_by_a_margin(losses, margin, expected):
    candidates = Candidates(draws(len(losses)), torch.tensor(losses), MEASUREMENT, margin=margin)
    chosen = select(PRIOR, PhaseRetrieval(), candidates, "fresh2")
    assert (chosen.index, chosen.rule) == (expected, "fresh2_then_orientation")
