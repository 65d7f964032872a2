import numpy as np
import pytest
import torch
from analytic import F64, normal

from particledaps.operators.operator import Operator
from particledaps.operators.phase_retrieval import PhaseRetrieval, count_entries, rotate_180

SHAPES = {
    "even": (3, 8, 8),
    "odd": (1, 9, 7),
    "even_by_odd": (3, 8, 5),
    "odd_by_even": (1, 5, 12),
    "grey": (1, 16, 16),
}
OPERATOR = PhaseRetrieval()
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def images(count, shape, seed=0, dtype=F64):
    return normal(count, *shape, seed=seed, dtype=dtype).clamp(-1, 1)


def measured(x, seed=1, operator=OPERATOR):
    return operator.measure(x, torch.Generator().manual_seed(seed))


def full_plane_loss(x, y):
    return (OPERATOR(x) - y).square().sum((1, 2, 3))


def fourier_matrix(size):
    index = np.arange(size)
    return np.exp(-2j * np.pi * np.outer(index, index) / size) / np.sqrt(size)


def reference_amplitude(image, oversample=2.0):
    """One channel by explicit Fourier matrices; the zero frequency goes to ``size // 2``."""
    margins = [int(oversample / 8 * side) for side in image.shape]
    padded = np.pad((image + 1) / 2, [(m, m) for m in margins])
    spectrum = fourier_matrix(padded.shape[0]) @ padded @ fourier_matrix(padded.shape[1]).T
    return np.abs(np.roll(spectrum, (padded.shape[0] // 2, padded.shape[1] // 2), axis=(0, 1)))


@each_shape
@pytest.mark.parametrize("oversample", [2.0, 1.0, 3.7])
def test_amplitude_against_explicit_fourier_matrices(shape, oversample):
    x = images(2, shape)
    expected = [[reference_amplitude(channel.numpy(), oversample) for channel in image] for image in x]
    np.testing.assert_allclose(PhaseRetrieval(oversample)(x), np.array(expected), rtol=1e-10, atol=1e-12)


@each_shape
@pytest.mark.parametrize("oversample", [2.0, 1.0, 3.7])
def test_padding_is_the_rounded_down_share_of_each_side(shape, oversample):
    operator, (channels, height, width) = PhaseRetrieval(oversample), shape
    expected = (channels, height + 2 * int(oversample / 8 * height), width + 2 * int(oversample / 8 * width))
    assert operator.measurement_shape(shape) == expected
    assert operator(images(2, shape)).shape == (2, *expected)


def test_default_measurement_of_64_px_has_one_and_a_half_times_the_side():
    assert OPERATOR.measurement_shape((3, 64, 64)) == (3, 96, 96)


@each_shape
def test_clean_measurement_is_centrosymmetric(shape):
    y = OPERATOR(images(2, shape)).numpy()
    height, width = y.shape[-2:]
    rows = (2 * (height // 2) - np.arange(height)) % height
    columns = (2 * (width // 2) - np.arange(width)) % width
    np.testing.assert_allclose(y, y[..., rows, :][..., columns], rtol=0, atol=1e-12)


@each_shape
def test_energy_is_kept(shape):
    x = images(2, shape)
    torch.testing.assert_close(OPERATOR(x).square().sum((1, 2, 3)), ((x + 1) / 2).square().sum((1, 2, 3)))


@each_shape
def test_loss_is_the_sum_over_the_full_plane(shape):
    x, y = images(3, shape), measured(images(3, shape, seed=2))
    expected = full_plane_loss(x, y)
    torch.testing.assert_close(OPERATOR.loss(x, y), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(OPERATOR.objective(y)(x)[0], expected, rtol=1e-9, atol=1e-9)


@each_shape
def test_gradient_is_that_of_the_full_plane_loss(shape):
    x, y = images(3, shape).requires_grad_(True), measured(images(3, shape, seed=2))
    (expected,) = torch.autograd.grad(full_plane_loss(x, y).sum(), x)
    torch.testing.assert_close(OPERATOR.objective(y)(x.detach())[1], expected, rtol=1e-9, atol=1e-9)


@each_shape
def test_gradient_against_finite_differences(shape):
    x, y, step = images(1, shape), measured(images(1, shape, seed=2)), 1e-5
    gradient, direction = OPERATOR.objective(y)(x)[1], normal(1, *shape, seed=3)
    ahead, behind = (OPERATOR.objective(y)(x + s * direction)[0] for s in (step, -step))
    assert ((ahead - behind) / (2 * step)).item() == pytest.approx((gradient * direction).sum().item(), rel=1e-6)


def test_loss_is_differentiable():
    x, y = images(1, (1, 4, 5)).requires_grad_(True), measured(images(1, (1, 4, 5), seed=2))
    assert torch.autograd.gradcheck(lambda image: OPERATOR.loss(image, y), x)


@each_shape
def test_objective_without_shortcut_agrees(shape):
    x, y = images(2, shape), measured(images(2, shape, seed=2))
    torch.testing.assert_close(Operator.objective(OPERATOR, y)(x), OPERATOR.objective(y)(x), rtol=1e-9, atol=1e-9)


def test_black_image_has_a_finite_gradient():
    y = measured(images(1, (3, 8, 8)))
    black = torch.full((1, 3, 8, 8), -1.0, dtype=F64)
    loss, gradient = OPERATOR.objective(y)(black)
    assert gradient.isfinite().all()
    torch.testing.assert_close(loss, y.square().sum((1, 2, 3)), rtol=1e-12, atol=0)


def test_batch_is_a_loop_over_single_images():
    x, y = images(4, (3, 8, 8)), measured(images(4, (3, 8, 8), seed=2))
    together = (OPERATOR(x), OPERATOR.loss(x, y), *OPERATOR.objective(y)(x), *OPERATOR.noise_floor(y))
    for row in range(4):
        one, its_y = x[row : row + 1], y[row : row + 1]
        alone = (
            OPERATOR(one),
            OPERATOR.loss(one, its_y),
            *OPERATOR.objective(its_y)(one),
            *OPERATOR.noise_floor(its_y),
        )
        for batched, single in zip(together, alone, strict=True):
            torch.testing.assert_close(batched[row : row + 1], single, rtol=1e-12, atol=1e-12)


@each_shape
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (F64, 1e-12)], ids=["float32", "float64"])
def test_symmetries_leave_the_measurement_and_are_their_own_inverse(shape, dtype, tolerance):
    x = images(2, shape, dtype=dtype)
    for symmetry in (*OPERATOR.symmetries(), *OPERATOR.channel_symmetries(shape[0])):
        assert torch.equal(symmetry.apply(symmetry.apply(x)), x)
        torch.testing.assert_close(OPERATOR(symmetry.apply(x)), OPERATOR(x), rtol=0, atol=tolerance)


def test_symmetries_are_the_maps_that_they_are_called():
    x = images(2, (3, 8, 5))
    identity, rotation = OPERATOR.symmetries()
    assert (identity.name, rotation.name) == ("identity", "rotate_180")
    assert identity.apply(x) is x
    np.testing.assert_array_equal(rotation.apply(x), np.rot90(x.numpy(), 2, axes=(-2, -1)))


def test_channel_symmetries_are_all_combinations():
    x, copy = images(1, (3, 4, 4)), images(1, (3, 4, 4))
    symmetries = OPERATOR.channel_symmetries(3)
    turned = {tuple((s.apply(x) != x).flatten(2).any(2)[0].tolist()) for s in symmetries}
    assert len(symmetries) == len(turned) == len({s.name for s in symmetries}) == 8
    assert symmetries[0].name == "identity"
    assert torch.equal(x, copy)


def test_other_maps_change_the_measurement():
    """The invariance tests can fail: a mirror image measures differently."""
    x = images(2, (3, 8, 8))
    for other in (x.flip(-1), x.flip(-2), x.transpose(-2, -1), -x):
        assert (OPERATOR(other) - OPERATOR(x)).abs().max() > 0.01


@each_shape
def test_pairs_and_self_conjugate_entries_are_counted(shape):
    """By brute force over the indices of the plane."""
    y = OPERATOR(images(1, shape))
    channels, height, width = y.shape[1:]
    alone = sum((-i % height, -j % width) == (i, j) for i in range(height) for j in range(width))
    assert count_entries(y) == (channels * (height * width - alone) // 2, channels * alone)


@each_shape
def test_noise_floor_is_the_loss_at_the_truth(shape):
    count, x = 2000, images(1, shape)
    y = measured(x.expand(count, *shape))
    floor = OPERATOR.noise_floor(y)
    excess = OPERATOR.loss(x.expand(count, *shape), y) - floor.mean
    assert excess.mean().abs() < 4 * excess.std() / count**0.5
    assert excess.std().item() == pytest.approx(floor.std[0].item(), rel=0.1)


@each_shape
def test_knowing_y_sharpens_the_noise_floor(shape):
    """Half of the chi-squared terms are read off the pairs: the excess varies less than the loss itself."""
    count, x = 2000, images(1, shape)
    y = measured(x.expand(count, *shape))
    loss = OPERATOR.loss(x.expand(count, *shape), y)
    generic = Operator.noise_floor(OPERATOR, y)
    assert loss.mean().item() == pytest.approx(generic.mean[0].item(), abs=4 * generic.std[0].item() / count**0.5)
    assert loss.std().item() == pytest.approx(generic.std[0].item(), rel=0.1)
    assert (loss - OPERATOR.noise_floor(y).mean).std() < 0.85 * loss.std()


def test_noise_floor_of_64_px_colour_images():
    count, shape = 32, (3, 64, 64)
    y = measured(images(1, shape).expand(count, *shape))
    mean = OPERATOR.noise_floor(y).mean
    assert pytest.approx(69.12) == 3 * 96 * 96 * 0.05**2
    assert mean.mean().item() == pytest.approx(69.12, abs=4 * 0.42 / count**0.5)


@pytest.mark.parametrize("noise_sigma", [0.05, 0.2])
def test_conjugate_pairs_reveal_the_noise_level(noise_sigma):
    operator = PhaseRetrieval(noise_sigma=noise_sigma)
    estimates = operator.estimated_noise_sigma(measured(images(3, (3, 32, 32)), operator=operator))
    torch.testing.assert_close(estimates, torch.full_like(estimates, noise_sigma), rtol=0.08, atol=0)


def test_conjugate_pairs_reveal_the_noise_level_without_bias():
    """A plane of 36 entries, of which 4 are their own conjugates."""
    y = measured(images(1, (1, 4, 4)).expand(4000, 1, 4, 4))
    assert count_entries(y) == (16, 4)
    variances = OPERATOR.estimated_noise_sigma(y).square()
    assert variances.mean().item() == pytest.approx(0.05**2, abs=4 * 0.05**2 * (2 / 16 / 4000) ** 0.5)


def test_noise_is_white_with_the_stated_level():
    x = images(1, (3, 64, 64))
    noise = (measured(x) - OPERATOR(x)) / 0.05
    assert noise.mean().abs() < 4 / noise.numel() ** 0.5
    assert noise.std().item() == pytest.approx(1, abs=4 * (0.5 / noise.numel()) ** 0.5)


def test_measurement_depends_on_the_generator_only():
    x = images(1, (3, 8, 8))
    torch.manual_seed(1)
    first = measured(x, seed=5)
    torch.manual_seed(2)
    assert torch.equal(measured(x, seed=5), first)
    assert not torch.equal(measured(x, seed=6), first)


def test_measuring_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    measured(images(1, (3, 8, 8)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("arguments", [{"oversample": 0.0}, {"oversample": -1.0}, {"noise_sigma": 0.0}])
def test_impossible_operators_are_refused(arguments):
    with pytest.raises(ValueError, match="must be positive"):
        PhaseRetrieval(**arguments)


def test_rotation_is_by_180_degrees():
    assert rotate_180(torch.tensor([[[[1, 2], [3, 4]]]])).flatten().tolist() == [4, 3, 2, 1]


def conjugate_of(y):
    """The measurement with every entry in the place of its conjugate, by indices of the centred plane."""
    height, width = y.shape[-2:]
    rows = (2 * (height // 2) - torch.arange(height)) % height
    columns = (2 * (width // 2) - torch.arange(width)) % width
    return y[..., rows, :][..., columns]


def self_conjugate_entries(y):
    index = torch.arange(y.shape[-2] * y.shape[-1]).reshape(y.shape[-2:])
    return index == conjugate_of(index)


@each_shape
def test_halves_are_centrosymmetric_and_hold_each_reading_once(shape):
    y = measured(images(2, shape))
    fit, held, _ = OPERATOR.split(y)
    for copy in (fit, held):
        assert copy.shape == y.shape
        assert torch.equal(copy, conjugate_of(copy))
    readings = torch.stack([y, conjugate_of(y)]).sort(0).values
    assert torch.equal(torch.stack([fit, held]).sort(0).values, readings)
    alone = self_conjugate_entries(y)
    assert torch.equal(fit[..., alone], held[..., alone]) and torch.equal(fit[..., alone], y[..., alone])
    assert (fit != held)[..., ~alone].all()


@each_shape
def test_halves_of_a_clean_measurement_are_that_measurement(shape):
    y = OPERATOR(images(2, shape))
    for copy in OPERATOR.split(y)[:2]:
        torch.testing.assert_close(copy, y, rtol=0, atol=1e-12)


@each_shape
def test_halves_have_independent_noise_of_the_stated_level(shape):
    """But for self-conjugate entries, which were read once and are in both."""
    count, x = 2000, images(1, shape)
    y = measured(x.expand(count, *shape))
    fit, held = ((copy - OPERATOR(x)) / 0.05 for copy in OPERATOR.split(y)[:2])
    alone, noise = self_conjugate_entries(y), count**-0.5
    correlation = (fit * held).mean(0)
    assert correlation[..., ~alone].abs().max() < 5 * noise
    torch.testing.assert_close(correlation[..., alone], torch.ones_like(correlation[..., alone]), rtol=0.15, atol=0)
    for copy in (fit, held):
        assert copy.mean(0).abs().max() < 5 * noise
        assert (copy.square().mean(0) - 1).abs().max() < 5 * 2**0.5 * noise


@each_shape
@pytest.mark.parametrize("noise_sigma", [0.05, 0.2])
def test_floor_of_a_half_is_its_mean_loss_at_the_truth(shape, noise_sigma):
    count, x, operator = 2000, images(1, shape), PhaseRetrieval(noise_sigma=noise_sigma)
    y = measured(x.expand(count, *shape), operator=operator)
    fit, held, floor = operator.split(y)
    assert floor.shape == (count,)
    for copy in (fit, held):
        excess = operator.loss(x.expand(count, *shape), copy) - floor
        assert excess.mean().abs() < 4 * excess.std() / count**0.5
        assert 4 * excess.std() / count**0.5 < 0.06 * floor[0]  # a floor that forgot the mirror would be half


@each_shape
def test_halves_have_no_pair_residual_left(shape):
    """So the loss on one half is a weighted sum over the half plane and nothing else."""
    y = measured(images(2, shape))
    for copy in OPERATOR.split(y)[:2]:
        assert OPERATOR.half_plane(copy).pair_loss.abs().max() == 0
