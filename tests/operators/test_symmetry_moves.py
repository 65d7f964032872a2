import math

import pytest
import torch
from analytic import normal
from torch.nn import functional as F

from particledaps.operators.phase_retrieval import PhaseRetrieval, mirror_frequencies, rotate_180
from particledaps.operators.symmetry_moves import (
    aligned_mean,
    conjugate_band,
    discordant_channels,
    draw_band,
    draw_low_band,
    flip_channels,
    half_plane_window,
    reduce_support,
    reference_channel,
    ring,
    wedge,
    window_angle,
)

SHAPES = [(16, 16), (15, 16), (13, 9)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
OPERATOR = PhaseRetrieval()


def images(shape=(16, 16), count=2, seed=0):
    """Float32, in about [-1, 1]."""
    return 0.4 * normal(count, 3, *shape, seed=seed, dtype=torch.float32)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def subsets(count, channels=3):
    codes = torch.arange(2**channels)[:, None] >> torch.arange(channels) & 1
    return [row.bool().expand(count, channels) for row in codes]


def spectrum(x):
    return torch.fft.fft2(x, norm="ortho")


# --- Flips -----------------------------------------------------------------------------------------------------------


@each_shape
def test_flips_of_any_channels_keep_the_amplitude_and_are_their_own_inverses(shape):
    x = images(shape)
    for chosen in subsets(len(x)):
        moved = flip_channels(x, chosen)
        torch.testing.assert_close(OPERATOR(moved), OPERATOR(x), rtol=0, atol=1e-5)
        assert torch.equal(flip_channels(moved, chosen), x)
        changed = (moved != x).flatten(2).any(-1)
        assert torch.equal(changed, chosen)
    assert torch.equal(flip_channels(x, torch.ones(2, 3, dtype=torch.bool)), rotate_180(x))


def test_flips_of_channels_differ_by_particle():
    x, chosen = images(), torch.tensor([[True, False, False], [False, False, True]])
    moved = flip_channels(x, chosen)
    assert torch.equal(moved[0, 0], x[0, 0].flip(-2, -1)) and torch.equal(moved[0, 1:], x[0, 1:])
    assert torch.equal(moved[1, 2], x[1, 2].flip(-2, -1)) and torch.equal(moved[1, :2], x[1, :2])


def test_discordant_channels_are_those_that_were_flipped():
    """Channels are one picture with different contrast and brightness, the last inverted by a little."""
    picture = normal(1, 1, 16, 16, dtype=torch.float32)
    x = torch.cat([0.5 * picture + 0.3, picture, 0.1 * picture - 0.7], dim=1)
    assert reference_channel(x).tolist() == [1]
    for chosen in subsets(1):
        found = discordant_channels(flip_channels(x, chosen))
        assert torch.equal(found, chosen if not chosen[0, 1] else ~chosen)
        harmonised = flip_channels(flip_channels(x, chosen), found)
        assert not discordant_channels(harmonised).any()
        assert torch.equal(harmonised, rotate_180(x) if chosen[0, 1] else x)


def test_symmetric_channels_are_not_discordant():
    x = images()
    assert not discordant_channels((x + rotate_180(x)) / 2).any()
    assert not discordant_channels(torch.zeros_like(x)).any()


# --- Conjugation of a band -------------------------------------------------------------------------------------------


@each_shape
@pytest.mark.parametrize("seed", range(6))
def test_conjugation_keeps_the_amplitude_on_the_grid_and_is_its_own_inverse(shape, seed):
    x, band = images(shape), draw_band(*shape, generator(seed))
    moved = conjugate_band(x, band)
    torch.testing.assert_close(spectrum(moved).abs(), spectrum(x).abs(), rtol=0, atol=1e-5)
    torch.testing.assert_close(conjugate_band(moved, band), x, rtol=0, atol=1e-5)
    assert (moved - x).abs().max() > 0.05
    torch.testing.assert_close(moved.mean((-2, -1)), x.mean((-2, -1)), rtol=0, atol=1e-5)


@each_shape
def test_conjugation_is_the_flip_inside_the_band_and_nothing_outside(shape):
    x, band = images(shape), ring(*shape, 0.1, 0.3)
    moved, flipped = spectrum(conjugate_band(x, band)), spectrum(rotate_180(x))
    torch.testing.assert_close(moved[..., band], flipped[..., band], rtol=0, atol=1e-5)
    torch.testing.assert_close(moved[..., ~band], spectrum(x)[..., ~band], rtol=0, atol=1e-5)
    rows, columns = (torch.fft.fftfreq(n, dtype=torch.float64) for n in shape)
    centre = torch.exp(2j * math.pi * (rows[:, None] + columns[None]))
    torch.testing.assert_close(flipped, (centre * spectrum(x.double()).conj()).to(flipped), rtol=0, atol=1e-5)
    everything = torch.ones(shape, dtype=torch.bool)
    torch.testing.assert_close(conjugate_band(x, everything), rotate_180(x), rtol=0, atol=1e-5)
    assert torch.equal(conjugate_band(x, ~everything), x)


def test_each_particle_can_have_its_own_band():
    x = images()
    bands = torch.stack([ring(16, 16, 0, 0.2), wedge(16, 16, 0.3, 0.6)])
    moved = conjugate_band(x, bands)
    for i, band in enumerate(bands):
        torch.testing.assert_close(moved[i : i + 1], conjugate_band(x[i : i + 1], band))


def test_conjugation_on_the_image_grid_changes_what_is_measured():
    """The measured amplitude lies on the finer grid of the padded image, of which the image grid is a part."""
    x = images((16, 16))
    moved = conjugate_band(x, ring(16, 16, 0, 0.2))
    assert (OPERATOR(moved) - OPERATOR(x)).square().flatten(1).sum(1).min() > 0.5


def test_conjugation_on_the_padded_grid_is_exact_until_the_support_is_enforced():
    x, margin = images((16, 16)), 4
    band = ring(24, 24, 0, 0.2)
    plane = F.pad(x / 2 + 0.5, (margin,) * 4)
    moved = conjugate_band(plane, band)
    amplitude = torch.fft.fftshift(spectrum(moved).abs(), dim=(-2, -1))
    torch.testing.assert_close(amplitude, OPERATOR(x), rtol=0, atol=1e-5)
    assert moved[..., :margin, :].abs().max() > 0.01  # outside the support
    cropped = 2 * moved[..., margin:-margin, margin:-margin] - 1
    torch.testing.assert_close(conjugate_band(x, band), cropped, rtol=0, atol=1e-5)
    assert (OPERATOR(cropped) - OPERATOR(x)).square().flatten(1).sum(1).min() > 0.1


@pytest.mark.parametrize("seed", range(3))
def test_conjugation_repairs_a_band_that_belongs_to_the_wrong_twin(seed):
    truth, band = images(seed=seed), draw_band(16, 16, generator(10 + seed))
    y = OPERATOR(truth)
    flipped, wrong = spectrum(rotate_180(truth)), spectrum(truth)
    wrong[..., band] = flipped[..., band]
    stagnated = torch.fft.ifft2(wrong, norm="ortho").real
    assert (OPERATOR.loss(stagnated, y) > 0.1).all()
    repaired = conjugate_band(stagnated, band)
    torch.testing.assert_close(repaired, truth, rtol=0, atol=1e-5)
    assert (OPERATOR.loss(repaired, y) < 1e-6).all()


# --- Bands -----------------------------------------------------------------------------------------------------------


@each_shape
def test_bands_are_centrosymmetric_and_never_all_or_nothing(shape):
    bands = [draw_band(*shape, generator(seed)) for seed in range(60)]
    for band in bands:
        assert band.dtype == torch.bool and band.shape == shape
        assert torch.equal(mirror_frequencies(band), band)
    sizes = [band.float().mean().item() for band in bands]
    assert max(sizes) < 0.6 and min(sizes) > 0
    with_origin = sum(bool(band[0, 0]) for band in bands)
    assert 10 < with_origin < 32  # discs
    again = draw_band(*shape, generator(7))
    assert torch.equal(again, bands[7]) and not torch.equal(again, bands[8])


@pytest.mark.parametrize("shape", [(16, 16), (15, 16), (64, 64)], ids=str)
def test_low_bands_hold_some_of_the_lowest_frequencies_and_no_others(shape):
    bands = [draw_low_band(*shape, generator(seed)) for seed in range(60)]
    reach = ring(*shape, 0, 4 / min(shape))
    for band in bands:
        assert torch.equal(mirror_frequencies(band), band)
        assert not (band & ~reach).any()
        assert band.sum() - band[0, 0].int() >= 2  # more than the mean, which no flip changes
    with_origin = sum(bool(band[0, 0]) for band in bands)
    assert 10 < with_origin < 40  # discs
    again = draw_low_band(*shape, generator(7))
    assert torch.equal(again, bands[7]) and not torch.equal(again, bands[8])


def test_rings_and_wedges_hold_the_frequencies_they_name():
    disc, hollow = ring(8, 8, 0, 0.2), ring(8, 8, 0.13, 0.26)
    assert disc.sum() == 9 and disc[0, 0] and disc[1, 1] and disc[-1, 0] and not disc[2, 0]
    assert not hollow[0, 0] and not hollow[0, 1] and hollow[1, 1] and hollow[2, 0] and not hollow[2, 2]
    horizontal = wedge(9, 9, 0.0, math.radians(10))
    assert horizontal.sum() == 8 and horizontal[0, 1:].all()
    vertical = wedge(9, 9, math.pi / 2, math.radians(10))
    assert torch.equal(vertical, horizontal.T)
    assert torch.equal(wedge(9, 9, math.pi, math.radians(10)), horizontal)
    quarters = [wedge(9, 9, math.radians(45 * k + 1), math.radians(22.5)).int() for k in range(4)]
    assert sum(quarters).flatten()[1:].eq(1).all() and sum(quarters)[0, 0] == 0


# --- Windows and combinations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("particle", range(8))
def test_window_fits_one_twin_only(particle):
    window = half_plane_window(16, 16, window_angle(particle))
    torch.testing.assert_close(window + window.flip((-2, -1)), torch.ones(16, 16))
    assert window.min() < 1e-3 and window.max() > 0.999
    assert (window - window.flip((-2, -1))).abs().mean() > 0.7


def test_windows_of_particles_lie_apart():
    angles = [window_angle(i) % (2 * math.pi) for i in range(8)]
    apart = [abs((a - b + math.pi) % (2 * math.pi) - math.pi) for i, a in enumerate(angles) for b in angles[:i]]
    assert min(apart) > 0.25
    assert angles[0] == pytest.approx(math.pi / 4)


def test_reduced_support_keeps_one_half_and_flattens_the_other():
    x, y = images(count=2), images(count=2)
    moved = reduce_support(x, [0, 3])
    mean = x.mean((-2, -1))
    torch.testing.assert_close(moved[0, :, -1, -1], x[0, :, -1, -1], rtol=0, atol=1e-2)
    torch.testing.assert_close(moved[0, :, 0, 0], mean[0], rtol=0, atol=1e-2)
    assert torch.equal(x, y)  # not in place
    assert torch.equal(reduce_support(x[1:], [3]), moved[1:])
    assert not torch.allclose(reduce_support(x[1:], [2]), moved[1:], atol=0.1)


def test_mean_of_twins_is_the_best_one():
    x = images(count=1)[0]
    particles = torch.stack([x.flip((-2, -1)), x + 0.01, 5 + 0 * x, x])
    mean = aligned_mean(particles, 1, torch.tensor([True, True, False, True]))
    torch.testing.assert_close(mean, x + 0.01 / 3, rtol=0, atol=1e-6)
    mean = aligned_mean(particles, 0, torch.tensor([True, True, False, True]))
    torch.testing.assert_close(mean, x.flip((-2, -1)) + 0.01 / 3, rtol=0, atol=1e-6)
