"""Parts of the latents with noise of their own: the loop against its closed form on an exact joint denoiser."""

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
import torch
from analytic import F64, MatrixAutoencoder, MatrixOperator, correlated, latent, normal, prior_of, relative_error
from sampler_support import (
    MATRIX,
    PRIOR_COVARIANCE,
    PRIOR_MEAN,
    TAU,
    Recorder,
    Y,
    impulse_response,
    measurement,
    settings,
)

from particledaps.diffusion.analytic import GaussianDenoiser
from particledaps.diffusion.mcmc import ChainSettings
from particledaps.paths.schedules import edm_path
from particledaps.priors.errors import PriorError
from particledaps.priors.prior import Prior
from particledaps.priors.transforms import TwoScaleTransform
from particledaps.streams import ParticleStreams
from sampler import LatentDAPS, build_sampler_settings

PARTS = (2, 1)
CHAIN = ChainSettings("langevin", 7, 0.02)
PATH = torch.stack([edm_path(4, 4.0, 0.5), torch.tensor([3.0, 0.6, 0.3, 0.3, 0.0], dtype=F64)], dim=1)
"""The second part leads, and then is held at 0.3."""


def inner_path(sigma):
    """Three Euler steps of each part from its own level."""
    if not isinstance(sigma, torch.Tensor):
        return edm_path(3, sigma, 0.05)
    return torch.stack([edm_path(3, own, 0.05) for own in sigma[0].tolist()], dim=1)


def two_parts():
    denoiser = GaussianDenoiser(latent(PRIOR_MEAN), PRIOR_COVARIANCE, PARTS)
    return replace(prior_of(denoiser, (3, 1, 1)), parts=PARTS), MatrixOperator(MATRIX)


def of_parts(path=PATH, **changes):
    return settings(CHAIN, path=path, inner_path=inner_path, step_size_min_ratio=1.0, **changes)


def spread(row):
    return np.diag(np.repeat(np.asarray(row), PARTS))


def ode_map(row):
    """``z0_hat = G z + c`` of three Euler steps of the joint ODE."""
    gain, shift, covariance = np.eye(3), np.zeros(3), PRIOR_COVARIANCE.numpy()
    nodes = inner_path(torch.as_tensor(row)[None]).numpy()
    for here, there in zip(nodes[:-1], nodes[1:], strict=True):
        shrink = covariance @ np.linalg.inv(covariance + spread(here) ** 2)
        slope = np.linalg.inv(spread(here)) @ (np.eye(3) - shrink)
        step = spread(there) - spread(here)
        offset = -np.linalg.inv(spread(here)) @ (PRIOR_MEAN - shrink @ PRIOR_MEAN)
        gain, shift = gain + step @ slope @ gain, shift + step @ (slope @ shift + offset)
    return gain, shift


def recursion():
    """Mean and covariance of the answer of :func:`of_parts`, level by level, with Langevin steps by hand."""
    levels = PATH.numpy()
    mean, covariance = np.zeros(3), spread(levels[0]) ** 2
    for row, following in zip(levels[:-1], levels[1:], strict=True):
        gain, shift = ode_map(row)
        within = np.linalg.inv(spread(row) ** 2)
        precision, information = MATRIX.T @ MATRIX / TAU**2 + within, MATRIX.T @ Y / TAU**2
        step = CHAIN.step_size
        kept = np.eye(3) - step * precision
        joint, offset, noise = np.eye(3), np.zeros(3), np.zeros((3, 3))  # x = joint z0_hat + offset + noise
        for _ in range(CHAIN.num_steps):
            joint, offset = kept @ joint + step * within, kept @ offset + step * information
            noise = kept @ noise @ kept.T + 2 * step * np.eye(3)
        mean = joint @ (gain @ mean + shift) + offset
        covariance = joint @ gain @ covariance @ gain.T @ joint.T + noise
        answer, covariance = (mean, covariance), covariance + spread(following) ** 2
    return answer


def test_the_loop_of_two_parts_is_its_linear_gaussian_recursion(monkeypatch):
    found = impulse_response(of_parts(), monkeypatch, 7, two_parts())
    for value, expected in zip(found, recursion(), strict=True):
        assert relative_error(value, expected) < 1e-9


def sampled(run_settings, prior=None, hooks=(), count=3):
    own, operator = two_parts()
    loop = LatentDAPS(prior or own, operator, run_settings, hooks)
    return loop.sample(measurement(), ParticleStreams(5, 0), range(count))


