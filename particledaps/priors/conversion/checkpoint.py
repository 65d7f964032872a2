"""Opening a checkpoint of unknown origin: only tensors come out, nothing in it is run.

Pickles are read with torch's restricted reader; the few classes that old training frameworks leave beside the weights
are replaced, by name, with an empty stand-in. Everything else is refused.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from particledaps.priors.conversion.mapping import State
from particledaps.priors.errors import PriorError

HARMLESS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)
NEW_DOWNLOAD = "download it again"
MEGABYTE = 2**20


class _StandIn:
    """Takes the place of a class that is only bookkeeping; holds nothing."""

    def __new__(cls, *arguments: Any, **named: Any) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_content(path: Path) -> dict[Any, Any]:
    """What a checkpoint holds: tensors by name, or entries below which they stand.

    Args:
        path: a PyTorch checkpoint or safetensors.

    Raises:
        PriorError: the file is absent, is no checkpoint, is damaged, or refers to code; one sentence each.
    """
    head = _head(path)
    if head[8:9] == b"{":  # after the length of its header, safetensors begins with JSON
        return _read_safetensors(path)
    _refuse_other_files(path, head)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = _read_pickle(path)
    if not isinstance(content, dict) or not content:
        raise PriorError(f"{path} holds {type(content).__name__} instead of named weights (a state dict)")
    return content


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal; shows progress on a terminal."""
    digest = hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as file, tqdm(total=size, unit="B", unit_scale=True, desc="sha256", disable=None) as bar:
        while block := file.read(8 * MEGABYTE):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def _head(path: Path) -> bytes:
    if path.is_dir():
        raise PriorError(f"{path} is a folder; a folder in diffusers' layout is used as it is, without conversion")
    if not path.is_file():
        raise PriorError(f"{path}: no such file")
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise PriorError(f"{path} is empty: {NEW_DOWNLOAD}")
    return head


def _refuse_other_files(path: Path, head: bytes) -> None:
    """Recognise what people save by mistake under a checkpoint's name."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--")):
        raise PriorError(
            f"{path} is a web page (HTML), not a checkpoint: the server wanted a confirmation; {NEW_DOWNLOAD}"
        )
    if text.startswith(b"version https://git-lfs"):
        raise PriorError(f"{path} is a Git LFS pointer, not the checkpoint: fetch it with 'git lfs pull'")
    if head.startswith(b"PK\x03\x04"):
        _refuse_other_zips(path)


def _refuse_other_zips(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        size = path.stat().st_size
        raise PriorError(f"{path} is truncated ({size:,} bytes, the archive's end is missing): {NEW_DOWNLOAD}")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if not any(name.endswith("data.pkl") for name in names):
        raise PriorError(f"{path} is an archive of {', '.join(names[:4])}, not a checkpoint: unpack it first")


def _read_pickle(path: Path) -> Any:
    allowed = [(_StandIn, name) for name in HARMLESS]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except EOFError as error:
        raise PriorError(f"{path} is truncated ({path.stat().st_size:,} bytes): {NEW_DOWNLOAD}") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise PriorError(_why_not(path, error)) from error


def _why_not(path: Path, error: Exception) -> str:
    text = " ".join(str(error).split())
    if found := re.search(r"GLOBAL (\S+)", text):
        return (
            f"{path} refers to {found[1]}, which no weights need and which could run code: refused;"
            " get the file from its official source"
        )
    if isinstance(error, pickle.UnpicklingError) and "reduce" in text:
        return f"{path} asks to call a function while it is opened: refused; get the file from its official source"
    size = path.stat().st_size
    return f"{path} is no readable PyTorch checkpoint ({size:,} bytes; truncated or of another kind?): {NEW_DOWNLOAD}"


def _read_safetensors(path: Path) -> State:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        text = " ".join(str(error).split())[:120]
        raise PriorError(f"{path} is no readable safetensors file (truncated?): {text}; {NEW_DOWNLOAD}") from error
