"""Which planes can be the Fourier magnitudes of an image, and what impossible ones look like."""

import pytest
import torch
from torch.nn import functional as F

from particledaps.operators.magnitudes import CONVENTIONS, Convention, bounds, doubt, pair_noise, to_centred_amplitude
from particledaps.operators.phase_retrieval import PhaseRetrieval

SIDE, SIGMA = 32, 0.05
SHAPE = (3, SIDE, SIDE)
OPERATOR = PhaseRetrieval(noise_sigma=SIGMA)
AMPLITUDE, INTENSITY, CORNER, CORNER_INTENSITY = (
    Convention(),
    Convention("intensity"),
    Convention("amplitude", "corner"),
    Convention("intensity", "corner"),
)


def image(seed, kind="photograph", brightness=1.0):
    """``(1, 3, 32, 32)`` in [-1, 1] of several kinds."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "photograph":
        x = F.interpolate(torch.rand(1, 3, 6, 6, generator=generator), SIDE, mode="bicubic").clamp(0, 1)
    elif kind == "noise":
        x = torch.rand(1, *SHAPE, generator=generator)
    elif kind == "black and white":
        x = (torch.rand(1, *SHAPE, generator=generator) > 0.5).float()
    elif kind == "flat":
        x = torch.full((1, *SHAPE), torch.rand((), generator=generator).item())
    elif kind == "white":
        x = torch.ones(1, *SHAPE)
    elif kind == "one channel":
        x = image(seed)[:, :1] / 2 + 0.5
        x = torch.cat([x, torch.zeros(1, 2, SIDE, SIDE)], 1)
    else:  # a star on black
        x = torch.zeros(1, *SHAPE)
        x[..., seed % SIDE, 5] = 1
    return brightness * x * 2 - 1


def measured(x, seed=0, sigma=SIGMA):
    clean = OPERATOR(x)[0]
    return clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))


def written(y, convention):
    """A plane as ``convention`` writes it down."""
    y = y if convention.measurement == "amplitude" else y.clamp(min=0) ** 2
    return y if convention.origin == "centre" else torch.fft.ifftshift(y, dim=(-2, -1))


@pytest.mark.parametrize("convention", CONVENTIONS, ids=str)
def test_every_convention_arrives_as_centred_amplitudes(convention):
    y = measured(image(0)).clamp(min=0)
    assert torch.allclose(to_centred_amplitude(written(y, convention), convention), y, atol=1e-5)


KINDS = ["photograph", "noise", "black and white", "flat", "white", "one channel", "star"]


@pytest.mark.parametrize("brightness", [1.0, 0.3, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_no_image_is_doubted(kind, brightness):
    planes = (measured(image(seed, kind, brightness), seed) for seed in range(20))
    assert [doubt(y, SHAPE, SIGMA, AMPLITUDE) for y in planes] == [None] * 20


@pytest.mark.parametrize("sigma", [0.0, 0.005, 0.2, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_no_image_is_doubted_at_another_noise_than_the_configured_one(kind, sigma):
    planes = (measured(image(seed, kind), seed, sigma) for seed in range(10))
    assert [doubt(y, SHAPE, SIGMA, AMPLITUDE) for y in planes] == [None] * 10


@pytest.mark.parametrize("given", CONVENTIONS, ids=str)
@pytest.mark.parametrize("true", CONVENTIONS, ids=str)
def test_another_convention_is_recognised(true, given):
    for seed in range(20):
        found = doubt(written(measured(image(seed), seed), true), SHAPE, SIGMA, given)
        if true == given:
            assert found is None
        else:
            assert found is not None and found.looks_like == true and found.largest_scale is None


@pytest.mark.parametrize("brightness", [0.3, 0.2])
def test_squares_of_dark_images_are_recognised(brightness):
    """Their peak is no larger than a bright image's may be: only its share of the power tells."""
    for seed in range(20):
        y = measured(image(seed, brightness=brightness), seed)
        found = doubt(written(y, INTENSITY), SHAPE, SIGMA, AMPLITUDE)
        assert found is not None and found.looks_like == INTENSITY


@pytest.mark.parametrize(
    ("scale", "name"), [(48, "not orthonormal"), (255, "0 to 255"), (255 * 48, "0 to 255 and the")]
)
@pytest.mark.parametrize("true", [AMPLITUDE, CORNER], ids=str)
def test_another_scale_is_recognised(scale, name, true):
    """48 is the root of the number of entries of a 48 x 48 plane."""
    for seed in range(20):
        found = doubt(scale * written(measured(image(seed), seed), true), SHAPE, SIGMA, AMPLITUDE)
        assert found is not None and found.looks_like == true
        assert 1 <= found.largest_scale * scale < 16 and name in found.usual[1]
        rescaled = found.largest_scale * scale * 0.999 * measured(image(seed), seed)
        assert all(b.hold for b in bounds(rescaled, SHAPE, SIGMA))


