"""Which particles pruning keeps, and at which level."""

import numpy as np
import pytest
import torch
from analytic import normal
from pruning_support import INF, NAN, within

from particledaps.particles.hook_setup import level_of
from pruning import image_distances, keep_diverse, keep_lowest


@pytest.mark.parametrize(
    ("losses", "keep", "expected"),
    [
        ([3.0, 1.0, 2.0, 0.5], 2, [3, 1]),
        ([3.0, 1.0, 2.0, 0.5], 4, [3, 1, 2, 0]),
        ([1.0, 1.0, 1.0], 2, [0, 1]),
        ([NAN, 5.0, INF, 4.0], 2, [3, 1]),
        ([NAN, 1e30, NAN], 1, [1]),
        ([2.0], 3, [0]),
    ],
)
def test_lowest_losses_are_kept_best_first(losses, keep, expected):
    assert keep_lowest(losses, keep) == expected


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1], [1, 3, 0, 2]])
def test_finite_losses_come_before_the_others_in_every_order(order):
    losses = [[NAN, 7.0, INF, 3.0][i] for i in order]
    assert [losses[i] for i in keep_lowest(losses, 2)] == [3.0, 7.0]
    assert len(keep_lowest(losses, 3)) == 3


def line(*positions):
    return np.abs(np.subtract.outer(positions, positions)).tolist()


@pytest.mark.parametrize(
    ("losses", "positions", "keep", "expected"),
    [
        ([2.0, 1.0], [0.0, 0.05], 2, [1]),  # a close pair: the lower loss
        ([1.0, 2.0], [0.0, 0.05], 2, [0]),
        ([1.0, 2.0], [0.0, 0.1], 2, [0, 1]),  # not nearer than close
        ([1.0, 4.0], [0.0, 1.0], 2, [0, 1]),  # far, just within the tolerance of 3
        ([1.0, 4.01], [0.0, 1.0], 2, [0]),  # far, but too bad
        ([3.0, 1.0, 2.0], [0.0, 1.0, 2.0], 2, [1, 2]),  # at most keep
        ([3.0, 1.0, 2.0], [0.0, 1.0, 2.0], 1, [1]),
        ([1.0, 1.5, 2.0], [0.0, 0.05, 1.0], 2, [0, 2]),  # the far one takes the place of the near one
        ([1.0, 1.5, 2.0], [0.0, 1.0, 1.05], 3, [0, 1]),  # near to any that is kept
        ([1.0, 1.1, 1.2], [0.0, 0.09, 0.18], 3, [0, 2]),  # nearness to one that was dropped does not count
        ([NAN, 2.0, INF], [0.0, 1.0, 2.0], 3, [1]),
        ([NAN, NAN], [0.0, 1.0], 2, [0]),  # at least one
    ],
)
def test_diverse_particles_are_kept(losses, positions, keep, expected):
    assert keep_diverse(losses, line(*positions), keep, within(losses, 3.0), 0.1) == expected


def test_diverse_bears_distances_that_are_not_numbers():
    assert keep_diverse([1.0, NAN, 2.0], [[0, NAN, 1], [NAN, NAN, NAN], [1, NAN, 0]], 3, 4.0, 0.1) == [0, 2]


def test_diverse_keeps_between_one_and_keep():
    for seed in range(30):
        losses, positions = normal(6, seed=seed).tolist(), normal(6, seed=seed + 100).numpy() / 5
        for keep in (1, 2, 4):
            kept = keep_diverse(losses, line(*positions), keep, within(losses, 1.0), 0.1)
            assert 1 <= len(kept) <= keep and kept[0] == int(np.argmin(losses))
            assert all(abs(positions[i] - positions[j]) >= 0.1 for i in kept for j in kept if i != j)
            assert all(losses[i] <= min(losses) + 1 for i in kept)


def test_distances_are_root_mean_squares_in_zero_to_one():
    x = normal(4, 3, 5, 2)
    pixels = (x / 2 + 0.5).numpy()
    expected = [[np.sqrt(((a - b) ** 2).mean()) for a in pixels] for b in pixels]
    np.testing.assert_allclose(image_distances(x), expected, rtol=1e-12, atol=0)
    black_and_white = torch.stack([-torch.ones(1, 4, 4), torch.ones(1, 4, 4)])
    assert image_distances(black_and_white).tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("step", "levels", "expected"),
    [
        (200, 5, 4),
        (200, 15, 12),
        (200, 50, 40),
        (199, 50, 41),
        (201, 50, 40),
        (300, 10, 7),
        (700, 30, 9),
        (0, 50, None),
        (19, 50, None),
        (20, 50, 49),
        (1000, 50, 0),
        (999, 50, 1),
        (-1, 50, None),
    ],
)
def test_level_of_a_step(step, levels, expected):
    assert level_of(step, levels) == expected


@pytest.mark.parametrize("levels", range(1, 60))
def test_level_of_every_whole_time_is_that_level(levels):
    """Floats would miss some: 1000 * (1 - k / K) is not always what it should be."""
    for level in range(levels):
        if 1000 * level % levels == 0:
            assert level_of(1000 - 1000 * level // levels, levels) == level
