r"""Hook: moves between the images that one measurement cannot tell apart.

Every move maps images to images, ``x = D(z) -> x'``, and proposes ``z' = E(x')``. With a pixel prior (identity
autoencoder) the flips change no amplitude at all; a learned autoencoder does not give ``x'`` back exactly, so the
data loss of ``D(z')`` itself enters every decision. A move is judged by one of these rules:

* ``metropolis``, where the prior's density is known (``denoiser.log_prob(z)``): accept with probability
  :math:`\min(1, \frac{p(z')}{p(z)} e^{-(L' - L) / 2 \tau^2})`. The proposals are their own inverses and keep volumes
  (exactly for a pixel prior), so :math:`p(z_0 | y)` is left invariant;
* ``denoising``, where it is not: accept if the denoising loss falls by a margin and the data loss rises by no more than
  a tolerance;
* ``likelihood``: accept with probability :math:`\min(1, e^{-(L' - L) / 2 \tau^2})`;
* ``loss``: accept if the data loss falls;
* ``always``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from particledaps.checks import Checks, SettingsError
from particledaps.diffusion.levels import per_particle
from particledaps.diffusion.score import denoising_loss
from particledaps.operators import symmetry_moves
from particledaps.operators.phase_retrieval import rotate_180
from particledaps.particles.hook_setup import Setup, need_flip
from particledaps.particles.state import Hook, Info, State
from particledaps.settings.hook_keys import HooksAsked, key

if TYPE_CHECKING:
    from particledaps.operators.operator import Operator
    from particledaps.priors.prior import Prior

PREFIX = "symmetry"
MOVES = ("window", "channels", "conjugate", "flip", "crossover")
PARTICLE_COLUMNS = ("loss_before", "loss_after", "plausibility_before", "plausibility_after", "accepted")
SIGMAS = (0.5, 1.0, 2.0)
CPU = "cpu"


@dataclass(frozen=True)
class Settings:
    """Which moves, when and how they are judged; the keys ``symmetry_*``.

    Attributes:
        moves: some of :data:`MOVES`, made in this order; none is off.

            * ``flip``: the whole particle; metropolis or denoising.
            * ``channels``: single channels; metropolis (one at random that is not the reference, so that the move is
              reversible) or denoising (all whose flip agrees better with the channel of the largest variance).
            * ``conjugate``: a random band of frequencies; metropolis or likelihood.
            * ``crossover``: a particle with a loss above ``crossover_ratio`` times the best takes the mean of the good
              ones, each flipped towards the best; loss. Couples particles.
            * ``window``: a soft half plane, a different one for each particle; always.
        sigma_max: largest noise level at which moves are made (all but ``window``).
        sigma_min: least noise level at which moves are made (all but ``window``).
        window_sigma: ``window`` is made at levels with a sigma of at least this.
        every: at levels k with ``k % every == 0`` only.
        margin: of ``denoising``: relative fall of the denoising loss that is needed.
        loss_tolerance: of ``denoising``: relative rise of the data loss that is allowed.
        draws: of ``denoising``: noise draws at each of the sigmas 0.5, 1 and 2.
        tau: standard deviation of the likelihood in acceptance ratios; None: the operator's noise.
        crossover_ratio: of ``crossover``: a particle is replaced if its loss is above this many times the best one.
    """

    moves: tuple[str, ...] = key(())
    sigma_max: float = key(3.0)
    sigma_min: float = key(0.3, low=0)
    window_sigma: float = key(3.0, low=0)
    every: int = key(5, low=1)
    margin: float = key(0.02, low=0, high=1)
    loss_tolerance: float = key(0.1, low=0)
    draws: int = key(2, low=1)
    tau: float | None = key(None, low=0, open_low=True)
    crossover_ratio: float = key(1.2, low=1)

    def moves_at(self, step: int, sigma: float) -> list[str]:
        """The moves of this level."""
        if step % self.every:
            return []
        inside = self.sigma_min <= sigma <= self.sigma_max
        return [m for m in self.moves if (sigma >= self.window_sigma if m == "window" else inside)]


def conflicts(settings: Settings, asked: HooksAsked) -> Iterator[str]:
    """Sentences on values that exclude each other."""
    moves, checks = settings.moves, Checks()
    if not set(moves) <= set(MOVES) or len(set(moves)) < len(moves):
        yield f"symmetry_moves=[{','.join(moves)}]: allowed are {', '.join(MOVES)}, each at most once"
    if "crossover" in moves and asked.num_samples < 2:
        yield "symmetry_moves: crossover combines particles; it needs num_samples of at least 2"
    checks.number("symmetry_sigma_max", settings.sigma_max, settings.sigma_min)
    yield from checks.problems


def build(settings: Settings, setup: Setup) -> SymmetryMoves | None:
    """The hook; None if it is off.

    Raises:
        SettingsError: the operator has no such symmetry, or a move has no level.
    """
    if not settings.moves:
        return None
    need_flip(setup.operator, f"symmetry_moves=[{','.join(settings.moves)}]", "symmetry_moves=[]")
    sigmas, first = setup.path[:-1].tolist(), setup.first_level
    made = {move for k in range(first, len(sigmas)) for move in settings.moves_at(k, sigmas[k])}
    for move in settings.moves:
        if move not in made:
            band = (
                f"of at least symmetry_window_sigma={settings.window_sigma:g}"
                if move == "window"
                else f"from symmetry_sigma_min={settings.sigma_min:g} to symmetry_sigma_max={settings.sigma_max:g}"
            )
            raise SettingsError(
                f"symmetry_moves: {move} has no level: no sigma {band} at every {settings.every}th of "
                f"{len(sigmas) - first} levels from sigma = {sigmas[first]:g}; lower symmetry_every or widen the range"
            )
    return SymmetryMoves(setup.prior, setup.operator, settings)


def record(settings: Settings, hook: SymmetryMoves | None, info: Info, particle_ids: list[int]) -> dict[str, Any]:
    """What each particle tried at each level."""
    if not settings.moves:
        return {"symmetry": None}
    rows = info.rows.get("symmetry", [])
    level = ("step", "sigma", "t", "move", "rule")
    tries = [
        {n: row[n] for n in level} | {"particle_id": p} | {n: row[n][i] for n in PARTICLE_COLUMNS}
        for row in rows
        for i, p in enumerate(row["particle_ids"])
    ]
    facts = {"moves": list(settings.moves), "seconds": sum(row["seconds"] for row in rows), "tries": tries}
    return {"symmetry": facts}


class Look(NamedTuple):
    """Latents, their images and data losses; each leads with the particle axis."""

    z: torch.Tensor
    images: torch.Tensor
    loss: torch.Tensor


class Verdict(NamedTuple):
    """Who may move, by which rule, and the plausibility (lower is better) before and after, where it was asked for."""

    accepted: torch.Tensor
    rule: str
    before: torch.Tensor | None = None
    after: torch.Tensor | None = None


class SymmetryMoves(Hook):
    """Makes the moves on ``z0_y`` of every active particle just before re-noising; one row a move and level.

    Args:
        prior: autoencoder and denoiser.
        operator: the data loss.
        settings: which moves, when.
    """

    def __init__(self, prior: Prior, operator: Operator, settings: Settings) -> None:
        self.prior = prior
        self.operator = operator
        self.settings = settings
        self.tau = operator.noise_sigma if settings.tau is None else settings.tau
        self.log_prob: Callable[[torch.Tensor], torch.Tensor] | None = getattr(prior.denoiser, "log_prob", None)

    def before_renoise(self, state: State, info: Info) -> State:
        """Make this level's moves, one after the other."""
        moves = self.settings.moves_at(state.step, state.gate_sigma)
        rows = torch.nonzero(state.active & state.z0_y.flatten(1).isfinite().all(1)).flatten()
        if not moves or len(rows) == 0:
            return state
        part = state[rows]
        look = self._look(part.z0_y, part.y)
        moved = torch.zeros_like(part.diverged)
        for move in moves:
            look, accepted = self._make(move, look, part, info)
            moved = moved | accepted
        z0_y, loss = state.z0_y.clone(), state.loss.clone()
        z0_y[rows], loss[rows] = look.z, torch.where(moved, look.loss, part.loss)
        return replace(state, z0_y=z0_y, loss=loss)

    def _look(self, z: torch.Tensor, y: torch.Tensor) -> Look:
        images = self.prior.decode(z)
        return Look(z, images, self.operator.loss(images, y))

    def _make(self, move: str, look: Look, state: State, info: Info) -> tuple[Look, torch.Tensor]:
        """What one move leaves, and who moved."""
        started = time.perf_counter()
        images, tried = self._propose(move, look, state)
        if not bool(tried.any()):
            return look, tried
        here, rows = state[tried], Look(*(part[tried] for part in look))
        there = self._look(self.prior.encode(images[tried]), here.y)
        verdict = self._judge(move, rows, there, here)
        finite = there.loss.isfinite() & there.z.flatten(1).isfinite().all(1)
        accepted = torch.zeros_like(tried)
        accepted[tried] = verdict.accepted & finite
        self._log(info, move, here, rows, there, verdict, accepted[tried], time.perf_counter() - started)
        result = Look(*(part.clone() for part in look))
        for part, new in zip(result, there, strict=True):
            part[accepted] = new[accepted[tried]].to(part)
        return result, accepted

    def _propose(self, move: str, look: Look, state: State) -> tuple[torch.Tensor, torch.Tensor]:
        """Images like ``look.images`` and who is to try them, ``(P,)``."""
        images, everyone = look.images, torch.ones_like(state.diverged)
        if move == "flip":
            return rotate_180(images), everyone
        if move == "window":
            return symmetry_moves.reduce_support(images, state.ids), everyone
        if move == "channels":
            chosen = self._channels(images, state)
            return symmetry_moves.flip_channels(images, chosen), chosen.any(1)
        if move == "conjugate":
            generators = state.streams.generators(state.ids, "symmetry_band", state.step, CPU)
            return symmetry_moves.conjugate_drawn_bands(images, symmetry_moves.draw_band, generators), everyone
        return self._cross(look)

    def _channels(self, images: torch.Tensor, state: State) -> torch.Tensor:
        if self.log_prob is None:
            return symmetry_moves.discordant_channels(images)
        count, reference = images.shape[1], symmetry_moves.reference_channel(images)
        if count == 1:
            return torch.zeros_like(reference, dtype=torch.bool)[:, None]
        generators = state.streams.generators(state.ids, "symmetry_channel", state.step, CPU)
        further = torch.cat([torch.randint(1, count, (1,), generator=g) for g in generators]).to(reference)
        return torch.arange(count, device=images.device) == ((reference + further) % count)[:, None]

    def _cross(self, look: Look) -> tuple[torch.Tensor, torch.Tensor]:
        finite = look.loss.isfinite()
        loss = torch.where(finite, look.loss, torch.inf)
        good = finite & (loss <= self.settings.crossover_ratio * loss.min())
        far = finite & ~good
        if not bool(far.any()):
            return look.images, far
        mean = symmetry_moves.aligned_mean(look.images, int(loss.argmin()), good)
        return torch.where(per_particle(far, look.images), mean, look.images), far

    def _judge(self, move: str, here: Look, there: Look, state: State) -> Verdict:
        if move == "window":
            return Verdict(torch.ones_like(state.diverged), "always")
        if move == "crossover":
            return Verdict(there.loss < here.loss, "loss")
        log_ratio = (here.loss - there.loss) / (2 * self.tau**2)
        if self.log_prob is not None:
            before, after = -self.log_prob(here.z), -self.log_prob(there.z)
            return Verdict(self._metropolis(move, log_ratio + before - after, state), "metropolis", before, after)
        if move == "conjugate":
            return Verdict(self._metropolis(move, log_ratio, state), "likelihood")
        return self._compare(here, there, state)

    @staticmethod
    def _metropolis(move: str, log_ratio: torch.Tensor, state: State) -> torch.Tensor:
        generators = state.streams.generators(state.ids, f"symmetry_accept_{move}", state.step, CPU)
        uniform = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
        return uniform.log().to(log_ratio) < log_ratio

    def _compare(self, here: Look, there: Look, state: State) -> Verdict:
        """The images before and after, both as encoded: a latent of the chain carries noise that no encoding has."""
        settings, shape = self.settings, (len(SIGMAS), self.settings.draws)
        like = here.z[:, None, None].expand(-1, *shape, *here.z.shape[1:])
        noise = state.streams.normal(state.ids, "symmetry_noise", state.step, like)
        encoded = self.prior.encode(here.images)
        before, after = (denoising_loss(self.prior.denoiser, z, SIGMAS, noise) for z in (encoded, there.z))
        plausible = after < (1 - settings.margin) * before
        fits = there.loss <= (1 + settings.loss_tolerance) * here.loss
        return Verdict(plausible & fits, "denoising", before, after)

    @staticmethod
    def _log(
        info: Info,
        move: str,
        state: State,
        here: Look,
        there: Look,
        verdict: Verdict,
        accepted: torch.Tensor,
        seconds: float,
    ) -> None:
        unknown = [None] * len(state)
        info.add(
            "symmetry",
            step=state.step,
            sigma=state.gate_sigma,
            t=state.t,
            move=move,
            rule=verdict.rule,
            particle_ids=state.ids,
            loss_before=here.loss.tolist(),
            loss_after=there.loss.tolist(),
            plausibility_before=unknown if verdict.before is None else verdict.before.tolist(),
            plausibility_after=unknown if verdict.after is None else verdict.after.tolist(),
            accepted=accepted.tolist(),
            seconds=seconds,
        )
