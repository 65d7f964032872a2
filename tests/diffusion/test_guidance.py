import pytest
import torch
from analytic import F64, normal
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from particledaps.diffusion.guidance import GuidedDenoiser

Z = normal(5, 4, 6, 6)
SIGMA = torch.tensor([0.2, 0.9, 1.0, 2.0, 7.0], dtype=F64)


class Constant:
    """A denoiser that pulls towards an image, and counts its calls."""

    def __init__(self, seed):
        self.target, self.calls = normal(1, 4, 6, 6, seed=seed), 0

    def __call__(self, z, sigma):
        self.calls += 1
        s = torch.as_tensor(sigma, dtype=z.dtype).reshape(-1, 1, 1, 1)
        return (z + s * self.target) / (1 + s)


def pair():
    return Constant(1), Constant(2)


def test_scale_0_is_the_negative_and_1_the_condition():
    toward, away = pair()
    assert torch.equal(GuidedDenoiser(toward, away, 0.0)(Z, 1.5), away(Z, 1.5)) and toward.calls == 0
    toward, away = pair()
    assert torch.equal(GuidedDenoiser(toward, away, 1.0)(Z, 1.5), toward(Z, 1.5)) and away.calls == 0


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_the_condition_as_negative_changes_nothing(rescale):
    toward, _ = pair()
    torch.testing.assert_close(GuidedDenoiser(toward, toward, 7.5, rescale)(Z, SIGMA), toward(Z, SIGMA))


def test_it_is_linear_in_the_scale():
    toward, away = pair()
    guided = GuidedDenoiser(toward, away, 2.5)(Z, SIGMA)
    torch.testing.assert_close(guided, 2.5 * toward(Z, SIGMA) - 1.5 * away(Z, SIGMA))


@pytest.mark.parametrize("rescale", [0.0, 0.3, 0.7, 1.0])
def test_rescale_is_that_of_diffusers_on_the_noise(rescale):
    toward, away = pair()
    s = SIGMA.reshape(-1, 1, 1, 1)

    def noise(output):
        return (Z - output) / s

    free, condition = noise(away(Z, SIGMA)), noise(toward(Z, SIGMA))
    expected = rescale_noise_cfg(free + 4.0 * (condition - free), condition, rescale)
    torch.testing.assert_close(noise(GuidedDenoiser(toward, away, 4.0, rescale)(Z, SIGMA)), expected)


def test_rescale_is_per_sample_and_not_that_of_v():
    toward, away = pair()
    guided = GuidedDenoiser(toward, away, 4.0, 0.7)
    rows = torch.cat([guided(Z[i : i + 1], SIGMA[i]) for i in range(5)])
    torch.testing.assert_close(guided(Z, SIGMA), rows)
    s = SIGMA.reshape(-1, 1, 1, 1)
    root = (1 + s.square()).sqrt()

    def velocity(output):  # sqrt(abar) eps - sqrt(1 - abar) x0
        return (Z - output) / s / root - s / root * output

    free, condition = velocity(away(Z, SIGMA)), velocity(toward(Z, SIGMA))
    on_v = rescale_noise_cfg(free + 4.0 * (condition - free), condition, 0.7)
    assert not torch.allclose(velocity(guided(Z, SIGMA)), on_v, rtol=1e-2)


def test_the_interval_is_half_open_in_sigma():
    toward, away = pair()
    guided = GuidedDenoiser(toward, away, 3.0, interval=(0.9, 2.0))(Z, SIGMA)
    inside = torch.tensor([False, True, True, False, False])
    torch.testing.assert_close(guided[inside], GuidedDenoiser(toward, away, 3.0)(Z, SIGMA)[inside])
    assert torch.equal(guided[~inside], toward(Z, SIGMA)[~inside])


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_an_empty_interval_is_the_condition_everywhere(scale):
    toward, away = pair()
    guided = GuidedDenoiser(toward, away, scale, interval=(1.0, 1.0))
    for sigma in (1.0, SIGMA):
        assert torch.equal(guided(Z, sigma), toward(Z, sigma))
    assert away.calls == 0


def test_of_parts_the_first_one_decides():
    toward = lambda z, sigma: z * 0 + 1  # noqa: E731
    away = lambda z, sigma: z * 0  # noqa: E731
    guided = GuidedDenoiser(toward, away, 3.0, 0.5, (0.5, 2.0), parts=(3, 1))
    output = guided(Z[:2], torch.tensor([[1.0, 5.0], [5.0, 1.0]], dtype=F64))
    assert not torch.allclose(output[0], torch.ones_like(output[0])) and torch.equal(
        output[1], torch.ones_like(output[1])
    )
