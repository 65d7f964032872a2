"""What a machine offers a run: Python, packages, device, disk. Imports nothing that may be missing."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

OK = "ok"
NOTE = "note"
PROBLEM = "problem"
OLDEST_PYTHON = (3, 11)
TOOLS = ("pytest", "ruff")
"""Packages that only development needs."""
MIN_FREE_GB, COMFORTABLE_FREE_GB = 0.2, 5.0


@dataclass(frozen=True)
class Finding:
    """One line of a diagnosis.

    Attributes:
        state: ``ok``, ``note`` (works, but should be known) or ``problem``.
        text: what was found.
        remedy: what to do about it.
        table: further lines, as they are.
    """

    state: str
    text: str
    remedy: str | None = None
    table: tuple[str, ...] = ()


def python_finding(version: tuple[int, int] = sys.version_info[:2]) -> Finding:
    """Whether this Python is new enough."""
    wanted = ".".join(map(str, OLDEST_PYTHON))
    if version >= OLDEST_PYTHON:
        return Finding(OK, f"Python {platform.python_version()} ({sys.executable})")
    text = f"Python {'.'.join(map(str, version))}, needs {wanted} or newer"
    return Finding(PROBLEM, text, f"make setup PYTHON=python{wanted}")


def requirements(path: Path) -> dict[str, str]:
    """Package -> version of a ``requirements.txt`` of ``name==version`` lines."""
    return dict(re.findall(r"^([\w.-]+)==([\w.+!]+)", path.read_text(), re.MULTILINE))


def package_findings(wanted: dict[str, str]) -> list[Finding]:
    """Which packages are missing or have another version than the tested one."""
    missing, other = [], []
    for name, version in wanted.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if found.split("+")[0] != version:  # a build such as 2.12.1+cu130 is the same version
            other.append(f"{name} {found} (tested: {version})")
    findings = [
        Finding(NOTE if name in TOOLS else PROBLEM, f"{name} is not installed", _install(f"{name}=={wanted[name]}"))
        for name in missing
    ]
    if other:
        findings.append(Finding(NOTE, "other versions than the tested ones: " + ", ".join(other), _install()))
    same = len(wanted) - len(missing) - len(other)
    return [Finding(OK, f"{same} of {len(wanted)} packages as in requirements.txt"), *findings]


def _install(what: str = "-r requirements.txt") -> str:
    return f"{sys.executable} -m pip install {what}  (or: make setup)"


def disk_finding(folder: Path) -> Finding:
    """Whether results still fit on the disk of ``folder``, which need not exist yet."""
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free / 1e9
    text = f"{free:.1f} GB free for {folder}"
    if not os.access(existing, os.W_OK):
        return Finding(PROBLEM, f"{existing} cannot be written", "choose another folder with save_dir=FOLDER")
    if free < MIN_FREE_GB:
        return Finding(PROBLEM, text, "make room, or choose another disk with save_dir=FOLDER")
    if free < COMFORTABLE_FREE_GB:
        return Finding(NOTE, text + ": enough for runs, not for large checkpoints", "PARTICLEDAPS_CACHE=FOLDER")
    return Finding(OK, text)
