"""What goes wrong with priors."""

from __future__ import annotations


class PriorError(ValueError):
    """A prior cannot be loaded; the message says what is missing or wrong and what to do."""
