"""What is known of checkpoints that others published: the reader of ``cards.yaml``.

``download.sh`` reads the same file with awk, so that it needs no Python before its first connection.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import torch
import yaml

from particledaps.checkout import ROOT
from particledaps.checksums import sha256_of
from particledaps.diffusion.noise import alphas_cumprod, linear_betas, scaled_linear_betas
from particledaps.priors.errors import PriorError

CARDS = Path(__file__).with_name("cards.yaml")
CHECKSUMS = "checksums.txt"
PLACES = ("checkpoints", "torch_hub", "dataset")
SCHEDULES = {"linear": linear_betas, "scaled_linear": scaled_linear_betas}
WEB_PAGE = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")


@dataclass(frozen=True)
class Card:
    """One checkpoint, feature network or test set.

    Attributes:
        name: its key in ``cards.yaml``.
        title: one line for people.
        licence: of the weights or images.
        megabytes: size, rounded up; a guess where ``verified`` says so.
        download: the argument of ``download.sh`` that fetches it; None: not by that script.
        in_all: whether ``download.sh all`` fetches it.
        hub: id on the Hugging Face hub, for folders that diffusers loads.
        url: where the file or its archive comes from.
        page: page for a browser, where ``url`` may answer with a warning instead.
        terms: page where its terms must be accepted first.
        fetched_as: name of the archive; None: the file itself is fetched.
        member: file of the archive; None: the whole archive becomes the folder ``file``.
        place: ``checkpoints`` (the cache folder), ``torch_hub`` or ``dataset``.
        file: its name there.
        bytes: exact size of ``file``, where known.
        sha256: of ``file``, where known; else recorded at the first download.
        becomes: folder that ``tools/convert_checkpoint.py`` makes of it.
        family: the ``--family`` of that conversion.
        model: ``model=`` that reads it.
        range: smallest and largest value of its images.
        schedule: ``linear`` or ``scaled_linear`` with first beta, last beta and number of timesteps.
        prediction: what the network predicts.
        classes: how it is conditioned.
        verified: what these facts rest on.
    """

    name: str
    title: str
    licence: str
    megabytes: int
    download: str | None = None
    in_all: bool = True
    hub: str | None = None
    url: str | None = None
    page: str | None = None
    terms: str | None = None
    fetched_as: str | None = None
    member: str | None = None
    place: str = "checkpoints"
    file: str | None = None
    bytes: int | None = None
    sha256: str | None = None
    becomes: str | None = None
    family: str | None = None
    model: str | None = None
    range: str | None = None
    schedule: str | None = None
    prediction: str | None = None
    classes: str | None = None
    verified: str | None = None

    def path(self) -> Path | None:
        """Where ``download.sh`` puts the file; None for what only the hub holds."""
        folders = {"checkpoints": cache_folder(), "torch_hub": torch_hub_folder(), "dataset": ROOT / "dataset"}
        return None if self.file is None else folders[self.place] / self.file

    def model_paths(self) -> list[str]:
        """The values of ``model.path`` that stand for this card, and not for a folder of the user's own."""
        local = [f"checkpoints/{name}" for name in (self.becomes, self.file) if name is not None]
        return local if self.hub is None else [self.hub, *local]

    def command(self) -> str:
        """What fetches it."""
        return f"hf download {self.hub}" if self.download is None else f"bash download.sh {self.download}"

    def converted(self) -> Path | None:
        """The folder that the conversion leaves, if the checkpoint needs one."""
        return None if self.becomes is None else cache_folder() / self.becomes

    def sigmas(self) -> torch.Tensor | None:
        r""":math:`\sqrt{1 / \bar\alpha_t - 1}` of the training schedule, ``(T,)`` float64; None where there is none."""
        if self.schedule is None:
            return None
        kind, start, end, steps = self.schedule.split()
        return (1 / alphas_cumprod(SCHEDULES[kind](int(steps), float(start), float(end))) - 1).sqrt()


def cache_folder() -> Path:
    """``PARTICLEDAPS_CACHE``, else ``checkpoints`` of this checkout, as in ``download.sh``."""
    return Path(os.environ.get("PARTICLEDAPS_CACHE") or ROOT / "checkpoints").absolute()


