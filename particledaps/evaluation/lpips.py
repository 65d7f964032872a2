"""LPIPS from the weight files on this machine, opened as data and held against their checksums at every load.

``piq.LPIPS()`` unpickles both files with code and without a checksum; the network here is built by hand and gives the
same numbers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from particledaps.priors.cards import Card, problem_with_file, read_cards, record_checksum

if TYPE_CHECKING:  # their imports take seconds, and only where the weights are here they are needed
    from piq import ContentLoss

LPIPS_FILES = ("vgg16-397923af.pth", "lpips_weights.pt")
LAYERS = {"relu1_2": 64, "relu2_2": 128, "relu3_3": 256, "relu4_3": 512, "relu5_3": 512}
"""Layers that are compared, and their channels."""


class LpipsError(Exception):
    """LPIPS cannot be computed: the message is the rest of a sentence, why not and what to do."""


def lpips_files() -> list[Path]:
    """The two weight files that LPIPS needs, where torch hub keeps them."""
    return [Path(torch.hub.get_dir()) / "checkpoints" / name for name in LPIPS_FILES]


def load_lpips(device: torch.device) -> ContentLoss | None:
    """LPIPS, or None where :func:`read_lpips` tells why not; nothing is downloaded."""
    try:
        return read_lpips(device)
    except LpipsError:
        return None


def read_lpips(device: torch.device) -> ContentLoss:
    r"""LPIPS (Zhang et al. 2018) with VGG16 and average pooling, as ``piq.LPIPS(replace_pooling=True)``.

    :math:`\sum_l \mathrm{mean}_{hw} \sum_c w_{lc} (\hat f_{lc}(x) - \hat f_{lc}(y))^2`, ``(B,)``, of images in [0, 1].
    A file whose checksum nothing tells is recorded once it was loaded, and compared from then on.

    Raises:
        LpipsError: a file is missing, damaged, holds code, or is another than its card or its first download.
    """
    files = lpips_files()
    if not all(path.is_file() for path in files):
        raise LpipsError("its weights are not on this machine (bash download.sh lpips)")
    cards = [next(card for card in read_cards().values() if card.file == path.name) for path in files]
    for card in cards:
        _check(card)
    backbone, weights = (_read(path) for path in files)
    network = _build(_features(backbone, files[0]), _layer_weights(weights, files[1]))
    for card in cards:
        record_checksum(card)
    return network.to(device)


def _build(features: nn.Module, weights: list[torch.Tensor]) -> ContentLoss:
    import piq
    from piq.perceptual import VGG16_LAYERS

    layers = [VGG16_LAYERS[name] for name in LAYERS]
    more = {"distance": "mse", "reduction": "none", "replace_pooling": True, "normalize_features": True}
    return piq.ContentLoss(features, layers=layers, weights=weights, **more)


def _check(card: Card) -> None:
    try:
        problem = problem_with_file(card)
    except OSError as error:
        raise LpipsError(f"{card.path()} cannot be read: {error.strerror}") from error
    if problem is not None:
        raise _refusal(card.path(), problem)


def _read(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = "is damaged" if found is None else f"refers to {found[1]}, code that no weights need (it did not run)"
        raise _refusal(path, reason) from error


def _features(state: object, path: Path) -> nn.Module:
    """The convolutions of torchvision's VGG16 from its state dict; the classifier is not needed."""
    from torchvision.models import vgg16

    with torch.device("meta"):  # draws no random weights
        features = vgg16(weights=None, init_weights=False).features
    prefix = "features."
    try:
        own = {name.removeprefix(prefix): w.detach().float() for name, w in state.items() if name.startswith(prefix)}
        features.load_state_dict(own, assign=True)
    except (AttributeError, TypeError, RuntimeError) as error:
        raise _refusal(path, "does not hold the weights of VGG16") from error
    return features.eval().requires_grad_(False)


def _layer_weights(weights: object, path: Path) -> list[torch.Tensor]:
    expected = [(1, channels, 1, 1) for channels in LAYERS.values()]
    is_list = isinstance(weights, list | tuple) and all(isinstance(w, torch.Tensor) for w in weights)
    if not is_list or [tuple(w.shape) for w in weights] != expected:
        raise _refusal(path, "does not hold the five layer weights of LPIPS")
    return [w.detach() for w in weights]


def _refusal(path: Path, reason: str) -> LpipsError:
    return LpipsError(f"{path} {reason} (delete it, then: bash download.sh lpips)")
