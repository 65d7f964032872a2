"""Files of weights: there, whole, what they seem to be, and every number in them a number."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from particledaps.priors.errors import PriorError

SHARD = r"-\d{5}-of-\d{5}"
PRECISIONS = ("fp32", "fp16", "bf16")
"""Variants that are the same network in another precision; others (``non_ema``) are other weights."""
OTHER_WEIGHTS = (".safetensors", ".bin", ".msgpack", ".ckpt", ".pt", ".pth", ".onnx", ".gguf")


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


@dataclass(frozen=True)
class WeightFiles:
    """The files of one network.

    Attributes:
        files: one, or several shards.
        variant: of diffusers' names (``fp16``); None for the plain ones.
    """

    files: list[Path]
    variant: str | None = None

    @property
    def safetensors(self) -> bool:
        """Are they safetensors? Else they are pickles, opened without code."""
        return self.files[0].suffix == ".safetensors"


def find_weights(folder: Path, stem: str = "diffusion_pytorch_model") -> WeightFiles:
    """The files of weights in a network's folder: there, complete and, where they are safetensors, whole.

    Plain files come first, then safetensors, then the variants of a precision: ``fp32``, ``fp16``, ``bf16``.

    Args:
        folder: of the network.
        stem: of the files' names.

    Raises:
        PriorError: there are none that are known to be the network's, or a file is damaged or something else.
    """
    sets: dict[tuple[str | None, str], list[Path]] = {}
    pattern = re.compile(rf"{stem}(?:\.([\w-]+?))?(?:{SHARD})?(?:\.([\w-]+?))?\.(safetensors|bin)")
    for file in sorted(folder.iterdir()):
        if found := pattern.fullmatch(file.name):
            sets.setdefault((found[1] or found[2], found[3]), []).append(file)
    wanted = [(variant, suffix) for variant in (None, *PRECISIONS) for suffix in ("safetensors", "bin")]
    chosen = next((key for key in wanted if key in sets), None)
    if chosen is None:
        raise PriorError(_no_weights(folder, stem, [file.name for files in sets.values() for file in files]))
    _check_shards(folder, stem, sets[chosen])
    for file in sets[chosen]:
        _check_file(file)
    return WeightFiles(sets[chosen], chosen[0])


def _no_weights(folder: Path, stem: str, variants: list[str]) -> str:
    if variants:
        return (
            f"{folder} holds {', '.join(variants[:4])}, which may be other weights than the network's own: name the "
            f"file that is meant {stem}.safetensors"
        )
    others = [file.name for file in sorted(folder.iterdir()) if file.suffix in OTHER_WEIGHTS]
    instead = f", only {', '.join(others[:4])}" if others else ""
    return f"{folder} holds no weights ({stem}.safetensors){instead}: fetch the checkpoint again"


def _check_shards(folder: Path, stem: str, files: list[Path]) -> None:
    """Every shard of so many, and the index that names them."""
    shards = [found for file in files if (found := re.search(SHARD, file.name))]
    if not shards or len(shards) < len(files):
        return
    total = int(shards[0][0].rpartition("-")[2])
    if len(shards) != total:
        raise PriorError(f"{folder} holds {len(shards)} of {total} shards ({files[0].name}, ...): fetch the others")
    if not any(folder.glob(f"{stem}*.index*.json")):
        index = f"{stem}{files[0].suffix}.index.json"
        raise PriorError(f"{folder}: {index} is missing, which names its shards: fetch it")


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
