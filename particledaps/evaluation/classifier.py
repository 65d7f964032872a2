"""A small classifier of one data set: its features tell sets of images apart, its classes judge conditional priors.

A folder holds ``config.json`` (name, channels, class names, accuracy) and ``classifier.safetensors`` (float16).
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from particledaps.evaluation.features import BATCH, FeatureNetwork, FeaturesError
from particledaps.files import write_atomically

WEIGHTS, CONFIG = "classifier.safetensors", "config.json"
FEATURES = 64


class ClassifierNetwork(nn.Module):
    """Three convolutions that halve the side, 64 features, one linear layer.

    Args:
        channels: of the images.
        num_classes: of the data set.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        widths = (channels, 16, 32, 64)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in widths[1:])
        self.features = nn.Linear(64 * 16, FEATURES)
        self.classes = nn.Linear(FEATURES, num_classes)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """``(B, C, H, W)`` in [-1, 1] -> ``(B, 64)``, before the activation: none of them is dead."""
        x = images
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.max_pool2d(F.silu(norm(layer(x))), 2)
        return self.features(F.adaptive_avg_pool2d(x, 4).flatten(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits ``(B, classes)``."""
        return self.classes(F.silu(self.embed(images)))


@dataclass(frozen=True)
class Classifier:
    """A trained classifier.

    Attributes:
        name: of the data set; distances of its features are named after it, as ``fd_fashion``.
        network: on the device where it computes.
        class_names: of the data set.
        accuracy: on its test images.
    """

    name: str
    network: ClassifierNetwork
    class_names: tuple[str, ...]
    accuracy: float

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.network.parameters()).device

    @property
    def features(self) -> FeatureNetwork:
        """Its 64 features."""
        return FeatureNetwork(self.name, FEATURES, lambda images: self.network.embed(images.to(self.device)))

    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """The likeliest class of each image, ``(N,)``."""
        with torch.no_grad():
            return torch.cat([self.network(part.to(self.device)).argmax(1).cpu() for part in images.split(BATCH)])


def save_classifier(folder: Path, network: ClassifierNetwork, facts: dict[str, Any]) -> None:
    """Write a folder that :func:`load_classifier` reads; ``facts`` holds name, class_names and accuracy."""
    config = {"channels": network.layers[0].in_channels} | facts
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in network.state_dict().items()}, folder / WEIGHTS)
    write_atomically(folder / CONFIG, json.dumps(config, indent=1) + "\n")


def load_classifier(folder: Path, device: torch.device | str = "cpu") -> Classifier:
    """The classifier in a folder.

    Raises:
        FeaturesError: there is none, or it is damaged.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
        names = tuple(map(str, config["class_names"]))
        network = ClassifierNetwork(config["channels"], len(names))
        network.load_state_dict({name: value.float() for name, value in load_file(folder / WEIGHTS).items()})
        known = str(config["name"]), float(config["accuracy"])
    except FileNotFoundError as error:
        raise FeaturesError(f"no classifier in {folder}: {Path(error.filename or WEIGHTS).name} is missing") from error
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError, OSError) as error:
        raise FeaturesError(f"the classifier in {folder} is damaged: {str(error).splitlines()[0][:160]}") from error
    return Classifier(known[0], network.to(device).eval().requires_grad_(False), names, known[1])


def train_classifier(
    images: torch.Tensor, labels: torch.Tensor, num_classes: int, epochs: int, seed: int, learning_rate: float = 3e-3
) -> ClassifierNetwork:
    """Cross-entropy by AdamW, batches of 128, the learning rate falling to 0 as a half cosine.

    Args:
        images: ``(N, C, H, W)`` in [-1, 1].
        labels: ``(N,)``.
        num_classes: of the data set.
        epochs: passes over the images.
        seed: of weights and order.
        learning_rate: at the start.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ClassifierNetwork(images.shape[1], num_classes)
    steps = epochs * -(-len(images) // 128)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(128):
            optimizer.zero_grad()
            F.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return network.eval()
