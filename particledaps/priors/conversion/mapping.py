"""From original names to those of diffusers: every tensor used once, none left over, none misshapen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from particledaps.priors.errors import PriorError

State = dict[str, "torch.Tensor"]
Shape = tuple[int, ...]
Shapes = dict[str, Shape]
NAMED = 4


@dataclass(frozen=True)
class Entry:
    """One original tensor and what becomes of it.

    Attributes:
        source: its name in the original network.
        targets: the names it fills, in the order in which ``split`` returns them.
        shape: the shape it must have.
        split: original tensor -> tensors of the targets.
    """

    source: str
    targets: tuple[str, ...]
    shape: Shape
    split: Callable[[torch.Tensor], Iterable[torch.Tensor]]


@dataclass
class Problems:
    """What does not fit, by the names in the file."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)

    def check(self, shapes: Shapes, expected: Shapes, name: Callable[[str], str] = str) -> None:
        """Compare the shapes of a file with the expected ones; ``name`` turns a network's name into the file's."""
        self.missing += [name(key) for key in expected if key not in shapes]
        self.unexpected += [name(key) for key in shapes if key not in expected]
        self.misshapen += [
            f"{name(key)} {shapes[key]} instead of {shape}"
            for key, shape in expected.items()
            if key in shapes and shapes[key] != shape
        ]

    def stop(self, what: str) -> None:
        """Raise one sentence that names the first few keys of each kind.

        Raises:
            PriorError: there is a problem.
        """
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "misshapen": self.misshapen}
        parts = [f"{len(keys)} {kind} ({_first(keys)})" for kind, keys in kinds.items() if keys]
        if parts:
            raise PriorError(f"{what}: {', '.join(parts)}")


def _first(keys: list[str]) -> str:
    more = ", ..." if len(keys) > NAMED else ""
    return ", ".join(keys[:NAMED]) + more


def shapes_of(state: State) -> Shapes:
    """The shape of every tensor."""
    return {name: tuple(value.shape) for name, value in state.items()}


def sizes(shapes: Shapes, names: Iterable[str], axis: int) -> list[int]:
    """The sizes along ``axis`` of those tensors that exist and have this axis."""
    return [shapes[name][axis] for name in names if len(shapes.get(name, ())) > axis]


def same(source: str, target: str, shapes: Shapes) -> Entry:
    """The tensor as it is."""
    return Entry(source, (target,), shapes[target], lambda value: (value,))


def pointwise(source: str, target: str, shapes: Shapes, dimensions: int) -> Entry:
    """A 1x1 convolution over ``dimensions`` axes that becomes a linear layer (a bias stays as it is)."""
    shape = shapes[target]
    ones = (1,) * dimensions if len(shape) == 2 else ()
    return Entry(source, (target,), shape + ones, lambda value: (value.reshape(shape),))


def query_key_value(source: str, targets: tuple[str, str, str], shapes: Shapes, heads: int, legacy: bool) -> Entry:
    """One 1x1 convolution for queries, keys and values that becomes three linear layers.

    Rows of the legacy order are ``(head, query | key | value, channel)``, of the new one ``(query | key | value, head,
    channel)`` (guided diffusion, ``use_new_attention_order``).
    """
    shape = shapes[targets[0]]
    rows = (heads, 3, -1) if legacy else (1, 3, -1)

    def split(value: torch.Tensor) -> list[torch.Tensor]:
        return [part.reshape(shape) for part in value.reshape(*rows, *shape[1:]).unbind(1)]

    return Entry(source, targets, (3 * shape[0], *shape[1:], *(1,) * (len(shape) - 1)), split)


def leading_rows(source: str, target: str, shapes: Shapes, total: int) -> Entry:
    """The first output channels of ``total``: the noise estimate without the learned variance."""
    shape = shapes[target]
    return Entry(source, (target,), (total, *shape[1:]), lambda value: (value[: shape[0]],))


def expected(entries: list[Entry]) -> Shapes:
    """The shape of every original tensor.

    Raises:
        RuntimeError: two entries read one tensor (a fault of this program).
    """
    shapes = {entry.source: entry.shape for entry in entries}
    if len(shapes) != len(entries):
        raise RuntimeError("the mapping reads a tensor twice")
    return shapes


def convert(entries: list[Entry], state: State) -> State:
    """The tensors of the diffusers network, float32 and contiguous."""
    converted = {}
    for entry in entries:
        parts = entry.split(state[entry.source])
        converted |= {
            t: p.float().clone(memory_format=torch.contiguous_format) for t, p in zip(entry.targets, parts, strict=True)
        }
    return converted


def covers(entries: list[Entry], shapes: Shapes) -> list[Entry]:
    """``entries``, after a check that they fill the whole diffusers network.

    Raises:
        RuntimeError: a tensor would stay unset or be set twice (a fault of this program).
    """
    filled = [target for entry in entries for target in entry.targets]
    if sorted(filled) != sorted(shapes):
        raise RuntimeError(f"the mapping misses {sorted(set(shapes) - set(filled))[:NAMED]}")
    return entries
