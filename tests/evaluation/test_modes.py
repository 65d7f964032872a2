import pytest
import torch
from analytic import normal

from particledaps.evaluation.metrics import psnr_db
from particledaps.evaluation.modes import agreement_db, channel_agreement, find_modes, has_twins, label, symmetry_index
from particledaps.operators.operator import IDENTITY, Symmetry
from particledaps.operators.phase_retrieval import PhaseRetrieval


def flipped(x):
    return x.flip((-2, -1))


def truth_image(channels=3, seed=1):
    """A photograph's worth of numbers: not symmetric, mean far from 0."""
    x = normal(1, channels, 16, 16, seed=seed, dtype=torch.float32)
    return (0.2 * x + 0.3).clamp(-1, 1)


def modes(x, truth, aligned=None):
    return find_modes(x, truth, [30.0] * len(x) if aligned is None else aligned)


TRUTH = truth_image()
NOISE = 0.3 * normal(1, 3, 16, 16, seed=2, dtype=torch.float32)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (TRUTH, "0"),
        (0.9 * TRUTH + 0.05, "0"),
        (TRUTH + 0.3 * NOISE, "0"),
        (flipped(TRUTH), "180"),
        (0.85 * flipped(TRUTH) + 0.15 * TRUTH, "180"),
        ((TRUTH + flipped(TRUTH)) / 2, "mixed"),
        (0.7 * TRUTH + 0.3 * flipped(TRUTH), "mixed"),
        (NOISE, "none"),
        (torch.zeros_like(TRUTH), "none"),
        (TRUTH.mean().expand_as(TRUTH), "none"),
        (-TRUTH, "180"),
    ],
    ids=["truth", "dim", "noisy", "twin", "mostly_twin", "average", "mixture", "noise", "zero", "mean", "negative"],
)
def test_labels(x, expected):
    assert modes(x, TRUTH).labels == [expected]


def test_labels_follow_the_thresholds():
    assert [label(o, 0.9) for o in (0.71, 0.7, 0.0, -0.7, -0.71)] == ["0", "mixed", "mixed", "mixed", "180"]
    assert [label(0.5, e) for e in (0.71, 0.7, -0.9)] == ["mixed", "none", "none"]


@pytest.mark.parametrize(("a", "b"), [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.8, 0.3), (-0.2, 0.9)])
@pytest.mark.parametrize("offset", [0.0, 0.4])
def test_twin_fit_recovers_the_coefficients(a, b, offset):
    """``x = a x* + b g(x*)`` plus a constant per channel, which is no part of the fit."""
    shift = offset * torch.tensor([1.0, -2.0, 0.5]).reshape(1, 3, 1, 1)
    (fit,) = modes(a * TRUTH + b * flipped(TRUTH) + shift, TRUTH).twin_fit
    assert fit == pytest.approx((a, b), abs=1e-6)


def test_odd_sides_and_grey_images():
    truth = 0.2 * normal(1, 1, 9, 7, seed=3, dtype=torch.float32) + 0.3
    (fit,) = modes(0.8 * truth + 0.3 * flipped(truth), truth).twin_fit
    assert fit == pytest.approx((0.8, 0.3), abs=1e-6)


def test_noise_that_is_orthogonal_to_the_truth_does_not_change_the_fit():
    centred = (NOISE - NOISE.mean((-2, -1), keepdim=True)).double()
    basis = torch.stack([TRUTH, flipped(TRUTH)]).double()
    basis = (basis - basis.mean((-2, -1), keepdim=True)).flatten(1)
    rest = centred.flatten() - basis.T @ torch.linalg.lstsq(basis.T, centred.flatten()[:, None]).solution[:, 0]
    x = 0.8 * TRUTH + 0.3 * flipped(TRUTH) + rest.reshape(TRUTH.shape)
    assert modes(x, TRUTH).twin_fit[0] == pytest.approx((0.8, 0.3), abs=1e-6)


def twin_average_db(truth):
    return psnr_db((truth + flipped(truth)) / 2, truth).item()


def test_solved_needs_18_db_where_the_twin_average_is_good():
    truth = (TRUTH + 2 * flipped(TRUTH)) / 3
    assert twin_average_db(truth) > 16
    found = modes(torch.cat([truth] * 3), truth, [17.99, 18.0, 30.0])
    assert found.solved == [False, True, True]


def test_solved_needs_2_db_more_than_the_twin_average_where_that_is_bad():
    truth = (4 * (TRUTH - 0.3)).clamp(-1, 1)
    needed = twin_average_db(truth) + 2
    assert needed < 17
    found = modes(torch.cat([truth] * 2), truth, [needed - 0.01, needed + 0.01])
    assert found.solved == [False, True]


def test_only_one_twin_at_a_time_is_solved():
    x = torch.cat([TRUTH, flipped(TRUTH), (TRUTH + flipped(TRUTH)) / 2, NOISE])
    assert modes(x, TRUTH).solved == [True, True, False, False]


@pytest.mark.parametrize(
    ("rows", "aligned", "coverage"),
    [
        ((0, 0), (30, 30), 1),
        ((0, 1), (30, 30), 2),
        ((0, 1), (30, 5), 1),
        ((2, 2), (30, 30), 0),
        ((0, 1, 1, 2), (30,) * 4, 2),
    ],
)
def test_coverage_counts_distinct_solved_twins(rows, aligned, coverage):
    kinds = torch.cat([TRUTH, flipped(TRUTH), (TRUTH + flipped(TRUTH)) / 2])
    assert modes(kinds[list(rows)], TRUTH, list(aligned)).coverage == coverage


