"""Thresholds of the labels in :mod:`particledaps.evaluation.modes`; they stand in every record."""

from __future__ import annotations

ODD_THRESHOLD = 0.7
EVEN_THRESHOLD = 0.7
WHOLE_THRESHOLD = 0.7
"""Projection on the truth from which a reconstruction shows it, where there are no twins."""
SOLVABLE = ("0", "180", "symmetric")
SOLVED_DB = 18.0
SOLVED_MARGIN_DB = 2.0
SAME_TWINS_DB = 40.0
"""A truth this near to its own rotation is its own twin: reconstructions of 25 dB do not tell the two apart."""
THRESHOLDS = {
    "odd": ODD_THRESHOLD,
    "even": EVEN_THRESHOLD,
    "whole": WHOLE_THRESHOLD,
    "solved_db": SOLVED_DB,
    "solved_above_twin_average_db": SOLVED_MARGIN_DB,
    "symmetric_db": SAME_TWINS_DB,
}
