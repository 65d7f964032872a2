"""The repulsive term of every feature space: against its potential, and of known configurations."""

import math

import numpy as np
import pytest
import torch
from analytic import F64, latent, normal, prior_of
from torch import nn

from particledaps.operators.operator import IDENTITY, Symmetry
from particledaps.particles.feature_spaces import ImageSpace, LatentSpace, low_pass, stein_force

# --- The same term by its definition: a potential and central differences --------------------------------------------


class CurvedAutoencoder(nn.Module):
    """Four numbers to a curved sheet of images (1, 2, 3) and some other curved way back."""

    def __init__(self):
        super().__init__()
        self.out, self.back = normal(4, 6, seed=11), normal(6, 4, seed=12)

    def decode(self, z):
        return torch.tanh(z.flatten(1) @ self.out / 2).reshape(-1, 1, 2, 3)

    def encode(self, x):
        return torch.sinh(x.flatten(1) @ self.back / 2).reshape(-1, 4, 1, 1)


def curved_features(x):
    return torch.cat([x.flatten(1), torch.sin(2 * x.flatten(1)) @ normal(6, 5, seed=13)], dim=1)


TURN = Symmetry("turn", lambda x: x.flip((-2, -1)))
CURVED = prior_of(None, (4, 1, 1), CurvedAutoencoder())
POINTS = latent(normal(5, 4, seed=3))


def odd_part(x):
    return (x - TURN.apply(x)) / 2


SPACES = {  # the space, its features, the features of a particle's twins
    "latent": (LatentSpace(CURVED), lambda z: z.flatten(1), None),
    "latent quotient": (
        LatentSpace(CURVED, (IDENTITY, TURN)),
        lambda z: z.flatten(1),
        lambda z: CURVED.encode(TURN.apply(CURVED.decode(z))).flatten(1),
    ),
    "image": (ImageSpace(CURVED, curved_features, "image"), lambda z: curved_features(CURVED.decode(z)), None),
    "image quotient": (
        ImageSpace(CURVED, curved_features, "image", (IDENTITY, TURN)),
        lambda z: curved_features(CURVED.decode(z)),
        lambda z: curved_features(TURN.apply(CURVED.decode(z))),
    ),
    "odd": (
        ImageSpace(CURVED, curved_features, "image", odd_under=TURN),
        lambda z: curved_features(odd_part(CURVED.decode(z))),
        None,
    ),
}
each_space = pytest.mark.parametrize(("space", "features", "twin"), SPACES.values(), ids=SPACES)


def squared_distances(own, seen):
    """``(P, P)`` from features ``own`` ``(P, F)`` to the nearest of ``seen`` ``(G, P, F)``, and which one that is."""
    squares = ((own[None, :, None] - seen[:, None]) ** 2).sum(-1)
    return squares.min(0), squares.argmin(0)


def bandwidths(distances):
    """``median_{j != i}(d_ij)^2 / ln N`` with the usual median of an even number of values."""
    count = len(distances)
    return np.array([np.median(np.delete(row, i)) ** 2 for i, row in enumerate(distances)]) / math.log(count)


def log_kernel_sums(own, seen, bandwidth):
    """``log sum_{j != i} exp(-d_ij^2 / h_i)`` for each i, ``(P,)``."""
    squares, _ = squared_distances(own, seen)
    kernel = np.exp(-squares / bandwidth[:, None])
    np.fill_diagonal(kernel, 0)
    return np.log(kernel.sum(1))


def differences(z, features, twin, step=1e-6):
    """Minus the gradient of particle i's own log-sum in z_i, the others and the bandwidths held fixed."""
    seen = np.stack([features(z).numpy()] + ([] if twin is None else [twin(z).numpy()]))
    bandwidth = bandwidths(np.sqrt(squared_distances(seen[0], seen)[0]))
    slopes = torch.zeros_like(z)
    for axis in range(z[0].numel()):
        shift = torch.zeros_like(z)
        shift.flatten(1)[:, axis] = step
        ahead, behind = (log_kernel_sums(features(at).numpy(), seen, bandwidth) for at in (z + shift, z - shift))
        slopes.flatten(1)[:, axis] = -torch.from_numpy(ahead - behind) / (2 * step)
    return slopes


@each_space
def test_term_is_minus_the_gradient_of_the_log_kernel_sum(space, features, twin):
    expected = differences(POINTS, features, twin)
    tolerance = 1e-7 if isinstance(space, LatentSpace) else 1e-5  # image features are rounded to float32
    error = (space.force(POINTS).force - expected).abs().max()
    assert error < tolerance * expected.abs().max()


@each_space
def test_distances_are_those_of_the_features(space, features, twin):
    seen = np.stack([features(POINTS).numpy()] + ([] if twin is None else [twin(POINTS).numpy()]))
    expected, nearest = squared_distances(seen[0], seen)
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(space.force(POINTS).distances, np.sqrt(expected), rtol=1e-5, atol=1e-6)
    off_diagonal = nearest[~np.eye(5, dtype=bool)]
    assert twin is None or set(off_diagonal) == {0, 1}  # both the particle and its twin are the nearer one somewhere


