"""Files of weights: there, whole, what they seem to be, and every number in them a number."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from priors.prior import PriorError


def check_finite(weights: dict[str, torch.Tensor], where: Path) -> None:
    """Every number of a network is one: a broken download or training would only show as diverged particles.

    Raises:
        PriorError: a tensor holds a NaN or an infinity; the first such is named.
    """
    for name, value in weights.items():
        extremes = value.aminmax() if value.numel() else ()  # one pass, a twentieth of isfinite's time; NaN spreads
        if not all(torch.isfinite(extreme) for extreme in extremes):
            raise PriorError(f"{where}: {name} is not finite (NaN or infinity): fetch, convert or export it again")


def load_table(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file.

    Raises:
        PriorError: it is damaged, or holds a NaN or an infinity.
    """
    _check_file(path)
    table = load_file(path)
    check_finite(table, path)
    return table


def check_weights(folder: Path) -> list[Path]:
    """The files of weights in a network's folder: there and, where they are safetensors, whole.

    Raises:
        PriorError: there are none, or a file is damaged or something else.
    """
    found = (sorted(folder.glob(f"diffusion_pytorch_model*{suffix}")) for suffix in (".safetensors", ".bin"))
    files = next(filter(None, found), [])
    if not files:
        raise PriorError(f"{folder} holds no weights (diffusion_pytorch_model.safetensors): fetch the checkpoint again")
    for file in files:
        _check_file(file)
    return files


def _check_file(path: Path) -> None:
    if instead := disguise(path):
        raise PriorError(f"{path} holds no weights{instead}")
    if path.suffix != ".safetensors":
        return
    try:
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise PriorError(f"{path} is not a readable safetensors file (truncated download?): {error}") from error


def disguise(path: Path) -> str:
    """What a file that should hold weights or JSON is instead, with what to do; empty if it is not known."""
    with path.open("rb") as handle:
        start = handle.read(256).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return ": it is a web page saved as a file (a login or quota page?); download it again"
    if start.startswith(b"version https://git-lfs"):
        return ": it is a git-lfs pointer; run git lfs pull, or download it again"
    return ""
