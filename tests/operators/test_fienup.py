import pytest
import torch
from torch.nn import functional as F

from particledaps.operators.fienup import (
    FienupSettings,
    align_channels,
    channel_residuals,
    hybrid_input_output,
    project_magnitudes,
    project_support,
    relaxed_reflections,
    share_best_channel,
    solve,
    triangles,
)
from particledaps.operators.phase_retrieval import PhaseRetrieval, mirror_frequencies, rotate_180

F64 = torch.float64
SIDE, PLANE = 8, 12
OPERATOR = PhaseRetrieval(oversample=2.0, noise_sigma=0.05)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def amplitude(x):
    return torch.fft.rfft2(x, norm="ortho").abs()


def square(side=SIDE, plane=PLANE):
    return F.pad(torch.ones(side, side, dtype=F64), (0, plane - side, 0, plane - side))


def problem(channels=3, seed=0, noise=0.05):
    x = 2 * uniform(1, channels, SIDE, SIDE, seed=seed) - 1
    clean = OPERATOR(x)
    return x, clean + noise * normal(*clean.shape, seed=seed + 1)


def norms(x):
    return x.square().sum((-2, -1)).sqrt()


# --- Projections -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [12, 11])
def test_magnitudes_are_projected_exactly_and_once(width):
    x, wanted = normal(2, 3, 12, width), amplitude(normal(3, 12, width, seed=1))
    projected = project_magnitudes(x, wanted)
    torch.testing.assert_close(amplitude(projected), wanted.expand(2, -1, -1, -1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(project_magnitudes(projected, wanted), projected, rtol=1e-9, atol=1e-9)


def test_the_magnitude_projection_is_the_nearest_plane():
    x, wanted = normal(1, 12, 12), amplitude(normal(1, 12, 12, seed=1))
    projected = project_magnitudes(x, wanted)
    for seed in range(2, 12):
        other = project_magnitudes(projected + 0.3 * normal(1, 12, 12, seed=seed), wanted)
        assert norms(x - projected) <= norms(x - other) + 1e-9


def test_a_plane_of_zeros_stays_finite():
    assert project_magnitudes(torch.zeros(1, 12, 12), torch.ones(1, 12, 7)).isfinite().all()


def test_support_is_projected_exactly_and_once():
    x, support = 3 * normal(2, 3, PLANE, PLANE), square()
    projected = project_support(x, support)
    inside = projected[..., :SIDE, :SIDE]
    torch.testing.assert_close(inside, x[..., :SIDE, :SIDE].clamp(0, 1), rtol=0, atol=0)
    assert projected.count_nonzero() == inside.count_nonzero()  # nothing outside
    assert torch.equal(project_support(projected, support), projected)


def test_hio_is_fienups_rule():
    x, y, support, beta = normal(2, PLANE, PLANE), amplitude(normal(2, PLANE, PLANE, seed=1)), square(), 0.9
    x_before = x.clone()
    projected = project_magnitudes(x, y)
    feasible = (projected >= 0) & (projected <= 1) & (support > 0)
    too_large = (projected > 1) & (support > 0)
    expected = torch.where(feasible, projected, x - beta * projected)
    expected = torch.where(too_large, x - beta * (projected - 1), expected)
    torch.testing.assert_close(hybrid_input_output(x, y, support, beta), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(x, x_before)


def test_raar_is_lukes_rule():
    x, y, support, beta = normal(2, PLANE, PLANE), amplitude(normal(2, PLANE, PLANE, seed=1)), square(), 0.87
    projected = project_magnitudes(x, y)
    reflected = 2 * projected - x
    twice_reflected = 2 * project_support(reflected, support) - reflected
    expected = beta / 2 * (twice_reflected + x) + (1 - beta) * projected
    torch.testing.assert_close(relaxed_reflections(x, y, support, beta), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("step", [hybrid_input_output, relaxed_reflections])
def test_a_solution_is_a_fixed_point(step):
    x = F.pad(0.1 + 0.8 * uniform(1, SIDE, SIDE), (0, PLANE - SIDE, 0, PLANE - SIDE))
    torch.testing.assert_close(step(x, amplitude(x), square(), 0.9), x, rtol=1e-9, atol=1e-9)


def test_error_reduction_never_raises_the_residual():
    _, y = problem()
    magnitudes = OPERATOR.half_plane(y).mean.clamp(min=0)
    weight = OPERATOR.half_plane(y).weight
    x = project_support(normal(4, 3, PLANE, PLANE), square())
    residuals = []
    for _ in range(60):
        residuals.append((weight * (amplitude(x) - magnitudes).square()).sum((-2, -1)))
        x = project_support(project_magnitudes(x, magnitudes), square())
    falls = torch.stack(residuals).diff(dim=0)
    assert falls.max() <= 1e-10 and residuals[-1].sum() < 0.5 * residuals[0].sum()


# --- Windows and channels --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [(8, 8), (7, 7), (6, 8)])
def test_no_triangle_meets_its_own_twin_and_four_cover_the_square(side):
    windows = triangles(5, side, torch.device("cpu"), F64)
    assert set(windows.unique().tolist()) == {0.0, 1.0}
    assert (windows * windows.flip((-2, -1))).max() == 0
    assert len({tuple(w.flatten().tolist()) for w in windows[:4]}) == 4 and torch.equal(windows[4], windows[0])
    assert 0.4 < windows.mean() <= 0.5


def test_channels_are_turned_to_agree():
    base = uniform(1, 1, SIDE, SIDE)
    x = torch.cat([base, 0.8 * base + 0.1, 0.5 * base + 0.2], 1) + 0.02 * normal(1, 3, SIDE, SIDE)
    for code in range(8):
        turned = x.clone()
        channels = [c for c in range(3) if code >> c & 1]
        turned[:, channels] = rotate_180(x[:, channels])
        for reference in range(3):
            expected = rotate_180(x) if reference in channels else x
            assert torch.equal(align_channels(turned, torch.tensor([reference])), expected)


def test_alignment_raises_the_correlation_and_keeps_the_magnitudes():
    x = uniform(5, 3, SIDE, SIDE)
    reference = torch.tensor([0, 1, 2, 0, 1])
    aligned = align_channels(x, reference)
    rows = torch.arange(5)
    centred = aligned - aligned.mean((-2, -1), keepdim=True)
    against = (centred * centred[rows, reference][:, None]).sum((-2, -1))
    other = (rotate_180(centred) * centred[rows, reference][:, None]).sum((-2, -1))
    assert (against >= other - 1e-12).all()
    assert torch.equal(aligned[rows, reference], x[rows, reference])
    torch.testing.assert_close(OPERATOR(aligned), OPERATOR(x), rtol=1e-9, atol=1e-9)


def test_the_best_channel_is_shared():
    x = F.pad(uniform(2, 3, SIDE, SIDE), (0, PLANE - SIDE, 0, PLANE - SIDE))
    magnitudes = amplitude(x[:1]).clone()
    magnitudes[:, [0, 2]] += 0.5  # only channel 1 of the first restart is solved
    assert channel_residuals(x, magnitudes).argmin(1)[0] == 1
    shared = share_best_channel(x, magnitudes, square())
    torch.testing.assert_close(amplitude(shared), magnitudes.expand(2, -1, -1, -1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(shared[0, 1], x[0, 1], rtol=1e-8, atol=1e-8)
    expected = project_magnitudes(x[0, 1].expand(3, -1, -1), magnitudes[0])
    torch.testing.assert_close(shared[0], expected, rtol=1e-8, atol=1e-8)


# --- The solver ------------------------------------------------------------------------------------------------------

QUICK = FienupSettings(iterations=70, error_reduction=10)


def starts(count, channels=3, plane=PLANE, seed=5):
    return normal(count, channels, plane, plane, seed=seed)


def solved(y, noise, settings=QUICK, operator=OPERATOR, side=SIDE):
    return solve(operator, y, noise, (side, side), settings)


def test_a_sparse_positive_object_is_found_up_to_its_twin():
    side, operator = 12, PhaseRetrieval(oversample=4.0)
    for seed in range(3):
        bright = uniform(1, 1, side, side, seed=seed)
        bright = torch.where(bright > 0.85, bright, 0.0)
        bright[..., 0, 0], bright[..., -1, -1] = 1.0, 0.7  # it fills the square: no shifted copy fits
        truth = 2 * bright - 1
        y = operator(truth)
        settings = FienupSettings(iterations=250, error_reduction=100)
        noise = starts(6, 1, y.shape[-1], seed=seed + 10)
        images, residuals = solved(y, noise, settings, operator, side)
        best = images[residuals.argmin()][None]
        error = min((best - twin).square().mean().sqrt().item() for twin in (truth, rotate_180(truth)))
        assert residuals.min() < 1e-3 and error < 0.02


@pytest.mark.parametrize("rule", ["hio", "raar"])
def test_restarts_do_not_touch_each_other(rule):
    _, y = problem()
    noise, settings = starts(5), FienupSettings(rule, iterations=70, error_reduction=10, reduced_support=None)
    images, residuals = solved(y, noise, settings)
    assert len({round(r, 6) for r in residuals.tolist()}) == 5
    for row in range(5):
        image, residual = solved(y, noise[row : row + 1], settings)
        torch.testing.assert_close(image[0], images[row], rtol=0, atol=1e-6)
        torch.testing.assert_close(residual[0], residuals[row], rtol=1e-6, atol=1e-6)


def test_more_restarts_change_none_of_the_first():
    _, y = problem()
    few, many = solved(y, starts(6)[:2])[0], solved(y, starts(6))[0]
    torch.testing.assert_close(many[:2], few, rtol=0, atol=1e-6)


def test_channels_of_one_measurement_are_solved_alone_where_nothing_is_shared():
    _, y = problem()
    settings, noise = FienupSettings(iterations=70, error_reduction=10, share=False), starts(2)
    both = solved(y, noise, settings)[0]
    for channel in range(3):
        alone = solved(y[:, [channel]], noise[:, [channel]], settings)[0][:, 0]
        twins = torch.stack([alone, rotate_180(alone[:, None])[:, 0]])
        assert (twins - both[:, channel]).abs().flatten(2).amax(2).amin(0).max() < 1e-6


def test_images_lie_in_range_and_their_residual_is_the_data_loss():
    _, y = problem()
    images, residuals = solved(y, starts(3))
    assert images.shape == (3, 3, SIDE, SIDE) and residuals.shape == (3,)
    assert images.min() >= -1 and images.max() <= 1
    torch.testing.assert_close(residuals, (OPERATOR(images) - y).square().flatten(1).sum(1), rtol=1e-9, atol=1e-9)
    assert residuals.max() < OPERATOR.loss(2 * uniform(1, 3, SIDE, SIDE, seed=9) - 1, y)


def test_only_the_mean_of_conjugate_entries_counts():
    _, y = problem()
    plane = torch.fft.ifftshift(y, dim=(-2, -1))
    mean = torch.fft.fftshift((plane + mirror_frequencies(plane)) / 2, dim=(-2, -1))
    assert (mean - y).abs().max() > 0.01
    torch.testing.assert_close(solved(mean, starts(2))[0], solved(y, starts(2))[0], rtol=0, atol=1e-6)


def test_negative_magnitudes_count_as_zero():
    _, y = problem()
    negative = y.clone()
    negative[..., 2, 3] = negative[..., PLANE - 2, PLANE - 3] = -0.4
    zero = negative.clamp(min=0) if (y >= 0).all() else torch.where(negative == -0.4, 0.0, negative)
    assert torch.equal(solved(negative, starts(2))[0], solved(zero, starts(2))[0])


@pytest.mark.parametrize("change", [{"reduced_support": None}, {"share": False}, {"rule": "raar"}, {"iterations": 90}])
def test_every_setting_counts(change):
    _, y = problem()
    other = FienupSettings(**{"iterations": 70, "error_reduction": 10} | change)
    assert (solved(y, starts(2), other)[0] - solved(y, starts(2))[0]).abs().max() > 1e-3


def test_magnitudes_that_were_not_measured_stay_as_they_are():
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = torch.fft.rfft2(x.flip(0), norm="ortho").abs()
    gaps = torch.zeros(8, 5, dtype=torch.bool)
    gaps[2:4, 1] = True
    moved = project_magnitudes(x, torch.where(gaps, torch.nan, wanted))
    found, before = torch.fft.rfft2(moved, norm="ortho").abs(), torch.fft.rfft2(x, norm="ortho").abs()
    torch.testing.assert_close(found[..., gaps], before[..., gaps])
    torch.testing.assert_close(found[..., ~gaps], wanted[..., ~gaps])
