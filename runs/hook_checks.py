"""Values of the hooks' keys that no run could have."""

import pruning
import repulsion
import resample_opt
import restarts
import symmetry
from runs.checks import Checks
from runs.hook_settings import FEATURES, STARTS, HookKeys

MAX_PSNR_DB = 80.0
"""Of equal images, see :func:`evaluation.metrics.psnr_db`."""


def check_hooks(keys: HookKeys, num_samples: int, checks: Checks) -> None:
    """Report every value that no hook could run with."""
    _check_repulsion(keys, checks)
    _check_pruning(keys, num_samples, checks)
    _check_restarts(keys, num_samples, checks)
    _check_optimization(keys, checks)
    _check_resampling(keys, num_samples, checks)
    _check_start(keys, num_samples, checks)
    _check_symmetry(keys, num_samples, checks)


def _check_repulsion(keys: HookKeys, checks: Checks) -> None:
    checks.number("repulsion_scale", keys.repulsion_scale, 0)
    checks.choice("repulsion_unit", keys.repulsion_unit, repulsion.UNITS)
    checks.number("repulsion_sigma_break", keys.repulsion_sigma_break, 0)
    checks.choice("repulsion_schedule", keys.repulsion_schedule, repulsion.SCHEDULES)
    checks.choice("repulsion_on", keys.repulsion_on, repulsion.ESTIMATES)
    checks.choice("repulsion_features", keys.repulsion_features, FEATURES)
    checks.choice("repulsion_kernel", keys.repulsion_kernel, repulsion.KERNELS)
    checks.require(
        not (keys.repulsion_kernel == "odd" and keys.repulsion_features == "latent"),
        "repulsion_kernel=odd: the odd part of an image has no latent; use repulsion_features=pixel or dino",
    )


def _check_pruning(keys: HookKeys, num_samples: int, checks: Checks) -> None:
    checks.number("pruning_step", keys.pruning_step, -1, 1000)
    checks.number("pruning_keep", keys.pruning_keep, 1)
    checks.choice("pruning_rule", keys.pruning_rule, pruning.RULES)
    checks.choice("pruning_mode", keys.pruning_mode, pruning.MODES)
    checks.number("pruning_tolerance", keys.pruning_tolerance, 0)
    checks.number("pruning_close", keys.pruning_close, 0)
    checks.number("pruning_branch", keys.pruning_branch, 0)
    checks.require(
        not (keys.pruning_branch > 0 and keys.pruning_mode == "mask"),
        "pruning_branch: a masked particle keeps its place; branching needs pruning_mode=slice",
    )
    checks.require(
        keys.pruning_step < 0 or keys.pruning_keep <= num_samples,
        f"pruning_keep={keys.pruning_keep}: there are only num_samples={num_samples} particles",
    )


def _check_restarts(keys: HookKeys, num_samples: int, checks: Checks) -> None:
    checks.number("restart_rounds", keys.restart_rounds, 0, 1000)
    checks.number("restart_keep", keys.restart_keep, 1)
    checks.choice("restart_rule", keys.restart_rule, restarts.RULES)
    checks.number("restart_children", keys.restart_children, 1, 4096)
    checks.require(len(keys.restart_sigmas) > 0, "restart_sigmas=[]: must name at least one sigma")
    for sigma in keys.restart_sigmas:
        checks.number("restart_sigmas", sigma, 0, open_low=True)
    checks.number("restart_conjugate", keys.restart_conjugate, 0)
    checks.require(
        keys.restart_conjugate <= keys.restart_children,
        f"restart_conjugate={keys.restart_conjugate}: there are only restart_children={keys.restart_children} a round",
    )
    checks.require(
        keys.restart_conjugate == 0 or keys.restart_rounds != 1,
        f"restart_conjugate={keys.restart_conjugate}: parents are turned from their second round on; use "
        "restart_rounds=2 or more",
    )
    checks.number("restart_lineages", keys.restart_lineages, 1)
    checks.require(
        keys.restart_lineages <= num_samples,
        f"restart_lineages={keys.restart_lineages}: there are only num_samples={num_samples} particles",
    )
    if keys.restart_rounds > 0 and keys.restart_lineages > 1:
        _check_apart(keys, checks)
    if keys.restart_agreement is not None:
        checks.number("restart_agreement", keys.restart_agreement, 0, MAX_PSNR_DB, open_low=True)
        checks.require(
            keys.restart_lineages > 1,
            f"restart_agreement={keys.restart_agreement:g}: one lineage has none to agree with; use "
            "restart_lineages=2 or more",
        )
    checks.number("restart_refinements", keys.restart_refinements, 0)
    checks.require(
        keys.restart_refinements == 0 or keys.restart_agreement is not None,
        f"restart_refinements={keys.restart_refinements}: they follow an agreement; set restart_agreement, in dB",
    )
    if keys.restart_steps is not None:
        checks.number("restart_steps", keys.restart_steps, 1)
    checks.number("restart_polish", keys.restart_polish, 0)
    checks.require(
        keys.restart_polish == 0 or keys.optimization_prior_sigma > 0,
        f"restart_polish={keys.restart_polish}: polishing is posterior optimisation; it needs "
        "optimization_prior_sigma > 0",
    )