def test_counts_of_photons_are_intensities_of_another_scale():
    for seed in range(20):
        intensity = 500 * OPERATOR(image(seed))[0] ** 2
        counts = torch.poisson(intensity, generator=torch.Generator().manual_seed(seed))
        found = doubt(counts, SHAPE, SIGMA, AMPLITUDE)
        assert found is not None and found.looks_like == INTENSITY and found.largest_scale**2 * 500 >= 0.99


def test_what_fits_nothing_is_doubted_without_a_guess():
    y = measured(image(0))
    for wrong in (torch.log10(y.abs() + 1e-3), -y):
        found = doubt(wrong, SHAPE, SIGMA, AMPLITUDE)
        assert found is not None and found.looks_like is None


def test_a_beam_stop_is_no_reason_for_doubt():
    for seed in range(20):
        y = measured(image(seed), seed)
        y[:, 21:28, 21:28] = 0
        assert doubt(y, SHAPE, SIGMA, AMPLITUDE) is None
    noise = SIGMA * torch.randn(3, 48, 48, generator=torch.Generator().manual_seed(0))
    assert doubt(noise, SHAPE, SIGMA, AMPLITUDE) is None


def test_conjugate_entries_reveal_the_noise():
    assert pair_noise(measured(image(0), sigma=0.3)) == pytest.approx(0.3, rel=0.05)
    assert pair_noise(OPERATOR(image(0))[0]) < 1e-5


def with_gaps(y, kind, seed=0):
    """NaN at dead lines away from the middle, in a beam stop, in half of all entries, or in all but one channel."""
    y = y.clone()
    if kind == "dead lines":
        y[:, 20:22], y[..., 29] = torch.nan, torch.nan
    elif kind == "beam stop":
        y[:, 21:28, 21:28] = torch.nan
    elif kind == "half":
        keep = torch.rand(y.shape, generator=torch.Generator().manual_seed(seed + 100)) > 0.5
        keep[:, 24, 24] = True
        y[~keep] = torch.nan
    elif kind == "first of each pair":
        y[:, 25:] = torch.nan
    else:
        y[1:] = torch.nan
    return y


GAPS = ["dead lines", "beam stop", "half", "first of each pair", "one channel"]


@pytest.mark.parametrize("gaps", GAPS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_image_is_doubted_for_its_gaps(kind, gaps):
    planes = (with_gaps(measured(image(seed, kind), seed), gaps, seed) for seed in range(10))
    assert [doubt(y, SHAPE, SIGMA, AMPLITUDE) for y in planes] == [None] * 10


@pytest.mark.parametrize("given", CONVENTIONS, ids=str)
@pytest.mark.parametrize("true", CONVENTIONS, ids=str)
def test_another_convention_is_recognised_beside_dead_lines(true, given):
    """But for squares, which only the whole power could tell from a brighter image."""
    for seed in range(20):
        found = doubt(written(with_gaps(measured(image(seed), seed), "dead lines"), true), SHAPE, SIGMA, given)
        if true == given:
            assert found is None
        elif true.origin != given.origin:
            assert found is not None and found.looks_like.origin == true.origin


def test_another_scale_is_recognised_beside_dead_lines():
    for seed in range(20):
        found = doubt(48 * with_gaps(measured(image(seed), seed), "dead lines"), SHAPE, SIGMA, AMPLITUDE)
        assert found is not None and found.looks_like == AMPLITUDE and "not orthonormal" in found.usual[1]


def test_bounds_count_measured_entries_only():
    y = measured(image(0))
    own, whole = bounds(with_gaps(y, "dead lines"), SHAPE, SIGMA)[0], bounds(y, SHAPE, SIGMA)[0]
    kept = with_gaps(y, "dead lines")[0]
    kept = kept[~kept.isnan()]
    assert own.measured == len(kept) == 48 * 48 - 2 * 48 - 46 and whole.measured == 48 * 48
    assert own.power == pytest.approx(kept.double().square().sum().item() - len(kept) * SIGMA**2, abs=0.5)
    assert (own.at_zero, own.largest, own.smallest) == (whole.at_zero, kept.max().item(), kept.min().item())
    assert bounds(with_gaps(y, "one channel"), SHAPE, SIGMA)[1].is_empty


def test_only_pairs_that_were_measured_twice_reveal_the_noise():
    y = measured(image(0), sigma=0.3)
    assert pair_noise(with_gaps(y, "half")) == pytest.approx(0.3, rel=0.05)
    y[:, 25:], y[:, 0], y[:, 24, 25:], y[:, 24, 0] = torch.nan, torch.nan, torch.nan, torch.nan
    y[:, 24, 24] = torch.nan  # its own conjugate differs from itself by nothing
    assert pair_noise(y) != pair_noise(y)
