r"""Hook: particles of one measurement push each other apart in a feature space (RLSD, Zilberstein et al. 2024).

With features :math:`f_i` of particle i, :math:`d_{ij} = |f_i - f_j|` and the bandwidth
:math:`h_i = \mathrm{median}_{j \ne i}(d_{ij})^2 / \ln N`, the term of particle i is

.. math:: r_i = -\nabla_{z_i} \log \sum_{j \ne i} e^{-d_{ij}^2 / h_i}
    = J_i^T \frac{\sum_j \frac{2}{h_i} w_{ij} (f_i - f_j)}{\sum_j w_{ij}}, \qquad w_{ij} = e^{-d_{ij}^2 / h_i}

with :math:`h_i` held fixed and :math:`J_i` the Jacobian of the features. The ODE
(:class:`particledaps.diffusion.pfode.DiffusionPFODE`) adds ``scale * r`` to the score; the scale is applied there and
nowhere else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from particledaps.checks import SettingsError
from particledaps.diffusion.levels import per_particle, spread
from particledaps.diffusion.score import score
from particledaps.particles.feature_spaces import FeatureSpace, Force, build_feature_space
from particledaps.particles.state import NUM_TIMESTEPS, Hook, Info, State
from particledaps.paths.schedules import first_level_at_most
from particledaps.settings.hook_keys import HooksAsked, key

if TYPE_CHECKING:
    from particledaps.particles.hook_setup import Setup
    from particledaps.priors.prior import Prior

PREFIX = "repulsion"
FEATURES = ("auto", "dino", "latent", "pixel")
KERNELS = ("plain", "quotient", "odd")
SCHEDULES = ("constant", "linear", "cosine")
ESTIMATES = ("z0_hat", "z_t")
UNITS = ("ratio", "raw")
SMALLEST_NORM = 1e-20


@dataclass(frozen=True)
class Settings:
    """When particles push each other apart, where distances are measured, and how much; the keys ``repulsion_*``.

    Attributes:
        scale: strength at the start; 0 is off.
        unit: ``ratio``: ``|scale * r| / |score|`` of each particle at the level's sigma, which transfers between
            priors; ``raw``: the factor itself.
        sigma_break: active while sigma > sigma_break.
        schedule: over t from 1000 down to the first level with sigma <= sigma_break: ``constant``, ``linear`` or
            ``cosine`` (the last two reach 0 there).
        on: repel clean estimates ``z0_hat`` (Tweedie at this level) or the scaled noisy latents ``z_t``
            ``/ sqrt(1 + sigma^2)`` (RLSD's first version; a decoder then sees noise). Either way one denoiser call a
            level gives the score of the ratio; the feature space adds its own cost.
        features: ``dino``, ``latent``, ``pixel``, or ``auto``: dino where its weights are, else latent (pixel for the
            odd kernel).
        kernel: ``plain``; ``quotient`` (the operator's twins count as one); ``odd`` (repel only where twins differ).
        dino_model: timm name of the feature network.
        dino_path: its weight file; None: the hub's cache.
        log: write pairwise distances at every level, also where repulsion is off.
    """

    scale: float = key(0.0, low=0)
    unit: str = key("ratio", words=UNITS)
    sigma_break: float = key(1.0, low=0)
    schedule: str = key("linear", words=SCHEDULES)
    on: str = key("z0_hat", words=ESTIMATES)
    features: str = key("auto", words=FEATURES)
    kernel: str = key("plain", words=KERNELS)
    dino_model: str = key("vit_small_patch16_224.dino")
    dino_path: str | None = key(None)
    log: bool = key(False)


def conflicts(settings: Settings, asked: HooksAsked) -> Iterator[str]:
    """Sentences on values that exclude each other."""
    if settings.kernel == "odd" and settings.features == "latent":
        yield "repulsion_kernel=odd: the odd part of an image has no latent; use repulsion_features=pixel or dino"


def build(settings: Settings, setup: Setup) -> Repulsion | None:
    """The hook; None if it is off or nobody is there to repel.

    Raises:
        SettingsError, PriorError: see :func:`particledaps.particles.feature_spaces.build_feature_space`; or no level is
            noisy.
    """
    if setup.asked.particles < 2 or not (settings.scale > 0 or settings.log):
        return None
    space = build_feature_space(settings, setup.prior, setup.operator, setup.device)
    highest = setup.path[setup.first_level].item()
    if settings.scale > 0 and highest <= settings.sigma_break:
        raise SettingsError(
            f"repulsion_sigma_break={settings.sigma_break:g}: particles repel above that sigma, and this run "
            f"begins at sigma = {highest:g}; lower it, or use repulsion_scale=0"
        )
    return Repulsion(setup.prior, space, settings, setup.path, setup.asked["optimization"].step)


def record(settings: Settings, hook: Repulsion | None, info: Info, particle_ids: list[int]) -> dict[str, Any]:
    """What repulsion did to one image."""
    rows = info.rows.get("repulsion", [])
    facts = {
        "enabled": hook is not None and settings.scale > 0,
        "features": None if hook is None else hook.space.name,
        "kernel": settings.kernel,
        "active_steps": sum(row["scale"] > 0 for row in rows),
        "seconds": sum(row["seconds"] for row in rows),
        "per_step": [{k: v for k, v in row.items() if k != "seconds"} for row in rows],
    }
    return {"repulsion": facts}


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
        stop_at: off from ``t <= stop_at`` on (optimisation has begun).
    """

    def __init__(
        self, prior: Prior, space: FeatureSpace, settings: Settings, path: torch.Tensor, stop_at: float = -1
    ) -> None:
        self.prior = prior
        self.space = space
        self.settings = settings
        self.stop_at = stop_at
        passed = first_level_at_most(path, settings.sigma_break)
        self.t_break = 0.0 if passed is None else NUM_TIMESTEPS * (1 - passed / (len(path) - 1))

    def strength(self, state: State) -> float:
        """``scale`` times the schedule at this level, 0 where repulsion is off."""
        settings = self.settings
        if state.gate_sigma <= settings.sigma_break or state.t <= self.stop_at:
            return 0.0
        return settings.scale * schedule_factor(settings.schedule, state.t, self.t_break)

    def before_ode(self, state: State, info: Info) -> State:
        """Compute the term of every active particle; the others get 0."""
        strength = self.strength(state)
        if int(state.active.sum()) < 2 or (strength == 0 and not self.settings.log):
            return state
        started = time.perf_counter()
        with torch.no_grad():
            slope = score(self.prior.denoiser, state.z, state.sigma, self.prior.parts)
        noisy = self.settings.on == "z_t"
        sigma = spread(state.sigma, state.z, self.prior.parts)
        at = state.z / (1 + sigma**2) ** 0.5 if noisy else state.z + sigma**2 * slope
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
            sigma=state.gate_sigma,
            t=state.t,
            scale=strength,
            mean_pairwise_distance=distances.sum().item() / (count * (count - 1)),
            repulsion_norm=norms.mean().item(),
            score_norm=score_norms.mean().item(),
            ratio=(applied / score_norms).mean().item(),
            seconds=time.perf_counter() - started,
        )