def test_rows_do_not_depend_on_each_other():
    x = torch.cat([TRUTH + 0.5 * NOISE, flipped(TRUTH), NOISE])
    together = modes(x, TRUTH)
    for row in range(3):
        alone = modes(x[row : row + 1], TRUTH)
        assert alone.labels[0] == together.labels[row]
        assert alone.twin_fit[0] == pytest.approx(together.twin_fit[row])


def test_a_reconstruction_that_is_not_finite_is_no_mode():
    found = modes(torch.full_like(TRUTH, torch.nan), TRUTH, [float("nan")])
    assert (found.labels, found.solved, found.coverage) == (["none"], [False], 0)


def rotate_channel(x, channel):
    turned = x.clone()
    turned[:, channel] = flipped(x)[:, channel]
    return turned


def test_channel_fit_tells_which_channel_is_rotated():
    fits = modes(rotate_channel(TRUTH, 1), TRUTH).channel_fit[0]
    assert [tuple(round(v, 4) for v in fit) for fit in fits] == [(1, 0), (0, 1), (1, 0)]


def test_channel_fit_has_a_list_for_each_particle():
    fits = modes(torch.cat([TRUTH, flipped(TRUTH)]), TRUTH).channel_fit
    assert [[round(a) for a, _ in own] for own in fits] == [[1, 1, 1], [0, 0, 0]]


def test_symmetry_index_is_the_ratio_of_the_parts_and_blind_to_twin_and_brightness():
    mixture = 0.5 * TRUTH + 0.5 * flipped(TRUTH)
    views = torch.cat([TRUTH, flipped(TRUTH), 0.5 * TRUTH + 0.1, mixture, 0.7 * TRUTH + 0.3 * flipped(TRUTH)])
    index = symmetry_index(views)
    assert index[1:3].tolist() == pytest.approx([index[0].item()] * 2, rel=1e-5)
    assert index[3] < 1e-6
    assert index[4].item() == pytest.approx(0.4 * index[0].item(), rel=1e-5)  # a - b of the odd part is left


def test_channel_agreement_sees_one_rotated_channel_without_the_truth():
    grey_like = TRUTH[:, :1] + 0.2 * TRUTH
    agreement = channel_agreement(torch.cat([grey_like, flipped(grey_like), rotate_channel(grey_like, 2)]))
    assert agreement[0] > 0.8
    assert agreement[1].item() == pytest.approx(agreement[0].item())
    assert agreement[2] < -0.8
    assert channel_agreement(TRUTH[:, :1]).tolist() == pytest.approx([1.0])


def test_a_twin_that_was_made_covers_no_mode():
    both = torch.cat([TRUTH, flipped(TRUTH)])
    found = find_modes(both, TRUTH, [30.0, 30.0], counts=[True, False])
    assert (found.coverage, found.solved, found.labels) == (1, [True, True], ["0", "180"])
    assert find_modes(both, TRUTH, [30.0, 30.0]).coverage == 2


def test_agreement_is_the_psnr_under_the_best_symmetry():
    symmetries = (IDENTITY, Symmetry("rotate_180", flipped))
    near = (TRUTH + 0.1 * NOISE).clamp(-1, 1)
    others = torch.cat([near, flipped(near), -TRUTH])
    upright, turned, apart = agreement_db(TRUTH, others, symmetries)
    assert upright == pytest.approx(psnr_db(near, TRUTH).item())
    assert turned == pytest.approx(upright.item(), rel=1e-6)
    assert apart == pytest.approx(max(psnr_db(x, TRUTH).item() for x in (-TRUTH, -flipped(TRUTH))))
    assert agreement_db(TRUTH, others, symmetries[:1])[1] < upright - 5


def test_agreement_is_that_of_what_is_shown():
    """Values outside [-1, 1] are clipped in every picture."""
    bright = torch.where(TRUTH > 0.9, 1.0, TRUTH)
    over = torch.where(TRUTH > 0.9, 3.0, TRUTH)
    assert agreement_db(bright, over, (IDENTITY,)).item() == pytest.approx(80.0)


def its_own_twin(seed=3):
    x = truth_image(seed=seed)
    return (x + flipped(x)) / 2


def test_a_truth_that_is_its_own_twin_is_solved_by_psnr():
    truth = its_own_twin()
    x = torch.cat([truth, truth + 0.3 * NOISE, NOISE])
    found = find_modes(x, truth, psnr_db(x, truth.expand_as(x)).tolist())
    assert found.labels == ["symmetric"] * 3 and found.coverage is None
    assert found.solved == [True, True, False]


def test_a_truth_that_is_nearly_its_own_twin():
    """Twins that a good reconstruction tells apart are two, others one."""
    even, odd = its_own_twin(), (TRUTH - flipped(TRUTH)) / 2
    for strength, expected in ((0.002, "symmetric"), (0.2, "0")):
        truth = even + strength * odd
        assert find_modes(truth, truth, [80.0]).labels == [expected]


def test_without_twins_an_image_is_there_or_not():
    rotated, average = flipped(TRUTH), (TRUTH + flipped(TRUTH)) / 2
    x = torch.cat([TRUTH, 0.9 * TRUTH + 0.05, TRUTH + 0.3 * NOISE, rotated, average, NOISE, -TRUTH])
    quality = psnr_db(x, TRUTH.expand_as(x)).tolist()
    found = find_modes(x, TRUTH, quality, twins=False)
    assert found.labels == ["0", "0", "0", "none", "none", "none", "none"]
    assert found.solved == [n == "0" and q >= 18 for n, q in zip(found.labels, quality, strict=True)]
    assert find_modes(TRUTH, TRUTH, [17.9], twins=False).solved == [False]
    assert find_modes(its_own_twin(), its_own_twin(), [80.0], twins=False).labels == ["0"]


def test_twins_follow_the_symmetries_of_the_operator():
    assert has_twins(PhaseRetrieval().symmetries()) and not has_twins((IDENTITY,))
