"""Are the weights that others published here, and are they what their cards say?"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from particledaps.checksums import sha256_of
from particledaps.doctor.installation import NOTE, OK, PROBLEM, Finding
from particledaps.evaluation.lpips import LpipsError, lpips_files, read_lpips
from particledaps.priors.cards import Card, problem_with_file, read_cards
from particledaps.priors.dino import DinoFeatures, dino_weights
from particledaps.priors.errors import PriorError


def card_findings(selected: Card | None) -> list[Finding]:
    """Every known file: what is here is held against its card, what is not is listed once.

    Args:
        selected: the card of the prior that is being examined; its absence is no news here, loading it tells.
    """
    findings, absent = [], {}
    for card in read_cards().values():
        if card.file is None:
            continue
        path, folder = card.path(), card.converted()
        if path.exists():
            findings.append(_file_finding(card, path))
        elif card is not selected and not (folder is not None and folder.exists()) and card.in_all:
            absent[card.download] = None
        if folder is not None and (folder / "card.json").is_file():
            findings.append(_conversion_finding(card, folder))
    if absent:
        text = f"not on this machine: {', '.join(absent)}"
        findings.append(Finding(OK, text + " (bash download.sh NAME, when you need one)"))
    return findings


def _file_finding(card: Card, path: Path) -> Finding:
    problem = problem_with_file(card)
    if problem is None:
        return Finding(OK, f"{card.name}: {path} agrees with what is known of it")
    return Finding(PROBLEM, f"{card.name}: {path} {problem}", f"delete it, then: {card.command()}")


def _conversion_finding(card: Card, folder: Path) -> Finding:
    """Whether the conversion's record names the file that the card knows."""
    again = f"delete {folder}, then: {card.command()}"
    try:
        source = json.loads((folder / "card.json").read_text()).get("source_sha256")
    except (OSError, ValueError, AttributeError) as error:
        return Finding(PROBLEM, f"{card.name}: {folder / 'card.json'} is damaged: {error}", again)
    known = card.sha256
    if known is None and card.path().is_file():
        known = sha256_of(card.path())
    if source is not None and known is not None and source != known:
        return Finding(PROBLEM, f"{card.name}: {folder} was converted from another file", again)
    return Finding(OK, f"{card.name}: converted to {folder}")


def lpips_finding() -> Finding:
    """Whether LPIPS can be computed."""
    fetch = "bash download.sh lpips"
    missing = [path.name for path in lpips_files() if not path.is_file()]
    if missing:
        return Finding(NOTE, f"LPIPS is left out of results: {' and '.join(missing)} missing", fetch)
    try:
        lpips = read_lpips(torch.device("cpu"))
        image = torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
        with torch.no_grad():
            same, other = lpips(image, image).item(), lpips(image, image.flip(-1)).item()
    except LpipsError as error:
        return Finding(PROBLEM, f"LPIPS is left out of results: {_line(error)}", f"delete the file, then: {fetch}")
    except Exception as error:
        return Finding(PROBLEM, f"LPIPS cannot be loaded: {_line(error)}", f"delete {lpips_files()[0].parent}; {fetch}")
    if not (abs(same) < 1e-6 < other):
        return Finding(PROBLEM, f"LPIPS of an image with itself is {same:.3g}, with another {other:.3g}", fetch)
    return Finding(OK, "LPIPS works")


def dino_finding(model: str, path: str | None) -> Finding:
    """Whether repulsion can compare DINO features.

    Args:
        model: ``repulsion_dino_model``.
        path: ``repulsion_dino_path``.
    """
    try:
        weights = dino_weights(model, path)
        if weights is None:
            text = f"no weights of {model}: repulsion compares latents instead (repulsion_features=latent)"
            return Finding(NOTE, text, "bash download.sh dino")
        features = DinoFeatures(model, weights)(torch.zeros(1, 3, 64, 64))
    except PriorError as error:
        return Finding(PROBLEM, _line(error), "delete it, then: bash download.sh dino")
    return Finding(OK, f"DINO works: {features.shape[-1]} features of {model} from {weights}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:240]
