"""Each symmetry move alone: what it turns, and what it leaves."""

import dataclasses

import pytest
import torch
from analytic import MatrixOperator, normal, prior_of
from symmetry_support import (
    CPU,
    IMAGE,
    OPERATOR,
    SIDE,
    Y,
    applied,
    image_prior,
    mixture,
    moves,
    near,
    state_of,
    without_density,
    wrong_channel,
)

from particledaps.operators import symmetry_moves
from particledaps.operators.phase_retrieval import rotate_180
from particledaps.operators.symmetry_moves import conjugate_band, ring
from particledaps.streams import ParticleStreams


@pytest.mark.parametrize("density", [True, False])
@pytest.mark.parametrize(("move", "spoil"), [("flip", rotate_180), ("channels", wrong_channel)])
def test_implausible_twins_are_turned_and_plausible_ones_are_not(move, spoil, density):
    """A move of a single random channel meets the wrong one at some level."""
    good = near(IMAGE, 3)
    z = torch.cat([good, spoil(good)])
    hook, state, turned = moves(image_prior(density), OPERATOR, move), state_of(z, Y), 0
    for step in range(12 if density and move == "channels" else 1):
        state, rows = applied(hook, dataclasses.replace(state, step=step))
        turned += sum(sum(row["accepted"]) for row in rows)
        for row in rows:
            for accepted, before, after in zip(
                row["accepted"], row["plausibility_before"], row["plausibility_after"], strict=True
            ):
                assert accepted == (after < before)
            assert row["rule"] == ("metropolis" if density else "denoising")
            assert row["loss_after"] == pytest.approx(row["loss_before"])  # the operator cannot tell
    assert torch.equal(state.z0_y, torch.cat([good, good])) and turned == 3
    expected = OPERATOR.loss(good, Y.expand(3, -1, -1, -1))
    torch.testing.assert_close(state.loss[3:], expected)
    assert (state.loss[:3] == -1).all()
    assert torch.equal(state.z, z + 100) and torch.equal(state.z0_hat, z + 50)


def test_a_margin_and_a_tolerance_hold_a_flip_back():
    z = near(rotate_180(IMAGE))
    prior = image_prior(density=False)
    after, (row,) = applied(moves(prior, OPERATOR, "flip"), state_of(z, Y))
    fall = 1 - row["plausibility_after"][0] / row["plausibility_before"][0]
    assert torch.equal(after.z0_y, rotate_180(z)) and 0.05 < fall < 0.999
    for margin, accepted in ((0.999 * fall, True), (1.001 * fall, False)):
        _, (row,) = applied(moves(prior, OPERATOR, "flip", margin=margin), state_of(z, Y))
        assert row["accepted"] == [accepted]

    operator = MatrixOperator(normal(3, IMAGE.numel(), seed=1))  # one that sees the flip
    y = operator(z) + 1
    _, (row,) = applied(moves(prior, operator, "flip", loss_tolerance=1e9), state_of(z, y))
    rise = row["loss_after"][0] / row["loss_before"][0] - 1
    assert row["accepted"] == [True] and rise > 0.1
    for tolerance, accepted in ((0.999 * rise, False), (1.001 * rise, True)):
        _, (row,) = applied(moves(prior, operator, "flip", loss_tolerance=tolerance), state_of(z, y))
        assert row["accepted"] == [accepted]