def test_equal_columns_are_one_level_bit_for_bit():
    path = edm_path(4, 4.0, 0.5)
    together = sampled(of_parts(path))
    apart = sampled(of_parts(path[:, None].expand(-1, 2)))
    torch.testing.assert_close(apart.z0_y, together.z0_y, rtol=1e-12, atol=1e-12)
    plain = sampled(of_parts(path), replace(two_parts()[0], parts=(3,)))
    assert torch.equal(plain.z0_y, together.z0_y)


def test_hooks_see_a_level_a_part_and_go_by_the_declared_one():
    for part in (0, 1):
        recorder = Recorder()
        sampled(of_parts(gate_part=part), hooks=[recorder])
        states = recorder.seen["before_ode"]
        assert all(state.sigma.shape == (1, 2) for state in states)
        assert [state.gate_sigma for state in states] == PATH[:-1, part].tolist()
    assert of_parts(gate_part=1).gate_path.tolist() == PATH[:, 1].tolist()


def test_a_part_that_is_held_is_renoised_at_its_own_level():
    recorder = Recorder()
    sampled(of_parts(), hooks=[recorder], count=4000)
    states = recorder.seen["before_ode"]
    for before, state in zip(recorder.seen["before_renoise"], states[1:], strict=False):
        noise = (state.z - before.z0_y).flatten(1).std(0)
        expected = torch.tensor([state.sigma[0, 0]] * 2 + [state.sigma[0, 1]])
        torch.testing.assert_close(noise, expected.to(noise), rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("path", "fragment"),
    [
        (PATH[:, [0, 1, 1]], "has 3 columns, analytic has 2 parts"),
        (torch.tensor([[2.0, 1.0], [1.0, 0.0], [0.0, 0.0]]), "0 before its end"),
    ],
)
def test_paths_that_do_not_fit(path, fragment):
    with pytest.raises(ValueError, match=fragment):
        sampled(of_parts(path))


@pytest.mark.parametrize("parts", [(2, 2), (3, 0), (4,)])
def test_parts_that_do_not_add_up(parts):
    with pytest.raises(PriorError, match="do not add up to the 3 channels"):
        replace(two_parts()[0], parts=parts)


def test_the_built_inner_path_has_a_column_a_part_and_holds_a_clean_one():
    from particledaps.settings.schema import AnnealingSettings, ChainConfig, CompatSettings, OdeSettings

    chain = ChainConfig("langevin", 3, 1e-3, 1.0, 0.0, 0.1)
    annealing, ode = AnnealingSettings("edm", 4, 3.0, 0.1), OdeSettings("edm", 3, 0.01, "euler")
    built = build_sampler_settings(annealing, ode, chain, CompatSettings())
    path = built.inner_path(torch.tensor([[2.0, 0.005]], dtype=F64))
    assert torch.equal(path[:, 0], built.inner_path(2.0))
    assert path[:, 1].tolist() == [0.005, 0.005, 0.005, 0.0]


def test_redundant_parts_follow_the_image_after_the_chain():
    shape, transform = (5, 2, 2), TwoScaleTransform()
    covariance = correlated(np.linspace(0.2, 2.0, 20), seed=3)
    denoiser = GaussianDenoiser(normal(*shape, seed=1), covariance, (4, 1))
    prior = Prior("redundant", transform, denoiser, (1, 4, 4), shape, parts=(4, 1), redundant=True)
    operator = MatrixOperator(normal(6, 16, seed=2), 0.3)
    y = operator(normal(1, 1, 4, 4, seed=4))
    path = torch.stack([edm_path(3, 2.0, 0.3), edm_path(3, 1.0, 0.2)], dim=1)
    for redundant in (True, False):
        own = replace(prior, redundant=redundant)
        state = LatentDAPS(own, operator, of_parts(path)).sample(y, ParticleStreams(1, 0), range(2))
        agrees = torch.allclose(state.z0_y, transform.encode(transform.decode(state.z0_y)), atol=1e-12)
        assert agrees == redundant


def test_one_part_is_the_plain_prior_whatever_its_autoencoder():
    prior, operator = two_parts()
    mixed = replace(prior, autoencoder=MatrixAutoencoder(correlated([0.5, 1.0, 1.5], seed=2)), parts=())
    state = LatentDAPS(mixed, operator, of_parts(edm_path(4, 4.0, 0.5))).sample(
        measurement(), ParticleStreams(5, 0), range(2)
    )
    assert isinstance(state.sigma, float) and dataclasses.replace(state).gate_sigma == state.sigma
