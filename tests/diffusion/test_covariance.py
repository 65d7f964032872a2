import pytest
import torch
from analytic import F64, correlated, normal

from particledaps.diffusion.covariance import (
    RIDGE,
    BandedCovariance,
    CovarianceTable,
    band_matrices,
    band_of,
    dct_matrix,
)

SHAPE = (2, 6, 5)
BANDS = int(band_of(*SHAPE[1:]).max()) + 1


def matrices(seed=0):
    return torch.stack([correlated([0.3 + b, 0.05 * (b + 1)], seed=seed + b) for b in range(BANDS)])


def dense(given):
    """The covariance over flattened images by hand: a Kronecker product of cosines, a matrix in each band."""
    channels, height, width = SHAPE
    basis = torch.kron(torch.eye(channels, dtype=F64), torch.kron(dct_matrix(height), dct_matrix(width)))
    ridge = RIDGE * given.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(channels, dtype=F64)
    per_frequency = (given + ridge)[band_of(height, width).flatten()]
    blocks = torch.zeros(channels * height * width, channels * height * width, dtype=F64)
    for c in range(channels):
        for d in range(channels):
            size = height * width
            blocks[c * size : (c + 1) * size, d * size : (d + 1) * size] = torch.diag(per_frequency[:, c, d])
    return basis.T @ blocks @ basis


def test_the_cosine_transform_is_orthonormal_and_puts_a_constant_in_its_first_row():
    transform = dct_matrix(7)
    torch.testing.assert_close(transform @ transform.T, torch.eye(7, dtype=F64), rtol=0, atol=1e-12)
    constant = transform @ torch.ones(7, dtype=F64)
    torch.testing.assert_close(constant, torch.tensor([7**0.5, *[0] * 6], dtype=F64), rtol=0, atol=1e-12)


def test_bands_are_rings_of_equal_radius():
    assert band_of(3, 3).tolist() == [[0, 1, 2], [1, 1, 2], [2, 2, 3]]
    assert band_of(1, 1).tolist() == [[0]]
    rows = band_of(4, 8)[:, 0]  # a row of half the length has half the frequencies of the long side's bands
    assert rows.tolist() == [band_of(4, 8)[0, 2 * i].item() for i in range(4)]


def test_it_solves_and_turns_as_the_dense_matrix():
    given, x = matrices(), normal(3, *SHAPE)
    covariance, whole = BandedCovariance(given, SHAPE, x), dense(given)
    expected = torch.linalg.solve(whole, x.flatten(1).T).T
    torch.testing.assert_close(covariance.solve(x).flatten(1), expected, rtol=1e-9, atol=1e-9)
    turned = covariance.to_basis(x)
    torch.testing.assert_close(covariance.from_basis(turned), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(turned.square().sum(), x.square().sum(), rtol=1e-12, atol=0)
    coloured = covariance.from_basis(covariance.variance.sqrt() * turned)  # C^(1/2) in the basis
    torch.testing.assert_close(coloured.square().sum(), (x.flatten(1) @ whole * x.flatten(1)).sum(), rtol=1e-9, atol=0)


def test_second_moments_of_draws_are_those_of_the_covariance():
    given = matrices()
    covariance = BandedCovariance(given, SHAPE, torch.zeros(1, dtype=F64))
    draws = covariance.from_basis(covariance.variance.sqrt() * normal(20_000, *SHAPE, seed=3))
    torch.testing.assert_close(band_matrices(draws), given, rtol=0.05, atol=0.01)


def test_a_band_that_no_draw_reaches_keeps_a_variance():
    flat = BandedCovariance(band_matrices(torch.ones(4, *SHAPE, dtype=F64)), SHAPE, torch.zeros(1, dtype=F64))
    assert flat.variance.min() > 0 and flat.solve(torch.ones(1, *SHAPE, dtype=F64)).isfinite().all()


def white(sigma, std):
    return torch.eye(2, dtype=F64).expand(BANDS, 2, 2) / (1 / std**2 + 1 / sigma**2)


@pytest.mark.parametrize("sigma", [0.01, 0.1, 0.37, 3.0, 20.0])
def test_between_its_levels_and_beyond_them_a_table_is_right_for_a_white_gaussian(sigma):
    levels = [0.1, 0.5, 3.0]
    table = CovarianceTable(levels, torch.stack([white(s, 0.7) for s in levels]), SHAPE, 0.7)
    torch.testing.assert_close(table.at(sigma), white(sigma, 0.7), rtol=1e-10, atol=0)
    assert table.root_mean_square(sigma) == pytest.approx(white(sigma, 0.7)[0, 0, 0].item() ** 0.5)


def test_a_table_of_one_level_is_kept():
    table = CovarianceTable([0.5], white(0.5, 1.0)[None], SHAPE, 1.0)
    torch.testing.assert_close(table.at(2.0), white(2.0, 1.0), rtol=1e-10, atol=0)