def torch_hub_folder() -> Path:
    """Where torch hub keeps weights."""
    return Path(torch.hub.get_dir()) / "checkpoints"


@cache
def read_cards(path: Path = CARDS) -> dict[str, Card]:
    """Every card by name, in the order of the file.

    Raises:
        PriorError: the file is damaged, or a card has an unknown, missing or impossible entry.
    """
    try:
        entries = yaml.safe_load(path.read_text())
        return {name: _read_card(name, entry) for name, entry in entries.items()}
    except (OSError, yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise PriorError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def _read_card(name: str, entry: dict[str, object]) -> Card:
    unknown = set(entry) - {f.name for f in fields(Card)}
    if unknown:
        raise ValueError(f"{name} has unknown entries: {', '.join(sorted(unknown))}")
    card = Card(name, **entry)
    if card.place not in PLACES:
        raise ValueError(f"{name}: place={card.place}: allowed are {', '.join(PLACES)}")
    if card.schedule is not None and (len(card.schedule.split()) != 4 or card.schedule.split()[0] not in SCHEDULES):
        raise ValueError(f"{name}: schedule={card.schedule}: must be {' or '.join(SCHEDULES)}, two betas, a number")
    return card


def card_of_model(model: str) -> Card | None:
    """The card that ``model=<model>`` reads, if there is one."""
    return next((card for card in read_cards().values() if card.model == model), None)


def recorded_checksums(folder: Path) -> dict[str, str]:
    """Checksums that ``download.sh`` recorded in ``folder``: absolute path -> sha256."""
    try:
        lines = (folder / CHECKSUMS).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    return {str(folder / line[66:]): line[:64] for line in lines if line[64:66] == "  "}


def is_web_page(path: Path) -> bool:
    """Whether a file begins like HTML or a host's error message: saved instead of what was asked for."""
    with path.open("rb") as file:
        start = file.read(1024).replace(b"\0", b"").strip().lower()
    return start.lstrip(b"\xef\xbb\xbf").startswith(WEB_PAGE)


def problem_with_file(card: Card) -> str | None:
    """What is wrong with the file that lies at ``card.path()``; None where it agrees with all that is known of it."""
    path = card.path()
    if path.is_dir():
        return None if any(path.iterdir()) else "is an empty folder"
    if is_web_page(path):
        return "is a web page, not the file"
    if card.bytes is not None and path.stat().st_size != card.bytes:
        return f"has {path.stat().st_size} bytes, not {card.bytes}"
    known = card.sha256 or _recorded(path)
    if known is not None and sha256_of(path) != known:
        return "has another sha256 than its card or its first download"
    return None


def refuse_known_file(path: Path) -> None:
    """A weight file that a card describes must be what the card, or its first download, says.

    Raises:
        PriorError: it is another one.
    """
    for card in read_cards().values():
        own = card.path()
        if own is None or not own.is_file() or not path.samefile(own):
            continue
        if (problem := problem_with_file(card)) is not None:
            raise PriorError(f"{path} {problem}: delete it, then: {card.command()}")


def record_checksum(card: Card) -> None:
    """Note the checksum of a file that was just used and of which none is known (trust on first use).

    From then on :func:`problem_with_file` and ``download.sh`` compare it. A folder that cannot be written is no error.
    """
    folder, path = cache_folder(), card.path()
    if card.sha256 is not None or _recorded(path) is not None:
        return
    name = path.absolute()
    name = name.relative_to(folder) if name.is_relative_to(folder) else name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / CHECKSUMS).open("a") as file:
            file.write(f"{sha256_of(path)}  {name}\n")
    except OSError:
        pass


def _recorded(path: Path) -> str | None:
    """The checksum of a file's first download: in the cache folder, or beside the file that a link leads to."""
    target = path.resolve()
    folders = (cache_folder().resolve(), cache_folder(), target.parent)
    sums = {name: known for folder in folders for name, known in recorded_checksums(folder).items()}
    return sums.get(str(target)) or sums.get(str(path.absolute()))
