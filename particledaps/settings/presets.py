"""Values of the sampler that were measured for a prior and a task (``preset=auto``), as a file that can be pinned.

A preset fills what nobody set: a key that the configuration names stays as it is. A run's configuration holds the
values, so a run with ``preset=FILE`` is the same run as one with these values written out.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from particledaps.checks import SettingsError
from particledaps.settings.schema import AUTO, AnnealingSettings, ChainConfig, OdeSettings, SamplerConfig

NAME = "preset.yaml"
PARTS = {"annealing": AnnealingSettings, "ode": OdeSettings, "mcmc": ChainConfig}
HEAD = """# What preset=auto measured for this prior and task. A resumed run takes these values; any other run does with
# preset=THIS_FILE. Keys that the command line names go first.
"""


def preset_of(preset: str | None, folder: Path, made_for: str) -> dict[str, Any] | None:
    """The sampler's values that ``preset`` stands for; None where there are none, or they are still to be measured.

    Args:
        preset: the key.
        folder: of the run, where ``auto`` keeps them.
        made_for: identity of what is asked for; ``auto`` takes values that were measured for it alone.

    Raises:
        SettingsError: the file cannot be read, or holds what the sampler does not know.
    """
    if preset is None:
        return None
    if preset != AUTO:
        return read_preset(Path(preset))["sampler"]
    if not (folder / NAME).exists():
        return None
    found = read_preset(folder / NAME)
    return found["sampler"] if found.get("made_for") == made_for else None


def read_preset(path: Path) -> dict[str, Any]:
    """What a preset's file holds; its group ``sampler`` has names and values that the sampler takes.

    Raises:
        SettingsError: it has not, or cannot be read.
    """
    try:
        found = yaml.safe_load(path.read_text())
        for part, own in found["sampler"].items():
            OmegaConf.merge(OmegaConf.structured(PARTS[part]), own)  # knows every name, and its type
    except (
        OSError,
        yaml.YAMLError,
        UnicodeDecodeError,
        KeyError,
        TypeError,
        AttributeError,
        OmegaConfBaseException,
    ) as e:
        reason = " ".join(str(e).split())[:160]
        raise SettingsError(
            f"preset={path}: is no preset ({reason}); preset=auto writes one into a run's folder"
        ) from e
    return found


def preset_text(values: dict[str, Any], measured: dict[str, Any], made_for: str) -> str:
    """A preset's file.

    Args:
        values: of the groups ``annealing``, ``ode``, ``mcmc``.
        measured: what they follow from, for people.
        made_for: identity of what was asked for.
    """
    return HEAD + yaml.safe_dump({"sampler": values, "measured": measured, "made_for": made_for}, sort_keys=False)


def filled_from(values: dict[str, Any], sampler: SamplerConfig) -> SamplerConfig:
    """The sampler with every value that nobody set taken from a preset.

    ``space`` and ``covariance`` have no null: where they stand at their defaults, nobody set them.
    """
    parts = {}
    for part, own in values.items():
        given = getattr(sampler, part)
        unset = {"space": "latent", "covariance": "sigma"} if part == "mcmc" else {}
        new = {n: v for n, v in own.items() if getattr(given, n) is None or getattr(given, n) == unset.get(n, object)}
        parts[part] = dataclasses.replace(given, **new)
    return dataclasses.replace(sampler, **parts)
