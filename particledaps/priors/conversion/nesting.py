"""Where the weights stand in a checkpoint: below which entries, and under which names of wrappers.

Training scripts save ``{"model": ..., "ema": ..., "optimizer": ...}``; ``DataParallel`` puts ``module.`` before every
name, ``torch.compile`` ``_orig_mod.``, and one around the other both. What is chosen and removed is said in the card.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from particledaps.priors.conversion.mapping import State
from particledaps.priors.errors import PriorError

WRAPPERS = ("module", "_orig_mod")
AVERAGED = re.compile(r"(^|[._])ema([._]|$)|averag|shadow", re.IGNORECASE)
OTHER_STATE = re.compile(r"optim|sched|scaler|callback", re.IGNORECASE)
DOTLESS = "model_ema."
"""Latent diffusion joins the parts of an averaged parameter's name without dots."""
BLOCKS, LATENT = "input_blocks.", "model.diffusion_model."
DEEPEST = 4


@dataclass(frozen=True)
class Weights:
    """The tensors of one network or model, by their original names.

    Attributes:
        state: the tensors.
        entry: of the file in which they stand, dotted; empty for a flat file.
        averaged: that entry is an average by its name.
        others: entries with further weights, left out.
        removed: names of wrappers, each with the number of keys it was removed from.
    """

    state: State
    entry: str = ""
    averaged: bool = False
    others: list[str] = field(default_factory=list)
    removed: dict[str, int] = field(default_factory=dict)

    def where(self) -> str:
        """What to add to a message, where the file holds more than these."""
        return f" (in its entry {self.entry}, beside {', '.join(self.others[:4])})" if self.others else ""


def find_weights(content: Mapping[Any, Any], ema: bool) -> Weights:
    """Choose the weights in what a checkpoint holds, and take wrappers off their names.

    Args:
        content: what the file holds, entries below entries.
        ema: of averaged and raw weights of the same network the averaged ones; else the raw ones.

    Raises:
        PriorError: there are none, or several of which nothing says which are meant; what was found is named.
    """
    groups = dict(_groups(content))
    candidates = _most_telling(groups)
    if not candidates:
        raise PriorError(_no_tensors(content))
    chosen = _choose(candidates, ema)
    if other := [k for k, v in groups[chosen].items() if not (isinstance(k, str) and isinstance(v, torch.Tensor))]:
        raise PriorError(_no_tensors(other))
    state, removed = unwrapped(groups[chosen])
    others = [name or "at the top" for name in candidates if name != chosen] + _nameless_averages(content, groups)
    return Weights(state, chosen, bool(AVERAGED.search(chosen)), others, removed)


def _groups(content: Mapping[Any, Any], name: str = "", depth: int = 0) -> Iterator[tuple[str, State]]:
    """Every mapping that holds a tensor, without the mappings below it, by its dotted entry."""
    if any(isinstance(value, torch.Tensor) for value in content.values()):
        yield name, {key: value for key, value in content.items() if not isinstance(value, Mapping)}
    for key, value in content.items():
        if isinstance(value, Mapping) and isinstance(key, str) and depth < DEEPEST and not OTHER_STATE.search(key):
            yield from _groups(value, f"{name}.{key}" if name else key, depth + 1)


def _most_telling(groups: dict[str, State]) -> dict[str, State]:
    """Whole latent diffusion models, else U-Nets, else what is called a state dict, else everything."""
    for mark in (LATENT, BLOCKS):
        if found := {name: group for name, group in groups.items() if any(mark in str(key) for key in group)}:
            return found
    return {"state_dict": groups["state_dict"]} if "state_dict" in groups else groups


def _choose(candidates: dict[str, State], ema: bool) -> str:
    averages = [name for name in candidates if AVERAGED.search(name)]
    raw = [name for name in candidates if name not in averages]
    fitting = (averages or raw) if ema else raw
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        raise PriorError(f"it holds only averaged weights ({', '.join(averages)}): leave out --no-ema (ema=False)")
    listed = ", ".join(name or "at the top" for name in fitting[:6])
    raise PriorError(f"it holds {len(fitting)} sets of weights ({listed}): save the one that is meant in a file alone")


def _no_tensors(entries: Collection[Any]) -> str:
    return f"it holds no plain weights: {len(entries)} entries are no tensors ({', '.join(map(str, [*entries][:4]))})"


def _nameless_averages(content: Mapping[Any, Any], groups: dict[str, State]) -> list[str]:
    """Entries called an average in which no tensor has a name, such as a list of them."""
    called = [key for key, value in content.items() if isinstance(value, Mapping | list) and AVERAGED.search(str(key))]
    return [f"{key} (tensors without names)" for key in called if not any(n.split(".")[0] == key for n in groups)]


def unwrapped(state: State) -> tuple[State, dict[str, int]]:
    """Names without the wrappers of parallel, compiled and enclosing modules.

    Returns:
        The tensors, and how many keys lost each wrapper.

    Raises:
        PriorError: two keys become one.
    """
    counts: Counter[str] = Counter()
    sources: dict[str, str] = {}
    for key in state:
        name, found = _bare(key)
        counts.update(found)
        if name in sources:
            raise PriorError(f"{sources[name]} and {key} are one weight in two wrappers: keep one of them")
        sources[name] = key
    outer = _outer_prefix(sources)
    removed = dict(counts) | ({outer: len(sources)} if outer else {})
    return {name.removeprefix(outer): state[key] for name, key in sources.items()}, removed


def _bare(key: str) -> tuple[str, list[str]]:
    if key.startswith(DOTLESS):
        tail = key[len(DOTLESS) :]
        found = re.findall("|".join(WRAPPERS), tail)
        return DOTLESS + re.sub("|".join(WRAPPERS), "", tail), [f"{name}." for name in sorted(set(found))]
    parts = key.split(".")
    kept = [part for part in parts if part not in WRAPPERS]
    return ".".join(kept), [f"{name}." for name in sorted(set(parts) & set(WRAPPERS))]


def _outer_prefix(names: Mapping[str, str]) -> str:
    """What stands before every name of a network or model that is known without it (``net.``), or nothing.

    A latent diffusion U-Net saved alone keeps its ``model.diffusion_model.``: without it it looks like a pixel network.
    """
    for mark in (LATENT, BLOCKS):
        first = next((name for name in names if mark in name), "")
        prefix = first[: first.find(mark)]
        if first and prefix.count("diffusion_model") == 0 and all(name.startswith(prefix) for name in names):
            return prefix
    return ""
