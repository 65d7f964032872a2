"""Random streams keyed by what they are for, so that batching, pruning or resuming changes no number."""

from __future__ import annotations

import hashlib

import torch

SHARED = -1
"""Particle id of draws that belong to an image as a whole (its measurement noise)."""


def stream_seed(*key: int | str) -> int:
    """A 63-bit seed from a key; equal keys give equal seeds on every machine.

    Example:
        >>> stream_seed(42, 0, 3, "mcmc", 7)  # seed, image, particle, purpose, level
        5621266827788940626
    """
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def stream(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for ``key`` on ``device``."""
    return torch.Generator(device).manual_seed(stream_seed(*key))


class ParticleStreams:
    """The random numbers of one image's particles.

    Every draw is keyed by (seed, image id, particle id, purpose, level). Start and re-noising draws come from the CPU,
    MCMC noise from the particles' device.

    Args:
        seed: the run's seed.
        image_id: id of the image in its data set.
    """

    def __init__(self, seed: int, image_id: int) -> None:
        self.seed, self.image_id = seed, image_id

    def generators(
        self, particle_ids: list[int], purpose: str, level: int, device: torch.device | str
    ) -> list[torch.Generator]:
        """One generator a particle."""
        return [stream(self.seed, self.image_id, p, purpose, level, device=device) for p in particle_ids]

    def normal(self, particle_ids: list[int], purpose: str, level: int, like: torch.Tensor) -> torch.Tensor:
        """Standard normal noise ``(P, ...)`` shaped like ``like``, drawn on the CPU in float32."""
        generators = self.generators(particle_ids, purpose, level, torch.device("cpu"))
        draws = [torch.randn(like.shape[1:], generator=g) for g in generators]
        return torch.stack(draws).to(like)


def operator_generator(seed: int, image_id: int | None) -> torch.Generator:
    """The CPU generator of what an operator draws for an image (a mask, a kernel); None: for all images of the run."""
    return stream(seed, SHARED if image_id is None else image_id, SHARED, "operator", 0)


def measurement_generator(seed: int, image_id: int) -> torch.Generator:
    """The CPU generator of an image's measurement noise; it depends on nothing else."""
    return stream(seed, image_id, SHARED, "measurement", 0)
