"""Linear-Gaussian problems with known answers, and noise sources that lay a sampler's linear map bare."""

import numpy as np
import torch
from torch import nn

from particledaps.diffusion.analytic import GaussianDenoiser
from particledaps.operators.operator import Operator
from particledaps.priors.autoencoder import IdentityAutoencoder
from particledaps.priors.prior import Prior

F64 = torch.float64


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def correlated(eigenvalues, seed=0):
    """A symmetric matrix with these eigenvalues in a random orthonormal basis."""
    values = torch.tensor(eigenvalues, dtype=F64)
    basis = torch.linalg.qr(normal(len(values), len(values), seed=seed)).Q
    return basis @ torch.diag(values) @ basis.T


def latent(values):
    """Rows of numbers ``(P, n)`` as latents ``(P, n, 1, 1)``; one row ``(n,)`` as ``(n, 1, 1)``."""
    return torch.as_tensor(values, dtype=F64)[..., None, None]


class MatrixOperator(Operator):
    """``A(x) = W x`` on flattened images."""

    name = "matrix"

    def __init__(self, matrix, noise_sigma=0.1):
        self.matrix, self.noise_sigma = torch.as_tensor(matrix, dtype=F64), noise_sigma

    def __call__(self, x):
        return x.flatten(1) @ self.matrix.T

    def measurement_shape(self, image_shape):
        return (len(self.matrix),)


class MatrixAutoencoder(nn.Module):
    """``decode(z) = M z`` on flattened latents."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = matrix

    def encode(self, x):
        return torch.linalg.solve(self.matrix, x.flatten(1).T).T.reshape(x.shape)

    def decode(self, z):
        return (z.flatten(1) @ self.matrix.T).reshape(z.shape)


def prior_of(denoiser, shape, autoencoder=None):
    return Prior("analytic", autoencoder or IdentityAutoencoder(), denoiser, shape, shape)


def gaussian_prior(mean, covariance, autoencoder=None):
    """Prior ``N(mean, covariance)`` over latents ``(n, 1, 1)``."""
    mean = latent(mean)
    return prior_of(GaussianDenoiser(mean, covariance), tuple(mean.shape), autoencoder)


class SharedStreams:
    """White noise for all particles from one generator: quick where many particles are wanted."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, particle_ids, purpose, level, like):
        return torch.randn(like.shape, generator=self.generator, dtype=like.dtype)


class ImpulseStreams:
    """Noise in which particle ``p`` has a single 1, at element ``p % n`` of the draw number ``p // n``.

    On a linear problem the particles then are the columns of the map from all noise to the answer, and a last
    particle that no draw reaches is the answer without noise.
    """

    def __init__(self):
        self.draws = 0

    def normal(self, particle_ids, purpose, level, like):
        noise = torch.zeros_like(like)
        size = like[0].numel()
        rows = self.draws * size + torch.arange(size)
        noise.flatten(1)[rows, torch.arange(size)] = 1
        self.draws += 1
        return noise


def stream_chain_noise(state, level, like):
    """A stand-in for ``level_posterior.chain_noise`` that draws a whole batch at once from ``state.streams``."""

    def draw():
        return state.streams.normal(state.ids, "mcmc", level, like)

    def draw_uniform():
        return torch.rand(len(state), generator=state.streams.generator, dtype=like.dtype)

    return draw, draw_uniform


def moments(columns):
    """Mean and covariance of the answer from the run of :class:`ImpulseStreams`."""
    rows = columns.flatten(1).numpy()
    deviations = rows[:-1] - rows[-1]
    return rows[-1], deviations.T @ deviations


def relative_error(value, expected):
    value, expected = np.asarray(value), np.asarray(expected)
    return np.linalg.norm(value - expected) / np.linalg.norm(expected)
