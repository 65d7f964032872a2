"""The space in which repulsion measures distances."""

import torch

from operators.operator import IDENTITY, Operator
from priors.dino import DinoFeatures, dino_weights
from priors.prior import Prior
from repulsion import FeatureSpace, ImageSpace, LatentSpace, low_pass
from runs.checks import SettingsError
from runs.hook_settings import HookKeys


def build_feature_space(keys: HookKeys, prior: Prior, operator: Operator, device: torch.device) -> FeatureSpace:
    """The space that ``repulsion_features`` and ``repulsion_kernel`` name.

    Raises:
        SettingsError: DINO is asked for without weights, or the kernel needs a symmetry that the operator lacks.
        PriorError: DINO's weights are wrong.
    """
    kind, weights = keys.repulsion_features, None
    odd = keys.repulsion_kernel == "odd"
    if kind in ("auto", "dino"):
        weights = dino_weights(keys.repulsion_dino_model, keys.repulsion_dino_path)
        if weights is None and kind == "dino":
            raise SettingsError(
                f"repulsion_features=dino: no weights of {keys.repulsion_dino_model} in the hub's cache; set "
                "repulsion_dino_path=FILE, or use repulsion_features=latent or pixel, which need none"
            )
        kind = "dino" if weights is not None else "pixel" if odd else "latent"
    symmetries = operator.symmetries()
    if keys.repulsion_kernel != "plain" and len(symmetries) < 2:
        raise SettingsError(
            f"repulsion_kernel={keys.repulsion_kernel}: the operator {operator.name} has no symmetry; use plain"
        )
    seen = symmetries if keys.repulsion_kernel == "quotient" else (IDENTITY,)
    if kind == "latent":
        return LatentSpace(prior, seen)
    features = DinoFeatures(keys.repulsion_dino_model, weights).to(device) if kind == "dino" else low_pass
    return ImageSpace(prior, features, kind, seen, symmetries[1] if odd else None)
