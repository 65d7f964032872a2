"""Distances of sets by their features, against closed forms."""

import numpy as np
import pytest
import torch

from particledaps.evaluation import distribution
from particledaps.evaluation.distribution import (
    frechet_distance,
    kernel_distance,
    memorisation_rate,
    nearest,
    needed_images,
)

DIM = 3


def gaussian(count, mean, covariance, generator):
    """Draws whose sample mean and covariance are exactly these."""
    x = torch.randn(count, DIM, generator=generator, dtype=torch.float64)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_is_exact_on_gaussians(generator):
    """Of commuting covariances: |m|^2 + sum (sqrt a - sqrt b)^2; of others by the matrix square root of numpy."""
    one, two = torch.diag(torch.tensor([1.0, 4.0, 9.0]).double()), torch.diag(torch.tensor([4.0, 4.0, 1.0]).double())
    a, b = gaussian(50, 1.0, one, generator), gaussian(80, -0.5, two, generator)
    assert frechet_distance(a, b) == pytest.approx(3 * 1.5**2 + 1 + 0 + 4, rel=1e-10)
    turned = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator, dtype=torch.float64))[0]
    other = turned @ two @ turned.T
    values, vectors = np.linalg.eig((one @ other).numpy())
    root = (vectors * np.sqrt(values)) @ np.linalg.inv(vectors)
    expected = np.trace(one.numpy() + other.numpy() - 2 * root.real)
    found = frechet_distance(gaussian(50, 0.0, one, generator), gaussian(50, 0.0, other, generator))
    assert found == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_is_refused_below_twice_the_features(generator):
    a = torch.randn(2 * DIM, DIM, generator=generator)
    frechet_distance(a, a)
    with pytest.raises(ValueError, match="of 3 features needs 6 images in each set, not 5"):
        frechet_distance(a, a[:5])
    assert needed_images(64) == 128


def exact_kernel_distance(shift):
    """Squared MMD of N(0, 1) and N(shift, 1) in one dimension: E k = sum over binomials of products of moments."""
    zero, moved = [1, 0, 1, 0], [1, shift, 1 + shift**2, shift**3 + 3 * shift]

    def expected(x, y):
        return sum(c * x[k] * y[k] for k, c in enumerate((1, 3, 3, 1)))

    return expected(zero, zero) + expected(moved, moved) - 2 * expected(zero, moved)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_kernel_distance_is_unbiased_and_knows_its_error(shift, generator):
    found = []
    for _ in range(400):
        a, b = (torch.randn(n, 1, generator=generator) for n in (30, 40))
        found.append(kernel_distance(a, b + shift))
    values, errors = (torch.tensor(part) for part in zip(*found, strict=True))
    assert abs(values.mean() - exact_kernel_distance(shift)) < 3 * values.std() / 20
    if shift > 0:  # without a difference the first-order term vanishes
        assert (errors.square().mean().sqrt() / values.std()).item() == pytest.approx(1, abs=0.25)


def test_blocks_do_not_matter(monkeypatch, generator):
    a, b = torch.randn(17, DIM, generator=generator), torch.randn(11, DIM, generator=generator)
    whole = kernel_distance(a, b), nearest(a, b)
    monkeypatch.setattr(distribution, "BLOCK", 4)
    assert kernel_distance(a, b) == pytest.approx(whole[0]) and torch.allclose(nearest(a, b), whole[1])


def test_a_copy_counts_as_memorised(generator):
    train, held_out = (torch.randn(400, DIM, generator=generator) for _ in range(2))
    fresh = torch.randn(400, DIM, generator=generator)
    assert memorisation_rate(fresh, train, held_out, 0.05) < 0.12
    copies = torch.cat([train[:100] + 1e-4, fresh[:100]])
    assert memorisation_rate(copies, train, held_out, 0.05) == pytest.approx(0.525, abs=0.05)


@pytest.mark.parametrize("measure", [frechet_distance, kernel_distance, nearest])
def test_what_is_no_pair_of_features(measure):
    a = torch.ones(20, 3)
    with pytest.raises(ValueError, match="are not of one kind"):
        measure(a, torch.ones(20, 2))
    with pytest.raises(ValueError, match="not finite"):
        measure(a, a * torch.inf)
