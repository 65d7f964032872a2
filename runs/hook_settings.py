"""Top-level keys of the hooks."""

from dataclasses import dataclass, field

STARTS = ("noise", "hio", "raar")
FEATURES = ("auto", "dino", "latent", "pixel")


@dataclass
class RepulsionKeys:
    """Repulsion of particles; see :class:`repulsion.RepulsionSettings`.

    Attributes:
        repulsion_scale: strength of particle repulsion, 0 is off.
        repulsion_unit: ``ratio`` (of the term to the score, transfers between priors) or ``raw`` (the factor itself).
        repulsion_sigma_break: repulsion is active above this sigma.
        repulsion_schedule: ``constant``, ``linear`` or ``cosine``.
        repulsion_on: ``z0_hat`` (clean estimate at this level) or ``z_t`` (the scaled noisy latent).
        repulsion_features: ``dino``, ``latent``, ``pixel``, or ``auto``: dino where its weights are, else latent
            (pixel for the odd kernel).
        repulsion_kernel: ``plain``; ``quotient`` (the operator's twins count as one); ``odd`` (repel only where the
            twins differ).
        repulsion_dino_model: timm name of the feature network.
        repulsion_dino_path: its weight file; null: the hub's cache.
        repulsion_log: log pairwise distances at every level, also where repulsion is off.
    """

    repulsion_scale: float = 0.0
    repulsion_unit: str = "ratio"
    repulsion_sigma_break: float = 1.0
    repulsion_schedule: str = "linear"
    repulsion_on: str = "z0_hat"
    repulsion_features: str = "auto"
    repulsion_kernel: str = "plain"
    repulsion_dino_model: str = "vit_small_patch16_224.dino"
    repulsion_dino_path: str | None = None
    repulsion_log: bool = False


@dataclass
class PruningKeys:
    """Pruning and branching; see :class:`pruning.PruningSettings`.

    Attributes:
        pruning_step: prune at the first level with ``t <= pruning_step`` (0..1000), -1 is off.
        pruning_keep: particles to keep at most.
        pruning_rule: ``loss`` or ``diverse``.
        pruning_mode: ``slice`` frees memory and time, ``mask`` lets pruned particles run on unseen.
        pruning_tolerance: of ``diverse``: largest loss above the expected one, in its standard deviations.
        pruning_close: of ``diverse``: images nearer than this (root mean square in [0, 1]) count as one.
        pruning_branch: sigma to which children of the survivors are re-noised to fill the freed places, 0 is off.
    """

    pruning_step: int = -1
    pruning_keep: int = 2
    pruning_rule: str = "loss"
    pruning_mode: str = "slice"
    pruning_tolerance: float = 3.0
    pruning_close: float = 0.1
    pruning_branch: float = 0.0


@dataclass
class RestartKeys:
    """Children of the best particles; see :class:`restarts.RestartSettings`.

    Attributes:
        restart_rounds: rounds of children after the last level, 0 is off.
        restart_keep: parents of each round, the best by ``restart_rule``; the others are dropped.
        restart_rule: what particles compete by for the next round. ``loss``: the data loss; ``posterior``: with the
            prior's energy, ``loss / (2 tau^2) - log p`` in nats, tau from ``optimization_tau``. Who is left after the
            last round of one lineage stays; ``optimization_best`` chooses among them by the data loss. Several lineages
            compete by this rule after the last round too.
        restart_children: particles that are annealed again in each round.
        restart_lineages: the particles are divided into so many lineages that compete only within themselves until the
            rounds end; ``restart_keep`` and ``restart_children`` are those of each.
        restart_agreement: the rounds end early once the answers of two lineages, one of them the best of all, agree to
            this PSNR in dB, whichever twins they show; null: never.
        restart_refinements: so many rounds more, of the best lineage alone, once two agreed.
        restart_sigmas: sigmas to which children are re-noised, one a round, from the first again after the last.
        restart_conjugate: so many children of a parent that no child of an earlier round has displaced begin with a
            band of its lowest frequencies turned to the other twin; needs the 180-degree flip as a symmetry.
        restart_steps: MCMC steps of the children, a level; null: ``sampler.mcmc.num_steps``.
        restart_polish: posterior optimisation of each particle before a round compares them, in iterations; takes
            ``optimization_lr``, ``optimization_prior_sigma`` and ``optimization_tau``; 0 is off.
    """

    restart_rounds: int = 0
    restart_keep: int = 1
    restart_rule: str = "loss"
    restart_children: int = 4
    restart_lineages: int = 1
    restart_agreement: float | None = None
    restart_refinements: int = 0
    restart_sigmas: list[float] = field(default_factory=lambda: [2.0])
    restart_conjugate: int = 0
    restart_steps: int | None = None
    restart_polish: int = 0


