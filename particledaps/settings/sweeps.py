"""Sweeps (``-m``): every value is checked before the first member runs, and a bad member does not end the others."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from particledaps.settings.configuration import Configuration
from particledaps.settings.statuses import BAD_INPUT, INTERRUPTED, TERMINATED

ENDED: list[tuple[str, int]] = []
"""Members of the sweep of this process that have ended: their overrides and their exit status."""
STARTED: list[str] = []
"""A name for each task that has started, of a sweep or alone."""
Task = Callable[[DictConfig], None]


def members_to_check(configuration: Configuration, overrides: list[str]) -> Iterator[list[str]]:
    """Overrides of the first member, then of one for each further value of each swept key, the others at their first.

    Raises:
        HydraException: the overrides do not parse.
    """
    values = [own for own in swept_values(configuration, overrides) if own]
    first = [own[0] for own in values]
    yield first
    for position, own in enumerate(values):
        for value in own[1:]:
            yield [*first[:position], value, *first[position + 1 :]]


def swept_values(configuration: Configuration, overrides: list[str]) -> list[list[str]]:
    """Each override as one override a value; an interval, which cannot be counted, has none."""
    with configuration.loader() as loader:
        parser = OverridesParser.create(config_loader=loader)
        parsed = parser.parse_overrides(configuration.literal(overrides, sweep=True))
        found: list[list[str]] = []
        for override in parsed:
            if not override.is_sweep_override():
                found.append([str(override.input_line)])
            elif override.is_discrete_sweep():
                found.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
                if not found[-1]:
                    raise HydraException("matches no value")
        return found


def sweep_folder(configuration: Configuration, overrides: list[str]) -> list[str]:
    """Overrides that put the files of a sweep over ``save_dir`` under the first of them."""
    first = next(members_to_check(configuration, overrides))
    if not any(own.startswith("save_dir=") for own in first):
        return []
    folder = configuration.compose(first).save_dir.replace("'", r"\'")
    return [f"hydra.sweep.dir='{folder}/multirun'"]


def in_sweep() -> bool:
    """Whether this is a member of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def member(program: str) -> Callable[[Task], Task]:
    """Let a task of ``hydra.main`` be one of a sweep: what ends it ends the others only if a person or the system does.

    Args:
        program: its name in messages.
    """

    def decorate(task: Task) -> Task:
        @functools.wraps(task)
        def run(config: DictConfig) -> None:
            STARTED.append(program)
            if not in_sweep():
                task(config)
                return
            name = " ".join(HydraConfig.get().overrides.task) or "no overrides"
            print(f"\nmember {len(ENDED) + 1} of the sweep: {name}", flush=True)
            status = _status_of(program, task, config)
            ENDED.append((name, status))
            if status in (INTERRUPTED, TERMINATED):
                raise SystemExit(status)

        return run

    return decorate


def _status_of(program: str, task: Task, config: DictConfig) -> int:
    try:
        task(config)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except (HydraException, OmegaConfBaseException) as error:  # a reference of this member that leads nowhere
        print(f"{program}: {str(error).splitlines()[0]}", file=sys.stderr)
        return BAD_INPUT
    return 0


def outcome() -> tuple[str, int]:
    """A sentence about the members that ended badly, and the worst status; an empty one and 0 if all is well."""
    bad = [(name, status) for name, status in ENDED if status]
    if not bad:
        return "", 0
    named = "; ".join(f"{name} (status {status})" for name, status in bad)
    return f"{len(bad)} of {len(ENDED)} members of the sweep ended badly: {named}", max(s for _, s in bad)
