"""``task.noise_sigma=auto``: the noise of each measurement as it shows it itself."""

import json

import numpy as np
import pytest
import torch
from analytic import normal, prior_of

from marginal_noise import NoisePilot, independent_entries
from particledaps.data.measurements import with_its_noise
from particledaps.diffusion.analytic import GaussianDenoiser
from particledaps.operators.gaussian_blur import GaussianBlur
from particledaps.operators.inpainting import RandomInpainting
from particledaps.operators.measured import leave_out
from particledaps.operators.operator import Operator
from particledaps.operators.phase_retrieval import PhaseRetrieval, mirror_frequencies

IMAGE = (0.5 * normal(1, 3, 64, 64, dtype=torch.float32)).clamp(-1, 1)


class Rows(Operator):
    """``A(x) = W x``."""

    name = "rows"
    linear = True

    def __init__(self, matrix, noise_sigma):
        self.matrix, self.noise_sigma = matrix, noise_sigma

    def __call__(self, x):
        return x.flatten(1) @ self.matrix.T.to(x)

    def measurement_shape(self, image_shape):
        return (len(self.matrix),)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("sigma", [0.01, 0.03, 0.05, 0.1, 0.2])
@pytest.mark.parametrize("gaps", [False, True])
def test_conjugate_pairs_tell_the_noise(sigma, gaps):
    truth = PhaseRetrieval(noise_sigma=sigma)
    y = truth.measure(IMAGE, generator())
    if gaps:
        y[..., 40:50, :] = torch.nan
    operator, filled = leave_out(PhaseRetrieval(), y[0])  # built with another value
    found, noise = with_its_noise(operator, filled[None])
    assert noise == "shown"
    assert found.noise_sigma == pytest.approx(sigma, rel=0.02)  # 13 800 pairs: 0.6 %
    own = leave_out(truth, y[0])[0].noise_floor(filled[None]).mean
    torch.testing.assert_close(found.noise_floor(filled[None]).mean, own, rtol=0.03, atol=0)


def test_the_floor_at_the_truth_is_the_loss_at_the_truth():
    y = PhaseRetrieval(noise_sigma=0.13).measure(IMAGE, generator(1))
    operator, _ = with_its_noise(PhaseRetrieval(), y)
    floor = operator.noise_floor(y)
    assert abs(operator.loss(IMAGE, y) - floor.mean) < 4 * floor.std


@pytest.mark.parametrize("sigma", [0.02, 0.2])
def test_pixels_that_a_mask_leaves_out_tell_the_noise(sigma):
    drawn = RandomInpainting(noise_sigma=sigma).for_image((3, 64, 64), generator())
    y = drawn.measure(IMAGE, generator(2))
    found, _ = with_its_noise(drawn.with_noise(0.05), y)
    assert found.noise_sigma == pytest.approx(sigma, rel=0.03)
    gappy = y[0].clone()
    gappy[:, :5] = torch.nan
    operator, filled = leave_out(drawn.with_noise(0.05), gappy)
    own, _ = with_its_noise(operator, filled[None])
    assert own.noise_sigma == pytest.approx(sigma, rel=0.03)
    assert own.noise_floor(filled[None]).mean == pytest.approx(
        leave_out(drawn, gappy)[0].noise_floor(filled[None]).mean.item(), rel=0.03
    )


def symmetrised(y):
    y = torch.fft.ifftshift(y, dim=(-2, -1))
    return torch.fft.fftshift((y + mirror_frequencies(y)) / 2, dim=(-2, -1))


