"""Where the files beside the library are."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The checkout: ``configs/``, ``assets/`` and ``checkpoints/`` lie here, and relative paths of priors start here."""
