r"""Hook: particles of one measurement push each other apart in a feature space (RLSD, Zilberstein et al. 2024).

With features :math:`f_i` of particle i, :math:`d_{ij} = |f_i - f_j|` and the bandwidth
:math:`h_i = \mathrm{median}_{j \ne i}(d_{ij})^2 / \ln N`, the term of particle i is

.. math:: r_i = -\nabla_{z_i} \log \sum_{j \ne i} e^{-d_{ij}^2 / h_i}
    = J_i^T \frac{\sum_j \frac{2}{h_i} w_{ij} (f_i - f_j)}{\sum_j w_{ij}}, \qquad w_{ij} = e^{-d_{ij}^2 / h_i}

with :math:`h_i` held fixed and :math:`J_i` the Jacobian of the features. :class:`diffusion.pfode.DiffusionPFODE`
adds ``scale * r`` to the score; the scale is applied there and nowhere else.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch

from diffusion.denoiser import score
from diffusion.mcmc import per_particle
from diffusion.paths import first_level_at_most
from operators.operator import IDENTITY, Symmetry
from priors.prior import Prior
from state import NUM_TIMESTEPS, Hook, Info, State

SCHEDULES = ("constant", "linear", "cosine")
ESTIMATES = ("z0_hat", "z_t")
KERNELS = ("plain", "quotient", "odd")
UNITS = ("ratio", "raw")
SMALLEST_BANDWIDTH = 1e-12
SMALLEST_NORM = 1e-20

ImageFeatures = Callable[[torch.Tensor], torch.Tensor]
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
        self.prior, self.features, self.name = prior, features, name
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


@dataclass(frozen=True)
class RepulsionSettings:
    """When and how much.

    Attributes:
        scale: strength at the start; 0 is off.
        unit: ``ratio``: ``|scale * r| / |score|`` of each particle at the level's sigma; ``raw``: the factor itself.
        sigma_break: active while sigma > sigma_break.
        schedule: over t from 1000 down to the first level with sigma <= sigma_break: ``constant``, ``linear`` or
            ``cosine`` (the last two reach 0 there).
        estimate: repel clean estimates ``z0_hat`` (Tweedie at this level) or the scaled noisy latents ``z_t``
            ``/ sqrt(1 + sigma^2)`` (RLSD's first version; a decoder then sees noise). Either way one denoiser call a
            level gives the score of the ratio; the feature space adds its own cost.
        stop_at: off from ``t <= stop_at`` on (optimisation has begun).
        log: write distances at every level, also where repulsion is off.
    """

    scale: float = 0.0
    unit: str = "ratio"
    sigma_break: float = 1.0
    schedule: str = "linear"
    estimate: str = "z0_hat"
    stop_at: float = -1.0
    log: bool = False


def schedule_factor(schedule: str, t: float, t_break: float) -> float:
    """Factor in [0, 1]: 1 at ``t`` = 1000; linear and cosine fall to 0 at ``t_break``."""
    progress = (t - t_break) / (NUM_TIMESTEPS - t_break)
    if schedule == "linear":
        return progress
    return 1.0 if schedule == "constant" else (1 - math.cos(math.pi * progress)) / 2


class Repulsion(Hook):
    """Sets ``state.drift`` before the ODE and logs one row a level.

    Args:
        prior: its denoiser gives the score and the clean estimate.
        space: where distances are measured.
        settings: when and how much.
        path: the annealing sigmas ``(K + 1,)``.
    """

    def __init__(self, prior: Prior, space: FeatureSpace, settings: RepulsionSettings, path: torch.Tensor) -> None:
        self.prior, self.space, self.settings = prior, space, settings
        passed = first_level_at_most(path, settings.sigma_break)
        self.t_break = 0.0 if passed is None else NUM_TIMESTEPS * (1 - passed / (len(path) - 1))

    def strength(self, state: State) -> float:
        """``scale`` times the schedule at this level, 0 where repulsion is off."""
        settings = self.settings
        if state.sigma <= settings.sigma_break or state.t <= settings.stop_at:
            return 0.0
        return settings.scale * schedule_factor(settings.schedule, state.t, self.t_break)

    def before_ode(self, state: State, info: Info) -> State:
        """Compute the term of every active particle; the others get 0."""
        strength = self.strength(state)
        if int(state.active.sum()) < 2 or (strength == 0 and not self.settings.log):
            return state
        started = time.perf_counter()
        with torch.no_grad():
            slope = score(self.prior.denoiser, state.z, state.sigma)
        noisy = self.settings.estimate == "z_t"
        at = state.z / (1 + state.sigma**2) ** 0.5 if noisy else state.z + state.sigma**2 * slope
        rows = torch.nonzero(state.active & at.flatten(1).isfinite().all(1)).flatten()
        if len(rows) < 2:
            return state
        force, distances = self._force(at[rows], strength)
        sound = distances.diagonal().isfinite()
        if not bool(sound.all()):  # features that are not finite would spread to the others
            rows = rows[sound]
            if len(rows) < 2:
                return state
            force, distances = self._force(at[rows], strength)
        slope = slope[rows]
        norms, score_norms = (v.flatten(1).norm(dim=1) for v in (force, slope))
        scale = torch.full_like(norms, strength)
        if self.settings.unit == "ratio":
            scale = strength * score_norms / norms.clamp(min=SMALLEST_NORM) * (norms > SMALLEST_NORM)
        self._log(state, info, strength, scale * norms, score_norms, norms, distances, started)
        if strength == 0:
            return state
        term = torch.zeros_like(state.z)
        term[rows] = force
        factor = state.z.new_zeros(len(state))
        factor[rows] = scale
        return replace(state, drift=(term, factor))

    def _force(self, at: torch.Tensor, strength: float) -> Force:
        if strength == 0:
            return Force(torch.zeros_like(at), self.space.distances(at))
        force, distances = self.space.force(at)
        return Force(torch.where(per_particle(force.flatten(1).isfinite().all(1), force), force, 0.0), distances)

    def _log(
        self,
        state: State,
        info: Info,
        strength: float,
        applied: torch.Tensor,
        score_norms: torch.Tensor,
        norms: torch.Tensor,
        distances: torch.Tensor,
        started: float,
    ) -> None:
        count = len(distances)
        info.add(
            "repulsion",
            step=state.step,
            sigma=state.sigma,
            t=state.t,
            scale=strength,
            mean_pairwise_distance=distances.sum().item() / (count * (count - 1)),
            repulsion_norm=norms.mean().item(),
            score_norm=score_norms.mean().item(),
            ratio=(applied / score_norms).mean().item(),
            seconds=time.perf_counter() - started,
        )


def low_pass(x: torch.Tensor, side: int = 16) -> torch.Tensor:
    """Pixel features: the image averaged down to at most ``side x side``, flattened, per-pixel scale."""
    height, width = (min(side, n) for n in x.shape[-2:])
    return torch.nn.functional.adaptive_avg_pool2d(x, (height, width)).flatten(1)