@each_space
def test_a_small_step_along_the_term_pushes_apart(space, features, twin):
    for count in (2, 3, 5):
        force, before = space.force(POINTS[:count])
        ahead, behind = (space.force(POINTS[:count] + step * force).distances for step in (1e-3, -1e-3))
        assert ahead.mean() > before.mean() > behind.mean()


def test_twins_of_the_quotient_are_one_and_the_odd_kernel_sees_nothing_but_their_difference():
    x = normal(2, 1, 2, 3, seed=5)
    pixels = prior_of(None, (1, 2, 3))
    z = torch.cat([x, TURN.apply(x)[:1]])
    assert LatentSpace(pixels).force(z).distances[0, 2] > 1
    quotient = LatentSpace(pixels, (IDENTITY, TURN)).force(z)
    assert quotient.distances[0, 2] == quotient.distances[2, 0] == 0
    torch.testing.assert_close(TURN.apply(quotient.force[2:]), quotient.force[:1], rtol=1e-12, atol=1e-12)

    odd = ImageSpace(pixels, low_pass, "pixel", odd_under=TURN)
    even = normal(2, 1, 2, 3, seed=6)
    same_odd_part = x[:1] + (even + TURN.apply(even))
    assert odd.force(same_odd_part).distances.max() < 1e-6
    assert odd.force(z).force[2].flatten() @ odd.force(z).force[0].flatten() < 0
    symmetric = odd.force(z).force + TURN.apply(odd.force(z).force)
    assert symmetric.abs().max() < 1e-6  # it pushes along odd images only


# --- The force of known configurations -------------------------------------------------------------------------------


def test_two_particles_feel_twice_ln_2_over_the_squared_distance():
    f = normal(2, 7, seed=1)
    offset = f[0] - f[1]
    force, distances = stein_force(f)
    torch.testing.assert_close(force[0], 2 * math.log(2) * offset / offset.square().sum(), rtol=1e-12, atol=0)
    assert torch.equal(force[0], -force[1])
    torch.testing.assert_close(distances, offset.norm() * torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=F64))


def test_equilateral_triangle_is_pushed_outwards_without_moving_its_centre():
    """h = d^2 / ln 3 and equal weights: 3 ln 3 / d^2 times the way from the centre."""
    f = 0.7 * torch.eye(3, dtype=F64) + 2
    force = stein_force(f).force
    torch.testing.assert_close(force, 3 * math.log(3) / (2 * 0.7**2) * (f - f.mean(0)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(force.sum(0), torch.zeros(3, dtype=F64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("count", [4, 5, 6])
def test_force_on_a_regular_polygon_is_radial_and_sums_to_zero(count):
    """Unequal distances, but every particle has the same: one bandwidth and one normaliser."""
    angle = 2 * math.pi * torch.arange(count, dtype=F64) / count
    f = torch.stack([angle.cos(), angle.sin()], dim=1)
    force = stein_force(f).force
    strength = (force * f).sum(1)
    assert (strength > 0.1).all()
    torch.testing.assert_close(force, strength[:1, None] * f, rtol=1e-12, atol=1e-12)


def test_median_of_four_distances_is_the_mean_of_the_middle_two():
    """Distances 1, 2, 4, 9 from the first of five particles on a line: h = 3^2 / ln 5."""
    f = torch.tensor([0.0, -1, -2, -4, -9], dtype=F64)[:, None]
    gaps = np.array([1.0, 2, 4, 9])
    weights = np.exp(-(gaps**2) * math.log(5) / 9)
    expected = 2 * math.log(5) / 9 * (weights @ gaps) / weights.sum()
    assert stein_force(f).force[0].item() == pytest.approx(expected, rel=1e-12)


def test_force_scales_as_one_over_distance():
    f = normal(5, 3, seed=2)
    torch.testing.assert_close(stein_force(10 * f).force, stein_force(f).force / 10, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_identical_particles_feel_nothing(dtype, size):
    force, distances = stein_force((size * normal(1, 6)).to(dtype).expand(4, 6))
    assert (force == 0).all() and (distances == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("count", [3, 4, 5])
def test_an_identical_pair_is_pushed_away_from_the_others_together(dtype, count):
    f = normal(count, 6).to(dtype)
    f[1] = f[0]
    force = stein_force(f).force
    assert force.isfinite().all()
    assert torch.equal(force[0], force[1])
    assert (force[0] * (f[0] - f[2:].mean(0))).sum() > 0


def test_three_identical_particles_and_a_far_one_give_no_nan():
    """The median of most is zero."""
    f = torch.zeros(4, 6, dtype=F64)
    f[3] = 1
    assert stein_force(f).force.isfinite().all()


@each_space
def test_spaces_bear_identical_particles(space, features, twin):
    for same in (POINTS[:1].expand(3, 4, 1, 1), POINTS[[0, 0, 1]]):
        assert space.force(same.clone()).force.isfinite().all()


def test_low_pass_averages_blocks_and_keeps_small_images():
    x = normal(2, 3, 64, 32)
    expected = x.reshape(2, 3, 16, 4, 16, 2).mean((3, 5)).flatten(1)
    torch.testing.assert_close(low_pass(x), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(low_pass(x[..., :12, :9]), x[..., :12, :9].flatten(1))
