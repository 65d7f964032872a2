"""Hooks of the user's own, named on the command line: ``hooks=[my_hook:LogSpread]``.

An entry is ``package.module:factory``, or a mapping of ``target`` and ``options``. The factory is called with the
options, and with ``setup`` (:class:`particledaps.particles.hook_setup.Setup`) where it takes an argument of that name.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from particledaps.checks import SettingsError
from particledaps.particles.state import Hook, Info, State
from particledaps.settings.custom import call_target, fault, import_target

if TYPE_CHECKING:
    from particledaps.particles.hook_setup import Setup

MOMENTS = ("before_ode", "after_mcmc", "before_renoise", "after_levels", "at_end")


@dataclass(frozen=True)
class AskedHook:
    """One hook as it was asked for.

    Attributes:
        target: ``package.module:factory``.
        options: of the factory.
    """

    target: str
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of its records: what stands behind the colon."""
        return self.target.partition(":")[2]


def entries(asked: list[Any]) -> list[AskedHook]:
    """What the key ``hooks`` holds, once :func:`problems` has found nothing."""
    return [AskedHook(a, {}) if isinstance(a, str) else AskedHook(a["target"], a.get("options") or {}) for a in asked]


def problems(asked: list[Any]) -> Iterator[str]:
    """Sentences on entries that name no hook."""
    names = []
    for entry in asked:
        target = entry if isinstance(entry, str) else entry.get("target") if isinstance(entry, Mapping) else None
        if not isinstance(target, str) or not all(target.partition(":")[::2]):
            yield f"hooks: {entry} names no hook; write package.module:Name, or {{target: ..., options: {{...}}}}"
            continue
        if isinstance(entry, Mapping):
            if further := sorted(str(k) for k in entry.keys() - {"target", "options"}):
                yield f"hooks: {target} has the unknown entry {', '.join(further)}; known are target and options"
            if not isinstance(entry.get("options") or {}, Mapping):
                yield f"hooks: the options of {target} are no mapping; write options: {{key: value}}"
        names.append(target.partition(":")[2])
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield f"hooks: two of them are called {name}, and records go by that name; give one another name"


def build(asked: list[Any], setup: Setup) -> list[OwnHook]:
    """The hooks, in the order in which they were asked for.

    Raises:
        SettingsError: one cannot be imported, called, or is no hook.
    """
    return [OwnHook(_make(entry, setup), entry) for entry in entries(asked)]


def record(asked: list[Any], info: Info) -> dict[str, Any] | None:
    """What they logged for one image, by name and kind; None if there are none."""
    return {e.name: info.part(e.name).rows for e in entries(asked)} if asked else None


def _make(entry: AskedHook, setup: Setup) -> Hook:
    factory = import_target("hooks", entry.target)
    try:
        takes_setup = "setup" in inspect.signature(factory).parameters
    except (TypeError, ValueError):
        takes_setup = False
    further = {"setup": setup} if takes_setup else {}
    return call_target("hooks", entry.target, Hook, **entry.options, **further)


class OwnHook(Hook):
    """A hook of the user's own: what it logs stands under its name, and its mistakes are told in one sentence.

    Args:
        hook: itself.
        entry: how it was asked for.
    """

    def __init__(self, hook: Hook, entry: AskedHook) -> None:
        self.hook, self.entry = hook, entry

    def fresh(self) -> OwnHook:
        """With a fresh hook inside."""
        return OwnHook(self.hook.fresh(), self.entry)

    def before_ode(self, state: State, info: Info) -> State:
        return self._call("before_ode", state, info)

    def after_mcmc(self, state: State, info: Info) -> State:
        return self._call("after_mcmc", state, info)

    def before_renoise(self, state: State, info: Info) -> State:
        return self._call("before_renoise", state, info)

    def after_levels(self, state: State, info: Info) -> State:
        return self._call("after_levels", state, info)

    def at_end(self, state: State, info: Info) -> State:
        return self._call("at_end", state, info)

    def _call(self, moment: str, state: State, info: Info) -> State:
        own = Info()
        try:
            after = getattr(self.hook, moment)(state, own)
            rows = {kind: [plain(row) for row in added] for kind, added in own.rows.items()}
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # code of the user's own may fail in any way
            module = type(self.hook).__module__
            raise SettingsError(f"hooks={self.entry.target}: {moment}: {fault(error, module)}") from error
        if not isinstance(after, State):
            raise SettingsError(
                f"hooks={self.entry.target}: {moment} returned {type(after).__name__}; a hook returns the state"
            )
        for kind, added in rows.items():
            for row in added:
                info.part(self.entry.name).add(kind, **row)
        return after


def plain(value: Any) -> Any:
    """The same in what JSON can hold: tensors and arrays become lists.

    Raises:
        TypeError: there is no such form of it.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(v) for v in value]
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"a row of the log holds a {type(value).__name__}; it may hold numbers, text, lists and tensors")
