"""DINO image features (Caron et al. 2021) from timm, read from a local file, never downloaded during a run.

timm is imported where it is used: no other run needs it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from particledaps.checkout import ROOT
from particledaps.priors.cards import refuse_known_file
from particledaps.priors.errors import PriorError

SIDE = 224
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
CHECKPOINTS = ROOT / "checkpoints"


def dino_weights(model: str, path: str | None) -> Path | None:
    """The weight file of timm's ``model``: ``path`` if given, else that of ``download.sh`` or the hub's cache, or None.

    Raises:
        PriorError: ``path`` is given and does not exist, or timm knows no such model.
    """
    import timm
    from huggingface_hub import try_to_load_from_cache

    if not timm.is_model(model.split(".")[0]):
        raise PriorError(f"repulsion_dino_model={model}: timm knows no such model")
    if path is not None:
        if not Path(path).is_file():
            raise PriorError(f"repulsion_dino_path={path}: no such file")
        return Path(path)
    if (fetched := CHECKPOINTS / f"{model}.safetensors").is_file():
        return fetched
    config = timm.get_pretrained_cfg(model)
    if config is None or not config.hf_hub_id:
        return None
    found = (try_to_load_from_cache(config.hf_hub_id, name) for name in WEIGHT_FILES)
    return next((Path(f) for f in found if isinstance(f, str)), None)


class DinoFeatures(nn.Module):
    """CLS token of a frozen vision transformer: ``(B, 3, H, W)`` in [-1, 1] -> ``(B, F)``, differentiable.

    Images are clipped to [0, 1], resized to 224 px (bicubic up, antialiased bilinear down) and normalised with the
    ImageNet mean and deviation. RLSD feeds 512 px decodes unscaled to the same network.

    Args:
        model: timm name, e.g. ``vit_small_patch16_224.dino``.
        weights: its weight file, safetensors or a state dict.

    Raises:
        PriorError: the file does not hold this model's weights, or is another than its card or first download.
    """

    def __init__(self, model: str, weights: Path) -> None:
        import timm
        from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        super().__init__()
        refuse_known_file(weights)
        self.network = timm.create_model(model, pretrained=False, num_classes=0)
        try:
            safe = weights.suffix == ".safetensors"
            state = load_file(weights) if safe else torch.load(weights, map_location="cpu", weights_only=True)
            self.network.load_state_dict({k: v for k, v in state.items() if not k.startswith("head.")})
        except Exception as error:
            raise PriorError(
                f"{weights} does not hold the weights of {model}: {' '.join(str(error).split())[:200]}"
            ) from error
        self.eval().requires_grad_(False)
        for name, value in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
            self.register_buffer(name, torch.tensor(value).reshape(1, 3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features of a batch of images; grey images repeat their channel."""
        x = (x / 2 + 0.5).clamp(0, 1).expand(-1, 3, -1, -1)
        down = x.shape[-1] > SIDE
        x = F.interpolate(x, (SIDE, SIDE), mode="bilinear" if down else "bicubic", antialias=down)
        return self.network((x - self.mean) / self.std)
