"""Inverse problems with cooperating particles of one diffusion prior: the library under the application.

It knows neither the annealing loop (``sampler.py``) nor a hook by name. What stands where: CONTRIBUTING.md.
"""

from __future__ import annotations

__version__ = "0.2.0"
