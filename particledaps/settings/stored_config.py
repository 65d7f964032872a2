"""``config.yaml`` of a run folder, which may hold anything: read within bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from particledaps.checks import SettingsError

MAX_BYTES, MAX_VALUES = 1_000_000, 100_000


class _Plain(yaml.SafeDumper):
    """Writes a value that occurs twice twice, not as an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def dump_config(config: dict[str, Any]) -> str:
    """A merged configuration as YAML."""
    return yaml.dump(config, Dumper=_Plain, sort_keys=False)


def read_config(path: Path) -> dict[str, Any]:
    """The configuration that a run stored.

    Raises:
        SettingsError: it cannot be read, or is no configuration of a run.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        config = yaml.safe_load(path.read_text())
        _count(config, MAX_VALUES)
        if not isinstance(config, dict) or not isinstance(config.get("data"), dict):
            raise ValueError("it has no group data")
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise SettingsError(
            f"{path} is not the configuration of a run ({reason}); choose another name= or save_dir=, or remove that "
            "folder"
        ) from error
    return config


def _count(value: Any, left: int) -> int:
    """How many values may still come after those of ``value``, in which aliases count wherever they stand.

    Raises:
        ValueError: none.
    """
    if left <= 0:
        raise ValueError(f"it unfolds to more than {MAX_VALUES:,} values")
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    left -= 1
    for _, part in inner:
        left = _count(part, left)
    return left
