import sys
from typing import NamedTuple

import pytest
from tiny import QUICK, command, image_folder, no_lpips, no_sheets, reconstruct, tiny_prior  # noqa: F401 (fixtures)

import sampler

FAULTY_PRIOR = '''
"""Priors that break on purpose, for the rows of a batch that they are told."""

import dataclasses
from pathlib import Path

import torch
from particledaps.priors.embedded import load_embedded


class FaultyDenoiser(torch.nn.Module):
    def __init__(self, module, rows):
        super().__init__()
        self.module, self.rows = module, list(rows)

    def forward(self, z, sigma):
        output = self.module(z, sigma)
        if float(torch.as_tensor(sigma).max()) > 9:  # the first annealing level only
            output[self.rows] = float("nan")
        return output


class FaultyDecoder(torch.nn.Module):
    def __init__(self, module, rows):
        super().__init__()
        self.module, self.rows = module, list(rows)

    def encode(self, x):
        return self.module.encode(x)

    def decode(self, z):
        x = self.module.decode(z)
        if not torch.is_grad_enabled():  # not while the chain runs: only the final answer
            x[self.rows] = float("inf")
        return x


def denoiser(device, compat, folder, rows):
    prior = load_embedded(Path(folder), device)
    return dataclasses.replace(prior, denoiser=FaultyDenoiser(prior.denoiser, rows))


def decoder(device, compat, folder, rows):
    prior = load_embedded(Path(folder), device)
    return dataclasses.replace(prior, autoencoder=FaultyDecoder(prior.autoencoder, rows))


def not_a_prior(device, compat):
    return 7
'''


class Setup(NamedTuple):
    """Arguments that most runs of these tests share, and where their results go."""

    arguments: tuple[str, ...]
    save_dir: object

    def __call__(self, *more):
        return reconstruct(*self.arguments, f"save_dir={self.save_dir}", *more)

    def command(self, *more):
        return command("posterior_sample", *self.arguments, f"save_dir={self.save_dir}", *more)

    @property
    def folder(self):
        return self.save_dir / "tiny"


@pytest.fixture(scope="session")
def arguments(tiny_prior, image_folder):  # noqa: F811
    model = ("model=embedded", f"model.path={tiny_prior}")
    return (*model, "data=folder", f"data.dir={image_folder}", "name=tiny", *QUICK)


@pytest.fixture
def drawn_run(arguments, tmp_path):
    """Call it with overrides: a run of the tiny prior on three images, results in ``drawn_run.folder``."""
    return Setup((*arguments, "save_trajectory=false"), tmp_path / "results")


@pytest.fixture
def tiny_run(drawn_run, no_sheets):  # noqa: F811
    """``drawn_run`` without contact sheets, which take most of its time."""
    return drawn_run


@pytest.fixture(scope="session")
def baseline(arguments, tmp_path_factory):
    """The plain run that others are compared with: its outcome and its folder."""
    setup = Setup(arguments, tmp_path_factory.mktemp("baseline"))
    return setup.command("save_trajectory=true"), setup.folder


@pytest.fixture
def sampled(monkeypatch):
    """Image ids that the sampler works on, in order."""
    seen, original = [], sampler.LatentDAPS.sample

    def sample(self, y, streams, *rest):
        seen.append(streams.image_id)
        return original(self, y, streams, *rest)

    monkeypatch.setattr(sampler.LatentDAPS, "sample", sample)
    return seen


@pytest.fixture
def faulty_prior(tmp_path, monkeypatch):
    """Arguments for a custom prior, written to a module of its own, that breaks for some rows of the batch."""
    (tmp_path / "faulty_prior.py").write_text(FAULTY_PRIOR)
    monkeypatch.syspath_prepend(tmp_path)

    def arguments(factory, folder, rows):
        target = f"model.target=faulty_prior:{factory}"
        return ("model=custom", target, f"+model.options.folder={folder}", f"+model.options.rows={rows}")

    yield arguments
    sys.modules.pop("faulty_prior", None)
