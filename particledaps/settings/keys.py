"""What a key of the configuration is beside its name, type and default.

A run's **identity** is its full configuration without the keys that cannot change a number (``identity=False``: where
results go, on what, which images). A stored run may lack a key that came later: such a key counts as its **neutral**
value, the one that reproduces the behaviour before the key existed. It need not be the default: a run that takes a new
default is another run than one stored before.
"""

from __future__ import annotations

from typing import Any

NEVER: Any = object()
"""The neutral value of keys that every stored run has."""


def facts(*, identity: bool = True, neutral: Any = NEVER, always: tuple[str, ...] | None = None) -> dict[str, Any]:
    """The ``metadata`` of a settings dataclass's field.

    Args:
        identity: whether the key is part of a run's identity.
        neutral: what it counts as in a run that was stored before it existed. Every key that is added needs one.
        always: for a table of values by prior family: of the entries of other families than the run's own these count,
            as every stored run has them; the others have no effect and may come and go.
    """
    return {"identity": identity, "neutral": neutral, "always": always}
