r"""How far two sets of images are apart, by their features: Frechet distance; kernel distance with its error.

A distance is named after its features; it is "FID" with Inception's own weights only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

BLOCK = 1000
"""Rows of a kernel matrix that are held at once."""


class KernelDistance(NamedTuple):
    """A value and its standard error."""

    value: float
    standard_error: float


def needed_images(dim: int) -> int:
    """Images of each set that a Frechet distance of ``dim`` features needs: 2 ``dim``, or a covariance is singular."""
    return 2 * dim


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    r""":math:`|\mu_a - \mu_b|^2 + \mathrm{tr}(C_a + C_b - 2 (C_a^{1/2} C_b C_a^{1/2})^{1/2})` (Heusel et al. 2017).

    Biased upwards by about :math:`1 / N`: compare figures of equal N, beside their floor.

    Args:
        a: ``(N, d)`` features of one set.
        b: ``(M, d)`` of the other.

    Raises:
        ValueError: a set has fewer than 2 d images.
    """
    _check_pair(a, b)
    dim = a.shape[1]
    if min(len(a), len(b)) < needed_images(dim):
        raise ValueError(
            f"a Frechet distance of {dim} features needs {needed_images(dim)} images in each set, "
            f"not {min(len(a), len(b))}"
        )
    a, b = a.double(), b.double()
    own, other = a.T.cov(), b.T.cov()
    root = _square_root(own)
    cross = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return (means + own.trace() + other.trace() - 2 * cross).item()


def _square_root(covariance: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def kernel_distance(a: torch.Tensor, b: torch.Tensor) -> KernelDistance:
    r"""KID (Binkowski et al. 2018): the unbiased squared maximum mean discrepancy with a cubic kernel.

    With :math:`k(x, y) = (x^T y / d + 1)^3`:

    .. math:: \frac{\sum_{i \ne j} k(a_i, a_j)}{N (N - 1)} + \frac{\sum_{i \ne j} k(b_i, b_j)}{M (M - 1)}
        - \frac{2 \sum_{ij} k(a_i, b_j)}{N M}

    It may be negative. The standard error is that of its first-order term: with
    :math:`h(a_i) = \overline{k(a_i, a)} - \overline{k(a_i, b)}` and the same for b it is
    :math:`2 \sqrt{\mathrm{var}\, h(a) / N + \mathrm{var}\, h(b) / M}`.

    Args:
        a: ``(N, d)`` features of one set, N at least 2.
        b: ``(M, d)`` of the other.
    """
    _check_pair(a, b)
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a kernel distance needs 2 images in each set, not {min(len(a), len(b))}")
    a, b = a.double(), b.double()
    within_a, within_b = _mean_kernel(a), _mean_kernel(b)
    across_a, across_b = _mean_kernel(a, b), _mean_kernel(b, a)
    value = within_a.mean() + within_b.mean() - 2 * across_a.mean()
    spread = (within_a - across_a).var() / len(a) + (within_b - across_b).var() / len(b)
    return KernelDistance(value.item(), 2 * spread.sqrt().item())


def _mean_kernel(x: torch.Tensor, others: torch.Tensor | None = None) -> torch.Tensor:
    """Mean kernel of each row of ``x`` with ``others``; with None: with the other rows of ``x``."""
    means = []
    for rows in x.split(BLOCK):
        total = (rows @ (x if others is None else others).T / x.shape[1] + 1).pow(3).sum(1)
        if others is None:
            means.append((total - (rows.square().sum(1) / x.shape[1] + 1).pow(3)) / (len(x) - 1))
        else:
            means.append(total / len(others))
    return torch.cat(means)


def nearest(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Distance of each row of ``a`` ``(N, d)`` to its nearest row of ``b``, ``(N,)``."""
    _check_pair(a, b)
    return torch.cat([torch.cdist(rows, b).amin(1) for rows in a.split(BLOCK)])


def memorisation_rate(
    generated: torch.Tensor, train: torch.Tensor, held_out: torch.Tensor, share: float = 0.01
) -> float:
    """Share of generated images that lie nearer to a training image than all but ``share`` of held-out images do.

    Of a model that memorises nothing it is about ``share``.
    """
    threshold = nearest(held_out, train).quantile(share)
    return (nearest(generated, train) < threshold).double().mean().item()


def _check_pair(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features of shapes {tuple(a.shape)} and {tuple(b.shape)} are not of one kind")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("some features are not finite")