@dataclass
class OptimizationKeys:
    """Latent optimisation; see :class:`resample_opt.OptimizationSettings`.

    Attributes:
        optimization_step: optimise latents from the first level with ``t <= optimization_step``, -1 is off.
        optimization_when: ``end`` (once, after the last level) or ``every`` (at every level from there on).
        optimization_lr: learning rate of AdamW.
        optimization_max_iters: iterations at most, a level.
        optimization_window: stop when the loss exceeds the one this many iterations before (without the prior's score).
        optimization_weight_decay: of AdamW.
        optimization_prior_sigma: add the prior's score at this sigma to the objective (a posterior instead of data
            consistency alone), 0 is off.
        optimization_tau: standard deviation of the likelihood beside the prior; null: the operator's noise.
        optimization_accept: ``split`` (validate on the other half of the measurement), ``floor``, ``loss``,
            ``objective``, or ``auto``: split where the operator can (else floor), and objective beside the prior.
        optimization_best: with ``end``: optimise only so many particles, those of the lowest data loss, and drop the
            others; null: all.
        optimization_twins: with ``end``: optimise each particle's images under the operator's symmetries too, so that
            the prior compares twins that had the same treatment (``selection_rule=plausibility`` or ``posterior``).
    """

    optimization_step: int = -1
    optimization_when: str = "end"
    optimization_lr: float = 5e-3
    optimization_max_iters: int = 500
    optimization_window: int = 200
    optimization_weight_decay: float = 1e-2
    optimization_prior_sigma: float = 0.0
    optimization_tau: float | None = None
    optimization_accept: str = "auto"
    optimization_best: int | None = None
    optimization_twins: bool = False


@dataclass
class ResamplingKeys:
    """Late tempered resampling; see :class:`resampling.ResamplingSettings`.

    Attributes:
        resample_sigma: resample at levels with at most this sigma, 0 is off; 0.5 is recommended.
        resample_sigma_min: and at least this one.
    """

    resample_sigma: float = 0.0
    resample_sigma_min: float = 0.2


@dataclass
class StartKeys:
    """Where the particles begin; see :class:`runs.starts.WarmStart`.

    Attributes:
        start: ``noise``, or the images of a classical solver, encoded and re-noised: ``hio`` or ``raar``.
        start_sigma: the particles of a warm start begin at the first level with at most this sigma.
        start_restarts: random starts of the solver; the particles take those of lowest residual.
        start_iterations: iterations of the solver, before 40 of error reduction.
    """

    start: str = "noise"
    start_sigma: float = 3.0
    start_restarts: int = 8
    start_iterations: int = 300


@dataclass
class SymmetryKeys:
    """Moves between images of one amplitude; see :class:`symmetry.SymmetrySettings`.

    Attributes:
        symmetry_moves: some of ``window``, ``channels``, ``conjugate``, ``flip``, ``crossover``, in the order in which
            they are made; empty is off.
        symmetry_sigma_max: largest sigma at which they are made (``window`` has a key of its own).
        symmetry_sigma_min: smallest sigma.
        symmetry_window_sigma: ``window`` is made above this sigma.
        symmetry_every: at every so many levels.
        symmetry_margin: relative fall of the denoising loss that lets a flip pass.
        symmetry_loss_tolerance: relative rise of the data loss that a flip may cost (what encoding loses).
        symmetry_draws: noise draws of the denoising loss, a sigma.
        symmetry_tau: standard deviation of the likelihood in acceptance ratios; null: the operator's noise.
        symmetry_crossover_ratio: a loss above this many times the best makes a particle take the mean of the others.
    """

    symmetry_moves: list[str] = field(default_factory=list)
    symmetry_sigma_max: float = 3.0
    symmetry_sigma_min: float = 0.3
    symmetry_window_sigma: float = 3.0
    symmetry_every: int = 5
    symmetry_margin: float = 0.02
    symmetry_loss_tolerance: float = 0.1
    symmetry_draws: int = 2
    symmetry_tau: float | None = None
    symmetry_crossover_ratio: float = 1.2


@dataclass
class HookKeys(RepulsionKeys, SymmetryKeys, PruningKeys, ResamplingKeys, RestartKeys, OptimizationKeys, StartKeys):
    """Keys of all hooks and of the start, at the top level of the configuration."""
