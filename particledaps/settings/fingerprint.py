"""The identity of a run: what determines its numbers, for any version of the configuration."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from particledaps.settings.keys import NEVER

Config = Mapping[str, Any]
_of_runs: list[type] = []


def of_runs(schema: type) -> type:
    """Class decorator: the dataclass that describes the configuration of a run (:class:`run_settings.RunSettings`)."""
    _of_runs[:] = [schema]
    return schema


def identity(config: Config, schema: type | None = None) -> dict[str, Any]:
    """The part of a configuration that determines the numbers, without keys at their neutral values.

    Two runs are the same if these are equal, whichever of them was stored before a key existed.

    Args:
        config: a merged configuration; keys that the schema does not know count.
        schema: the dataclass that describes it; None: that of runs.
    """
    family = (config.get("model") or {}).get("family")
    return _significant(config, schema or _run_schema(), family)


def config_sha256(config: Config) -> str:
    """Hash of a run's :func:`identity`."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()


def changed_keys(first: Config, other: Config) -> list[str]:
    """Dotted names of the keys in which two identities differ."""
    return _changed(identity(first), identity(other), "")


def _run_schema() -> type:
    if not _of_runs:
        raise RuntimeError("nothing describes the configuration of a run yet: import run_settings first")
    return _of_runs[0]


def _significant(config: Config, schema: type, family: str | None) -> dict[str, Any]:
    fields = {f.name: f for f in dataclasses.fields(schema)}
    types = get_type_hints(schema)
    kept = {}
    for name, value in config.items():
        facts = fields[name].metadata if name in fields else {}
        if not facts.get("identity", True) or value == facts.get("neutral", NEVER):
            continue
        if facts.get("always") is not None and isinstance(value, Mapping):
            value = {k: v for k, v in value.items() if k == family or k in facts["always"]}
        kept[name] = _inner(value, types.get(name), family)
    return kept


def _inner(value: Any, hint: Any, family: str | None) -> Any:
    """The significant part of a group of keys, or of each entry of a table of groups; other values as they are."""
    if not isinstance(value, Mapping):
        return value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _significant(value, hint, family)
    entry = (get_args(hint) or (None,))[-1]
    if dataclasses.is_dataclass(entry):
        return {k: _inner(v, entry, family) for k, v in value.items()}
    return value


def _changed(first: Config, other: Config, prefix: str) -> list[str]:
    changed = []
    for name in sorted(set(first) | set(other)):
        a, b = first.get(name), other.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            changed += _changed(a, b, f"{prefix}{name}.")
        elif a != b:
            changed.append(prefix + name)
    return changed
