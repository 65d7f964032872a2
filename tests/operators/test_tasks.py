"""What each physics is: against independent computations, and the values it refuses."""

import numpy as np
import pytest
import torch
from analytic import F64
from every_operator import generator, images
from scipy import ndimage
from torch.nn import functional as F

from particledaps.operators.down_sampling import DownSampling
from particledaps.operators.gaussian_blur import GaussianBlur
from particledaps.operators.hdr import HighDynamicRange
from particledaps.operators.inpainting import BoxInpainting, RandomInpainting
from particledaps.operators.motion_blur import MotionBlur
from particledaps.operators.motion_kernel import draw_motion_kernel, draw_path, triangular


def keys_cubic(t):
    t = abs(t)
    if t <= 1:
        return 1.5 * t**3 - 2.5 * t**2 + 1
    return -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t < 2 else 0.0


def matlab_rows(row, scale):
    """``imresize(row, 1 / scale)`` tap by tap, as its documentation describes it (1-based, edge pixel mirrored)."""
    size, result = len(row), []
    around = [*range(size), *reversed(range(size))]
    for j in range(1, -(-size // scale) + 1):
        u = j * scale + 0.5 * (1 - scale)
        taps = [(keys_cubic((u - i) / scale), row[around[(i - 1) % (2 * size)]]) for i in range(-4 * size, 5 * size)]
        result.append(sum(w * v for w, v in taps) / sum(w for w, _ in taps))
    return np.array(result)


@pytest.mark.parametrize(("size", "scale"), [(16, 4), (15, 4), (12, 3), (5, 2)])
def test_down_sampling_tap_by_tap(size, scale):
    x = images(1, (1, size, size))
    halfway = np.array([matlab_rows(row, scale) for row in x[0, 0].numpy()])
    expected = np.array([matlab_rows(column, scale) for column in halfway.T]).T
    np.testing.assert_allclose(DownSampling(scale)(x)[0, 0].numpy(), expected, rtol=1e-10, atol=1e-12)


def test_down_sampling_agrees_with_torch_away_from_the_border():
    x = images(2, (3, 64, 64))
    theirs = F.interpolate(x, scale_factor=0.25, mode="bicubic", antialias=True, align_corners=False)
    ours = DownSampling(4)(x)
    torch.testing.assert_close(ours[..., 2:-2, 2:-2], theirs[..., 2:-2, 2:-2], rtol=1e-6, atol=1e-6)
    assert (ours - theirs)[..., 0, :].abs().max() > 1e-4  # torch cuts its kernel at the border, we mirror


def test_down_sampling_halves_what_it_should():
    assert DownSampling(4).measurement_shape((3, 256, 256)) == (3, 64, 64)
    assert DownSampling(4).measurement_shape((3, 15, 13)) == (3, 4, 4)


def test_gaussian_blur_against_scipy():
    x = images(1, (3, 64, 64))
    ours = GaussianBlur(reference_side=None)(x)[0]
    theirs = np.stack([ndimage.gaussian_filter(c, 3.0, mode="mirror") for c in x[0].numpy()])
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-10, atol=1e-12)


def test_gaussian_kernel_is_cut_at_its_size():
    spike = torch.zeros(1, 1, 33, 33, dtype=F64)
    spike[0, 0, 16, 16] = 1
    wide, narrow = (GaussianBlur(3.0, size, None)(spike)[0, 0, 16] > 0 for size in (61, 5))
    assert wide.sum() == 25 and narrow.sum() == 5


def test_lengths_follow_the_side_of_the_image():
    """Blurring a smooth image at half the size is half the size of the blurred image."""
    coarse = images(1, (1, 10, 10))
    large, small = (F.interpolate(coarse, (n, n), mode="bicubic", align_corners=False) for n in (128, 64))
    blurred = F.avg_pool2d(GaussianBlur()(large), 2)
    inside = (..., slice(4, -4), slice(4, -4))
    assert (GaussianBlur()(small) - blurred)[inside].abs().max() < 0.01
    assert (small - blurred)[inside].abs().max() > 0.03
    assert BoxInpainting().for_image((3, 64, 64), generator()).part.sum() == 64**2 - 32**2
    assert len(MotionBlur().for_image((3, 64, 64), generator()).part) == 15
    assert len(MotionBlur().for_image((3, 256, 256), generator()).part) == 61


def test_motion_blur_is_correlation_with_its_kernel_over_reflected_borders():
    operator = MotionBlur(kernel_size=7, reference_side=None).for_image((3, 14, 11), generator())
    x = images(2, (3, 14, 11))
    kernel = operator.part.double()
    padded = F.pad(x, [3] * 4, mode="reflect")
    expected = F.conv2d(padded, kernel.expand(3, 1, 7, 7), groups=3)
    torch.testing.assert_close(operator(x), expected, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(kernel, kernel.flip((0, 1)))  # so convolution would be something else


@pytest.mark.parametrize("size", [3, 15, 61, 121])
@pytest.mark.parametrize("intensity", [0.0, 0.5, 1.0])
def test_motion_kernels_are_kernels(size, intensity):
    kernels = [draw_motion_kernel(size, intensity, generator(seed)) for seed in range(3)]
    for kernel in kernels:
        assert kernel.shape == (size, size) and kernel.min() >= 0
        assert kernel.sum().item() == pytest.approx(1, abs=1e-5)
    if size > 3:
        assert not torch.equal(kernels[0], kernels[1])


def bends(intensity):
    """Root mean square distance of walks from the straight line through their ends, over their extent."""
    ratios = []
    for seed in range(40):
        path = draw_path(100.0, intensity, generator(seed)).numpy()
        if len(path) > 3:
            values = np.linalg.svd(path - path.mean(0), compute_uv=False)
            ratios.append(values[1] / values[0])
    return np.mean(ratios)


def test_motion_is_straight_without_intensity_and_winds_with_it():
    assert bends(0.0) < 0.02 < bends(0.5) < bends(1.0)


def test_walks_have_the_stated_length():
    """0.75 d U(0, 1) for intensity 0, and the last step beyond it (mean 1.1 d / 31)."""
    lengths = []
    for seed in range(300):
        path = draw_path(1.0, 0.0, generator(seed))
        lengths.append((path[1:] - path[:-1]).norm(dim=1).sum().item())
    assert np.mean(lengths) == pytest.approx(0.375, abs=4 * 0.22 / 300**0.5)
    assert max(lengths) < 0.75 + 0.5


def test_triangular_numbers():
    u = torch.rand(20000, generator=generator(), dtype=F64)
    values = triangular(u, 0.3, 1.0)
    assert values.min() >= 0 and values.max() <= 1
    assert values.mean().item() == pytest.approx(1.3 / 3, abs=0.01)
    histogram = torch.histc(values, 10, 0, 1)
    assert histogram.argmax() in (2, 3)


def test_box_leaves_the_pixels_around_it():
    operator = BoxInpainting().for_image((3, 256, 256), generator(2))
    x = images(1, (3, 256, 256))
    y, hidden = operator(x), operator.part == 0
    assert (y[..., hidden] == 0).all() and torch.equal(y[..., ~hidden], x[..., ~hidden])
    rows, columns = torch.nonzero(hidden, as_tuple=True)
    assert hidden.sum() == 128**2 == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)


def test_boxes_lie_anywhere_within_the_margins():
    corners = []
    for seed in range(300):
        rows, columns = torch.nonzero(
            BoxInpainting().for_image((3, 256, 256), generator(seed)).part == 0, as_tuple=True
        )
        corners.append((rows.min().item(), columns.min().item()))
    corners = np.array(corners)
    assert corners.min() >= 32 and corners.max() <= 95
    assert corners.min() < 35 and corners.max() > 92
    assert abs(np.corrcoef(corners.T)[0, 1]) < 4 / 300**0.5


def test_random_masks_hide_the_stated_share():
    for seed in range(10):
        part = RandomInpainting().for_image((3, 256, 256), generator(seed)).part
        assert int(0.70 * 65536) <= (part == 0).sum() <= int(0.71 * 65536)
    shares = [
        (RandomInpainting(0.2, 0.8).for_image((1, 32, 32), generator(s)).part == 0).double().mean() for s in range(50)
    ]
    assert min(shares) < 0.3 and max(shares) > 0.7


def test_hidden_pixels_have_no_gradient_and_reveal_the_noise():
    operator = RandomInpainting().for_image((3, 64, 64), generator())
    x = images(1, (3, 64, 64))
    y = operator.measure(x, generator(1))
    hidden = operator.part == 0
    gradient = operator.objective(y)(torch.zeros_like(x))[1]
    assert (gradient[..., hidden] == 0).all() and (gradient[..., ~hidden] != 0).all()
    assert operator.estimated_noise_sigma(y).item() == pytest.approx(0.05, rel=0.05)
    assert operator.estimated_noise_sigma(operator(x)) is None


def test_knowing_the_hidden_entries_sharpens_the_floor():
    operator = RandomInpainting().for_image((3, 32, 32), generator())
    y = operator.measure(images(1, (3, 32, 32)), generator(1))
    assert operator.noise_floor(y).std < 0.6 * super(type(operator).__mro__[2], operator).noise_floor(y).std


def test_hdr_saturates():
    x = torch.tensor([-1, -0.6, -0.5, -0.25, 0, 0.2, 0.5, 0.7, 1]).reshape(1, 1, 1, 9)
    operator = HighDynamicRange()
    assert operator(x).flatten().tolist() == pytest.approx([-1, -1, -1, -0.5, 0, 0.4, 1, 1, 1])
    gradient = operator.objective(torch.full_like(x, 3.0))(x)[1].flatten()
    assert (gradient == 0).tolist() == [True, True, False, False, False, False, False, True, True]
    brighter = x.where(x.abs() <= 0.5, x.sign())
    assert torch.equal(operator(brighter), operator(x))


def test_hdr_calls_back_a_pixel_that_saturates_by_mistake():
    """Exact gradients below saturation; above it inwards where y is clear of the ends, still 0 where it is not."""
    y = torch.tensor([[[[0.5, -0.5, 0.99, 0.5]]]])
    x = torch.tensor([[[[0.9, -0.9, 0.9, 0.1]]]])
    loss, plain = HighDynamicRange().objective(y)(x)
    same, recovering = HighDynamicRange(recover_saturated=True).objective(y)(x)
    assert torch.equal(loss, same)
    torch.testing.assert_close(plain, torch.tensor([[[[0.0, 0.0, 0.0, -1.2]]]]))
    torch.testing.assert_close(recovering, torch.tensor([[[[5.2, -5.2, 0.0, -1.2]]]]))


REFUSED = {
    "scale of 1": (lambda: DownSampling(1), "scale_factor=1: must be at least 2"),
    "scale beyond the side": (
        lambda: DownSampling(32).for_image((3, 16, 64), None),
        "scale_factor=32: exceeds the image side 16",
    ),
    "no blur": (lambda: GaussianBlur(std=0), "std=0: must be positive"),
    "even kernel": (lambda: GaussianBlur(kernel_size=4), "kernel_size=4: must be odd"),
    "even motion": (lambda: MotionBlur(kernel_size=60), "kernel_size=60: must be odd"),
    "blur beyond the image": (
        lambda: GaussianBlur(9.0, reference_side=None).for_image((3, 16, 16), None),
        "radius of 30 px exceeds images of 16x16",
    ),
    "motion beyond the image": (
        lambda: MotionBlur(reference_side=None).for_image((3, 16, 16), None),
        "kernel_size=61: half of it exceeds images of 16x16",
    ),
    "intensity": (lambda: MotionBlur(intensity=1.5), "intensity=1.5: must be from 0 to 1"),
    "box of nothing": (lambda: BoxInpainting(min_side=0), "min_side=0"),
    "box upside down": (lambda: BoxInpainting(min_side=9, max_side=8), "max_side=8: must be at least min_side=9"),
    "box and margins": (
        lambda: BoxInpainting(margin=80).for_image((3, 64, 64), None),
        "max_side=128: a box of 32 px with margins",
    ),
    "margin": (lambda: BoxInpainting(margin=-1), "margin=-1"),
    "reference": (lambda: BoxInpainting(reference_side=0), "reference_side=0"),
    "everything hidden": (lambda: RandomInpainting(0.5, 1.0), "max_fraction=1.0"),
    "fractions swapped": (lambda: RandomInpainting(0.5, 0.4), "max_fraction=0.4: must be at least min_fraction=0.5"),
    "negative fraction": (lambda: RandomInpainting(-0.1, 0.4), "min_fraction=-0.1"),
    "dim": (lambda: HighDynamicRange(1.0), "scale=1.0: must be greater than 1"),
    "no noise": (lambda: HighDynamicRange(noise_sigma=0), "noise_sigma=0: must be positive"),
    "mask of halves": (lambda: BoxInpainting().with_part(torch.full((4, 4), 0.5)), "1 where a pixel is seen"),
    "mask with channels": (lambda: BoxInpainting().with_part(torch.ones(3, 4, 4)), r"must be \(H, W\)"),
    "mask of another size": (
        lambda: BoxInpainting().with_part(torch.ones(4, 4))(images(1, (3, 8, 8))),
        "does not fit images of",
    ),
    "even given kernel": (lambda: MotionBlur().with_part(torch.ones(4, 4)), r"\(k, k\) with odd k"),
    "dark kernel": (lambda: MotionBlur().with_part(torch.zeros(3, 3)), "positive sum"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_impossible_operators_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