def _check_apart(keys: HookKeys, checks: Checks) -> None:
    """Lineages that exchange particles would agree with themselves."""
    exchanges = {
        f"resample_sigma={keys.resample_sigma:g}": keys.resample_sigma > 0,
        f"pruning_branch={keys.pruning_branch:g}": keys.pruning_step >= 0 and keys.pruning_branch > 0,
        "symmetry_moves with crossover": "crossover" in keys.symmetry_moves,
    }
    for asked, on in exchanges.items():
        checks.require(not on, f"{asked}: it copies particles from lineage to lineage; use restart_lineages=1")
    checks.require(
        keys.pruning_step < 0 or keys.pruning_keep >= keys.restart_lineages,
        f"pruning_keep={keys.pruning_keep}: leaves fewer particles than restart_lineages={keys.restart_lineages}",
    )


def _check_optimization(keys: HookKeys, checks: Checks) -> None:
    checks.number("optimization_step", keys.optimization_step, -1, 1000)
    checks.choice("optimization_when", keys.optimization_when, resample_opt.WHEN)
    checks.number("optimization_lr", keys.optimization_lr, 0, open_low=True)
    checks.number("optimization_max_iters", keys.optimization_max_iters, 0)
    checks.number("optimization_window", keys.optimization_window, 1)
    checks.number("optimization_weight_decay", keys.optimization_weight_decay, 0)
    checks.number("optimization_prior_sigma", keys.optimization_prior_sigma, 0)
    if keys.optimization_tau is not None:
        checks.number("optimization_tau", keys.optimization_tau, 0, open_low=True)
    checks.choice("optimization_accept", keys.optimization_accept, ("auto", *resample_opt.ACCEPT))
    checks.require(
        not keys.optimization_twins or keys.optimization_when == "end",
        "optimization_twins: twins are added with optimization_when=end only",
    )
    if keys.optimization_best is not None:
        checks.number("optimization_best", keys.optimization_best, 1)
        checks.require(
            keys.optimization_when == "end", "optimization_best: particles are dropped with optimization_when=end only"
        )
    checks.require(
        keys.optimization_prior_sigma == 0 or keys.optimization_accept != "split",
        "optimization_accept=split: a posterior (optimization_prior_sigma > 0) needs all of the measurement; use auto",
    )
    for key, asked in (("twins", keys.optimization_twins), ("best", keys.optimization_best is not None)):
        checks.require(
            not asked or keys.optimization_step >= 0,
            f"optimization_{key}: the optimisation is off; it needs optimization_step of at least 0",
        )
    both = keys.pruning_step >= 0 and keys.optimization_step >= 0
    checks.require(
        not both or keys.optimization_step <= keys.pruning_step,
        f"optimization_step={keys.optimization_step}: must not exceed pruning_step={keys.pruning_step} "
        "(pruning comes first)",
    )


def _check_resampling(keys: HookKeys, num_samples: int, checks: Checks) -> None:
    sigma, least = keys.resample_sigma, keys.resample_sigma_min
    checks.require(
        0 <= sigma <= 1,
        f"resample_sigma={sigma:g}: must be at least 0 (off) and at most 1: earlier a wrong basin often has the lowest "
        "loss, and its copies would take over; 0.5 is recommended",
    )
    checks.number("resample_sigma_min", least, 0)
    if not 0 < sigma <= 1:
        return
    checks.require(least <= sigma, f"resample_sigma_min={least:g}: must not exceed resample_sigma={sigma:g}")
    checks.require(
        num_samples > 2,
        f"resample_sigma={sigma:g}: two lineages are always kept, so num_samples={num_samples} leaves nothing to "
        "resample; use num_samples=3 or more",
    )
    checks.require(
        keys.pruning_step < 0 or keys.pruning_keep > 2 or keys.pruning_branch > 0,
        f"resample_sigma={sigma:g}: pruning_keep={keys.pruning_keep} leaves no more than two particles, which are "
        "always kept; use pruning_keep=3 or more, or pruning_branch",
    )


def _check_start(keys: HookKeys, num_samples: int, checks: Checks) -> None:
    checks.choice("start", keys.start, STARTS)
    checks.number("start_sigma", keys.start_sigma, 0, open_low=True)
    checks.number("start_restarts", keys.start_restarts, 1)
    checks.number("start_iterations", keys.start_iterations, 1)
    checks.require(
        keys.start == "noise" or keys.start_restarts >= num_samples,
        f"start_restarts={keys.start_restarts}: each of the num_samples={num_samples} particles begins at a restart "
        "of its own",
    )


def _check_symmetry(keys: HookKeys, num_samples: int, checks: Checks) -> None:
    moves = keys.symmetry_moves
    known = all(move in symmetry.MOVES for move in moves) and len(set(moves)) == len(moves)
    checks.require(
        known, f"symmetry_moves=[{','.join(moves)}]: allowed are {', '.join(symmetry.MOVES)}, each at most once"
    )
    checks.require(
        "crossover" not in moves or num_samples > 1,
        "symmetry_moves: crossover combines particles; it needs num_samples of at least 2",
    )
    checks.number("symmetry_sigma_min", keys.symmetry_sigma_min, 0)
    checks.number("symmetry_sigma_max", keys.symmetry_sigma_max, keys.symmetry_sigma_min)
    checks.number("symmetry_window_sigma", keys.symmetry_window_sigma, 0)
    checks.number("symmetry_every", keys.symmetry_every, 1)
    checks.number("symmetry_margin", keys.symmetry_margin, 0, 1)
    checks.number("symmetry_loss_tolerance", keys.symmetry_loss_tolerance, 0)
    checks.number("symmetry_draws", keys.symmetry_draws, 1)
    if keys.symmetry_tau is not None:
        checks.number("symmetry_tau", keys.symmetry_tau, 0, open_low=True)
    checks.number("symmetry_crossover_ratio", keys.symmetry_crossover_ratio, 1)