def test_what_tells_no_noise_is_told_apart():
    blur = GaussianBlur()
    assert with_its_noise(blur, blur.measure(IMAGE, generator()))[1] == "silent"
    assert (
        with_its_noise(PhaseRetrieval(), symmetrised(PhaseRetrieval().measure(IMAGE, generator())))[1] == "symmetrised"
    )


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.3])
def test_beside_the_image_the_noise_of_a_gaussian_problem(sigma):
    """The effective noise of a prior that can say every image is the noise: 400 entries tell it to 4 %."""
    covariance = torch.eye(16) * 0.25
    prior = prior_of(GaussianDenoiser(torch.zeros(1, 4, 4), covariance), (1, 4, 4))
    operator = Rows(torch.randn(400, 16, generator=generator(1), dtype=torch.float64), sigma)
    y = operator.measure(0.5 * torch.randn(1, 1, 4, 4, generator=generator(2)), generator(3))
    assert NoisePilot(prior, torch.device("cpu"))(operator.with_noise(1.0), y) == pytest.approx(sigma, rel=0.1)


def test_half_of_symmetrised_entries_count():
    """Their noise floor is that of means of pairs: sigma is root two times the noise of an entry."""
    y = symmetrised(PhaseRetrieval(noise_sigma=0.1).measure(IMAGE, generator()))
    count, constant = independent_entries(PhaseRetrieval(), y)
    assert constant == pytest.approx(0, abs=1e-3) and count == pytest.approx(y[0].numel() / 2, rel=0.01)
    loss = PhaseRetrieval().loss(IMAGE, y).item()
    assert (loss / count) ** 0.5 == pytest.approx(0.1, rel=0.03)


def measurement_of(folder):
    return json.loads((folder / "metrics.json").read_text())["measurement"]["per_image"][0]


@pytest.mark.parametrize("sigma", [0.02, 0.15])
def test_a_run_takes_the_noise_from_the_file(tiny_run, sigma):
    assert tiny_run("data.end_id=1", "name=source", f"task.noise_sigma={sigma}").status == 0
    source = tiny_run.save_dir / "source"
    given = ("data.dir=null", f"data.measurement={source / 'floats' / '00000.npz'}", "task.noise_sigma=auto")
    outcome = tiny_run(*given)
    assert outcome.status == 0, outcome.err
    found, configured = measurement_of(tiny_run.folder), measurement_of(source)
    assert found["noise_sigma"] == pytest.approx(sigma, rel=0.1)  # 864 pairs
    assert configured["noise_sigma"] == sigma
    assert found["noise_floor"] == pytest.approx(configured["noise_floor"], rel=0.1)
    assert f"noise_sigma={found['noise_sigma']:.3g}, as the measurement shows it" in outcome.out
    metadata = json.loads((tiny_run.folder / "metrics.json").read_text())["metadata"]
    assert metadata["conventions"]["noise_sigma"] is None


def test_a_whole_number_is_a_noise_level(tiny_run):
    assert tiny_run("data.end_id=1", "task.noise_sigma=1").status == 0
    assert measurement_of(tiny_run.folder)["noise_sigma"] == 1


def test_a_file_that_tells_no_noise_has_an_effective_one(tiny_run):
    blurred = ("data.end_id=1", "task=gaussian_blur", "task.noise_sigma=0.1")
    assert tiny_run(*blurred, "name=source").status == 0
    path = tiny_run.save_dir / "source" / "floats" / "00000.npz"
    outcome = tiny_run("data.dir=null", f"data.measurement={path}", "task=gaussian_blur", "task.noise_sigma=auto")
    assert outcome.status == 0, outcome.err
    found = measurement_of(tiny_run.folder)
    assert found["noise"] == "effective" and 0.05 < found["noise_sigma"] < 2  # random weights say next to nothing
    assert "effective: what the prior's decoder cannot say counts as noise" in outcome.out
    assert found["noise_floor"] == pytest.approx(found["noise_sigma"] ** 2 * 3 * 16 * 16, rel=1e-4)


def test_a_file_of_equal_entries_has_none(tiny_run, tmp_path):
    np.savez(tmp_path / "y.npz", y=np.zeros((1, 3, 16, 16), np.float32))
    given = ("data.dir=null", f"data.measurement={tmp_path / 'y.npz'}", "task=gaussian_blur", "task.noise_sigma=auto")
    outcome = tiny_run(*given)
    assert outcome.status != 0 and "all of its entries are equal; say task.noise_sigma=NUMBER" in outcome.out
