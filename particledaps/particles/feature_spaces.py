r"""Spaces in which distances between particles are measured, and the force along them (Zilberstein et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from particledaps.checks import SettingsError
from particledaps.operators.operator import IDENTITY, Operator, Symmetry

if TYPE_CHECKING:
    from particledaps.priors.prior import Prior

SMALLEST_BANDWIDTH = 1e-12

ImageFeatures = Callable[["torch.Tensor"], "torch.Tensor"]
"""``(B, C, H, W)`` in [-1, 1] -> ``(B, F)``, differentiable."""


class Force(NamedTuple):
    """Normalised force ``(P, F)`` on each feature vector, and the distances ``(P, P)``."""

    force: torch.Tensor
    distances: torch.Tensor


def stein_force(features: torch.Tensor, others: torch.Tensor | None = None) -> Force:
    r""":math:`\sum_j \frac{2}{h_i} w_{ij} (f_i - f_j) / \sum_j w_{ij}`, sums and medians over ``j != i``.

    Identical particles feel no force and give no NaN; for N = 2 the force is ``2 ln 2 (f_1 - f_2) / d^2``.

    Args:
        features: ``(P, F)``, P >= 2.
        others: ``(G, P, F)`` features of each particle under G symmetries; particle i sees the nearest of particle
            j's. None: the particles themselves.
    """
    count = len(features)
    images = features[None] if others is None else others
    offsets = features[None, :, None] - images[:, None]  # (G, P, P, F)
    squares = offsets.square().sum(-1)
    nearest = squares.argmin(0)
    squares = squares.gather(0, nearest[None])[0]
    offsets = offsets.gather(0, nearest[None, ..., None].expand(1, -1, -1, offsets.shape[-1]))[0]
    apart = ~torch.eye(count, dtype=torch.bool, device=features.device)
    distances = squares.sqrt() * apart
    median = distances[apart].reshape(count, count - 1).quantile(0.5, dim=1)  # mean of the two middle values
    bandwidth = (median.square() / math.log(count)).clamp(min=SMALLEST_BANDWIDTH)[:, None]
    weights = (-squares / bandwidth).exp() * apart
    total = weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    force = (2 / bandwidth * weights / total)[..., None] * offsets
    return Force(force.sum(1), distances)


class FeatureSpace(Protocol):
    """Where distances are measured."""

    name: str

    def force(self, z: torch.Tensor) -> Force:
        """Force pulled back to latents: ``force`` has the shape of ``z`` ``(P, c, h, w)``."""
        ...

    def distances(self, z: torch.Tensor) -> torch.Tensor:
        """Pairwise distances ``(P, P)``."""
        ...


class LatentSpace:
    """The latent itself; no decoder call (two for the quotient kernel).

    Args:
        prior: encodes symmetric images for the quotient kernel.
        symmetries: of the operator; more than the identity makes the kernel a quotient.
    """

    name = "latent"

    def __init__(self, prior: Prior, symmetries: Sequence[Symmetry] = (IDENTITY,)) -> None:
        self.prior, self.symmetries = prior, tuple(symmetries)

    def force(self, z: torch.Tensor) -> Force:
        """See :class:`FeatureSpace`."""
        others = [z.flatten(1)]
        if len(self.symmetries) > 1:
            x = self.prior.decode(z)
            others += [self.prior.encode(s.apply(x)).flatten(1) for s in self.symmetries[1:]]
        force, distances = stein_force(z.flatten(1), torch.stack(others))
        return Force(force.reshape(z.shape), distances)

    def distances(self, z: torch.Tensor) -> torch.Tensor:
        """See :class:`FeatureSpace`."""
        return self.force(z).distances


class ImageSpace:
    """Features of the decoded image: two forwards of decoder and feature network and one backward of each.

    Args:
        prior: its decoder.
        features: of images.
        name: for records.
        symmetries: of the operator; more than the identity makes the kernel a quotient.
        odd_under: if set, features see the odd part ``(x - g(x)) / 2`` only, where the twins differ.
    """

    def __init__(
        self,
        prior: Prior,
        features: ImageFeatures,
        name: str,
        symmetries: Sequence[Symmetry] = (IDENTITY,),
        odd_under: Symmetry | None = None,
    ) -> None:
        self.prior = prior
        self.features = features
        self.name = name
        self.symmetries, self.odd_under = tuple(symmetries), odd_under

    def force(self, z: torch.Tensor) -> Force:
        """See :class:`FeatureSpace`."""
        size = self.prior.decode_batch or len(z)
        force, distances = self._in_features(z)
        pulled = [self._pull_back(*part) for part in zip(z.split(size), force.split(size), strict=True)]
        return Force(torch.cat(pulled), distances)

    def distances(self, z: torch.Tensor) -> torch.Tensor:
        """See :class:`FeatureSpace`; no gradient."""
        return self._in_features(z).distances

    def _in_features(self, z: torch.Tensor) -> Force:
        with torch.no_grad():
            parts = [self.prior.decode(part) for part in z.split(self.prior.decode_batch or len(z))]
            others = torch.stack([torch.cat([self._features(s.apply(x)) for x in parts]) for s in self.symmetries])
            return stein_force(others[0], others)

    def _pull_back(self, z: torch.Tensor, force: torch.Tensor) -> torch.Tensor:
        x, pullback = self.prior.decode_with_pullback(z)
        with torch.enable_grad():
            leaf = x.requires_grad_(True)
            (gradient,) = torch.autograd.grad(self._features(leaf), leaf, force)
        return pullback(gradient)

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        return self.features(x if self.odd_under is None else (x - self.odd_under.apply(x)) / 2)


def low_pass(x: torch.Tensor, side: int = 16) -> torch.Tensor:
    """Pixel features: the image averaged down to at most ``side x side``, flattened, per-pixel scale."""
    height, width = (min(side, n) for n in x.shape[-2:])
    return torch.nn.functional.adaptive_avg_pool2d(x, (height, width)).flatten(1)


class Keys(Protocol):
    """The part of a configuration that names a space."""

    features: str
    kernel: str
    dino_model: str
    dino_path: str | None


def build_feature_space(settings: Keys, prior: Prior, operator: Operator, device: torch.device) -> FeatureSpace:
    """The space that ``repulsion_features`` and ``repulsion_kernel`` name.

    Raises:
        SettingsError: DINO is asked for without weights, or the kernel needs a symmetry that the operator lacks.
        PriorError: DINO's weights are wrong.
    """
    from particledaps.priors import dino  # loads timm

    kind, weights = settings.features, None
    odd = settings.kernel == "odd"
    if kind in ("auto", "dino"):
        weights = dino.dino_weights(settings.dino_model, settings.dino_path)
        if weights is None and kind == "dino":
            raise SettingsError(
                f"repulsion_features=dino: no weights of {settings.dino_model} in the hub's cache; set "
                "repulsion_dino_path=FILE, or use repulsion_features=latent or pixel, which need none"
            )
        kind = "dino" if weights is not None else "pixel" if odd else "latent"
    symmetries = operator.symmetries()
    if settings.kernel != "plain" and len(symmetries) < 2:
        raise SettingsError(
            f"repulsion_kernel={settings.kernel}: the operator {operator.name} has no symmetry; use plain"
        )
    seen = symmetries if settings.kernel == "quotient" else (IDENTITY,)
    if kind == "latent":
        return LatentSpace(prior, seen)
    features = _dino(settings.dino_model, weights, device) if kind == "dino" else low_pass
    return ImageSpace(prior, features, kind, seen, symmetries[1] if odd else None)


@cache
def _dino(model: str, weights: Path, device: torch.device) -> ImageFeatures:
    """The network; it is loaded once a process."""
    from particledaps.priors.dino import DinoFeatures

    return DinoFeatures(model, weights).to(device)