def test_plausibility_compares_encodings():
    """An autoencoder that drops half of the latent: the chain's own latent carries what no encoding has."""

    class Half(torch.nn.Module):
        def encode(self, x):
            return torch.cat([x, torch.zeros_like(x)], dim=1)

        def decode(self, z):
            return z[:, : z.shape[1] // 2]

    mean = Half().encode(IMAGE)
    prior = prior_of(without_density(mixture([1.0], [mean[0]], 0.3)), tuple(mean.shape[1:]), Half())
    upright = torch.cat([IMAGE, 3 * normal(*IMAGE.shape, seed=9)], dim=1)
    after, (row,) = applied(moves(prior, OPERATOR, "flip"), state_of(upright, Y))
    assert row["accepted"] == [False] and row["plausibility_before"][0] < row["plausibility_after"][0]
    assert torch.equal(after.z0_y, upright)
    after, (row,) = applied(moves(prior, OPERATOR, "flip"), state_of(Half().encode(rotate_180(IMAGE)), Y))
    assert row["accepted"] == [True]
    torch.testing.assert_close(after.z0_y, mean)


@pytest.mark.parametrize("density", [True, False])
def test_conjugation_repairs_the_band_of_a_stagnated_particle(density, monkeypatch):
    band = ring(SIDE, SIDE, 0, 0.3)
    monkeypatch.setattr(symmetry_moves, "draw_band", lambda height, width, generator: band)
    z = torch.cat([IMAGE, conjugate_band(IMAGE, band)])
    after, (row,) = applied(moves(image_prior(density), OPERATOR, "conjugate"), state_of(z, Y))
    assert row["accepted"] == [False, True] and row["rule"] == ("metropolis" if density else "likelihood")
    assert row["loss_before"][1] > 0.1 and row["loss_after"][1] < 1e-12
    assert torch.equal(after.z0_y[0], IMAGE[0])
    torch.testing.assert_close(after.z0_y[1], IMAGE[0])


def test_bands_of_particles_differ_and_are_their_own(monkeypatch):
    """At an enormous tau every band is accepted, so the result shows which it was."""
    hook = moves(image_prior(False), OPERATOR, "conjugate", tau=1e6)
    z = IMAGE.expand(4, -1, -1, -1)
    together = applied(hook, state_of(z, Y))[0].z0_y
    bands = [
        symmetry_moves.draw_band(SIDE, SIDE, ParticleStreams(42, 0).generators([i], "symmetry_band", 0, CPU)[0])
        for i in range(4)
    ]
    assert len({band.numpy().tobytes() for band in bands}) > 2
    torch.testing.assert_close(together, conjugate_band(z, torch.stack(bands)))
    alone = applied(hook, state_of(z[:1], Y, ids=[2]))[0].z0_y
    torch.testing.assert_close(alone[0], together[2])
    later = applied(hook, state_of(z, Y, step=1))[0].z0_y
    elsewhere = applied(hook, state_of(z, Y, image_id=1))[0].z0_y
    assert not torch.allclose(later, together) and not torch.allclose(elsewhere, together)


def test_windows_are_given_by_the_particle_and_the_sigma():
    hook = moves(image_prior(), OPERATOR, "window", window_sigma=2.0)
    z = near(IMAGE, 3)
    after, (row,) = applied(hook, state_of(z, Y, ids=[0, 5, 2], sigma=2.0))
    torch.testing.assert_close(after.z0_y, symmetry_moves.reduce_support(z, [0, 5, 2]))
    assert row["accepted"] == [True] * 3 and row["rule"] == "always"
    assert applied(hook, state_of(z, Y, sigma=1.99))[1] == []
    assert len(applied(hook, state_of(z, Y, sigma=50.0))[1]) == 1


def test_crossover_replaces_the_worst_by_the_aligned_mean_of_the_good_ones():
    good, bad = near(IMAGE, 2), 2 * normal(2, *IMAGE.shape[1:], seed=8)
    z = torch.cat([bad[:1], good[:1], rotate_180(good[1:]), bad[1:]])
    y = OPERATOR(near(IMAGE, scale=0.02, seed=3))
    hook = moves(image_prior(), OPERATOR, "crossover", crossover_ratio=5.0)
    after, (row,) = applied(hook, state_of(z, y))
    assert row["particle_ids"] == [0, 3] and row["accepted"] == [True, True] and row["rule"] == "loss"
    best = int(OPERATOR.loss(z, y.expand(4, -1, -1, -1))[1:3].argmin())
    mean = good.mean(0) if best == 0 else rotate_180(good.mean(0)[None])[0]
    torch.testing.assert_close(after.z0_y[[0, 3]], mean.expand(2, -1, -1, -1))
    assert torch.equal(after.z0_y[1:3], z[1:3])


def test_crossover_needs_a_particle_that_is_far_off_and_a_gain():
    hook = moves(image_prior(), OPERATOR, "crossover", crossover_ratio=1e9)
    assert applied(hook, state_of(torch.cat([near(IMAGE), near(IMAGE, seed=1, scale=1)]), Y))[1] == []
    assert applied(hook, state_of(near(IMAGE), Y))[1] == []  # alone
    hook = moves(image_prior(), OPERATOR, "crossover", crossover_ratio=1.0)
    opposed = torch.cat([IMAGE + 0.1, IMAGE - 0.1001])  # the mean is the best one: a clone
    after, (row,) = applied(hook, state_of(opposed, Y))
    assert row["accepted"] == [True] and row["loss_after"][0] < row["loss_before"][0]
    torch.testing.assert_close(after.z0_y[1], after.z0_y[0])
