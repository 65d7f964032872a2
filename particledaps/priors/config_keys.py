"""Every key of a diffusers configuration is used, harmless, or refused by name; nothing in it is dropped in silence.

diffusers itself only warns of a key that it does not know, and a U-Net that wants a second condition runs without it.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from particledaps.priors.errors import PriorError


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


AVERAGING = _names("decay inv_gamma min_decay optimization_step power update_after_step use_ema_warmup")
"""What diffusers' ``EMAModel`` leaves in the configuration of the network that it averages."""
SECOND_CONDITION = "(SDXL and others) is a second condition, which nothing here gives: it does not fit here"
ONLY = {
    UNet2DConditionModel: {
        "time_cond_proj_dim": (None, "embeds the guidance scale (latent consistency models), which nothing here gives"),
        "addition_embed_type": (None, SECOND_CONDITION),
        "encoder_hid_dim_type": (None, SECOND_CONDITION),
        "encoder_hid_dim": (None, SECOND_CONDITION),
        "class_embed_type": (None, SECOND_CONDITION),
        "num_class_embeds": (None, SECOND_CONDITION),
        "attention_type": ("default", "is grounded attention (GLIGEN), whose boxes nothing here gives"),
    },
    UNet2DModel: {
        "class_embed_type": (None, "is not supported: only a table of classes (num_class_embeds) is"),
        "time_embedding_type": ("positional", "is not supported: it takes no fractional timesteps of a beta schedule"),
    },
}
"""Class -> key -> the only value that fits here, and why another does not."""
DISCRETE = _names(
    "DDPMScheduler DDPMParallelScheduler DDIMScheduler DDIMParallelScheduler DDIMInverseScheduler PNDMScheduler"
    " DPMSolverMultistepScheduler DPMSolverSinglestepScheduler DPMSolverMultistepInverseScheduler"
    " DPMSolverSDEScheduler DEISMultistepScheduler EulerDiscreteScheduler EulerAncestralDiscreteScheduler"
    " HeunDiscreteScheduler KDPM2DiscreteScheduler KDPM2AncestralDiscreteScheduler LMSDiscreteScheduler"
    " UniPCMultistepScheduler SASolverScheduler"
)
"""Schedulers whose betas and prediction type say all of the network; others (EDM, flow, consistency) say more."""
SAMPLING = _names(
    "algorithm_type clip_sample clip_sample_range corrector_order disable_corrector dynamic_thresholding_ratio"
    " euler_at_final final_sigmas_type flow_shift interpolation_type lambda_min_clipped lower_order_final"
    " noise_sampler_seed predict_x0 predictor_order sample_max_value set_alpha_to_one shift_terminal sigma_max"
    " sigma_min skip_prk_steps solver_order solver_p solver_type steps_offset tau_func tensor_format thresholding"
    " time_shift_type timestep_spacing timestep_values use_beta_sigmas use_dynamic_shifting use_exponential_sigmas"
    " use_karras_sigmas use_lu_lambdas variance_type"
)
"""Keys of these schedulers that steer diffusers' own sampler and do not touch the network's meaning."""
READ = _names(
    "beta_start beta_end beta_schedule num_train_timesteps prediction_type rescale_betas_zero_snr trained_betas"
)
FLOW = "FlowMatchEulerDiscreteScheduler"
FLOW_SAMPLING = _names(
    "base_image_seq_len base_shift max_image_seq_len max_shift shift shift_terminal stochastic_sampling time_shift_type"
    " use_beta_sigmas use_dynamic_shifting use_exponential_sigmas use_karras_sigmas"
)
"""Keys of the flow scheduler that say which times diffusers' sampler visits; the network is told the same time."""
FLOW_ONLY = {"invert_sigmas": (False, "is not supported: time runs from the image to the noise here")}
SCHEDULER_ONLY = {
    "use_flow_sigmas": (False, "(flow matching) is not supported: betas do not describe it"),
    "timestep_type": ("discrete", "is not supported: the network takes another time than the number of its beta"),
    "predict_epsilon": (True, "is the old name of another prediction_type: write prediction_type=sample instead"),
}


def check_network_config(kind: type[nn.Module], config: dict[str, Any], path: Path) -> None:
    """Refuse what the class does not know, or what the loaders here would leave unused.

    Args:
        kind: the diffusers class.
        config: its ``config.json``.
        path: of that file, for the message.

    Raises:
        PriorError: a key is unknown and set, or asks for what is not given here.
    """
    parameters = set(inspect.signature(kind.__init__).parameters)
    _refuse_unknown(config, parameters | AVERAGING, f"{path}: a {kind.__name__}")
    _refuse_others(config, ONLY.get(kind, {}), path)


def check_scheduler_config(config: dict[str, Any], path: Path) -> None:
    """Refuse a scheduler whose betas and prediction type do not say all of the network.

    Raises:
        PriorError: its class is no discrete one, or a key is unknown and set, or asks for what is not supported here.
    """
    kind = config.get("_class_name")
    if kind == FLOW:
        _refuse_others(config, FLOW_ONLY, path)
        _refuse_unknown(config, FLOW_SAMPLING | set(FLOW_ONLY) | {"num_train_timesteps"}, f"{path}: {kind}")
        return
    old_steps = {"timesteps"} if config.get("timesteps") == config.get("num_train_timesteps", 1000) else set()
    if kind is not None and str(kind) not in DISCRETE:
        raise PriorError(
            f"{path}: {kind} says more of its network than betas, which nothing here reads: allowed are the discrete"
            f" DDPM, DDIM, PNDM, Euler, Heun, LMS, KDPM2, DEIS, DPMSolver, UniPC and SASolver schedulers, and {FLOW}"
        )
    _refuse_others(config, SCHEDULER_ONLY, path)
    known = SAMPLING | READ | set(SCHEDULER_ONLY) | old_steps
    _refuse_unknown(config, known, f"{path}: {kind or 'the scheduler'}")


def _refuse_unknown(config: dict[str, Any], known: set[str] | frozenset[str], who: str) -> None:
    said = {key for key, value in config.items() if value is not None and value is not False}
    unknown = [key for key in config if key in said - known and not key.startswith("_")]
    if unknown:
        named = ", ".join(f"{key}={str(config[key])[:60]}" for key in unknown[:3])
        raise PriorError(f"{who} has no {named}: misspelt, or of a newer diffusers; correct it, or remove it")


def _refuse_others(config: dict[str, Any], only: dict[str, tuple[Any, str]], path: Path) -> None:
    for key, (fitting, why) in only.items():
        value = config.get(key)
        if value is not None and value != fitting:
            raise PriorError(f"{path}: {key}={str(value)[:60]} {why}")
