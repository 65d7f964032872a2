"""What a CUDA device may do to a run, by injected errors: out of memory at every stage, and a device that is lost."""

import json

import metrics_schema
import numpy as np
import pytest
import torch
from test_run import estimates

import particledaps.runs.reconstruct
import session
from particledaps.priors.prior import Prior
from particledaps.settings.statuses import FAILED


def out_of_memory(*arguments, **named):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_while_the_prior_is_loaded(tiny_run, monkeypatch):
    monkeypatch.setattr(session, "build_prior", out_of_memory)
    outcome = tiny_run()
    assert outcome.status == FAILED and not tiny_run.folder.exists()
    assert "out of memory while the prior was loaded" in outcome.err and "precision=bfloat16" in outcome.err
    assert "Traceback" not in outcome.err


@pytest.fixture
def small_memory(monkeypatch):
    """A decoder that takes at most so many latents at once."""

    def limit(most, with_gradient=True):
        original = Prior.decode_with_pullback

        def decode(self, z):
            return out_of_memory() if len(z) > most else original(self, z)

        monkeypatch.setattr(Prior, "decode_with_pullback", decode)

    return limit


def test_in_an_image_the_batch_is_halved_and_the_run_goes_on(baseline, tiny_run, small_memory):
    small_memory(1)
    outcome = tiny_run()
    assert outcome.status == 0, outcome.err
    assert "0: out of memory, going on with 2 particles decoded at once; decode_batch=2" in outcome.out
    assert "0: out of memory, going on with 1 particles decoded at once; decode_batch=1" in outcome.out
    assert outcome.out.count("out of memory") == 2  # the other images begin with what fits
    assert metrics_schema.load(tiny_run.folder / "metrics.json")["metadata"]["image_ids"] == [0, 1, 2]
    assert np.allclose(estimates(tiny_run.folder), estimates(baseline[1]), atol=1e-4)


def test_not_even_one_particle_fits(tiny_run, small_memory):
    small_memory(0)
    outcome = tiny_run("data.end_id=1")
    assert outcome.status == FAILED and "image 0 failed" in outcome.err
    (row,) = metrics_schema.load(tiny_run.folder / "metrics.json")["status"]["per_image"]
    assert row["error"].startswith("OutOfMemoryError: CUDA out of memory")


def test_after_sampling_the_reconstruction_is_kept(tiny_run, monkeypatch, sampled):
    monkeypatch.setattr(particledaps.runs.reconstruct, "select", out_of_memory)
    outcome = tiny_run("data.end_id=1")
    assert outcome.status == FAILED and sampled == [0]  # nothing was sampled again
    assert "what was sampled is kept in" in outcome.out
    with np.load(tiny_run.folder / "floats" / "00000_latents.npz") as kept:
        assert kept["latents"].shape[0] == 4 and kept["particle_ids"].tolist() == [0, 1, 2, 3]


def test_while_scores_are_computed_the_batch_is_halved_without_sampling_again(tiny_run, monkeypatch, sampled):
    original, calls = particledaps.runs.reconstruct.select, []

    def select(*arguments):
        calls.append(1)
        return out_of_memory() if len(calls) == 1 else original(*arguments)

    monkeypatch.setattr(particledaps.runs.reconstruct, "select", select)
    assert tiny_run("data.end_id=1").status == 0 and sampled == [0] and len(calls) == 2


def test_a_device_that_is_lost_ends_the_run_instead_of_failing_every_image(tiny_run, monkeypatch, sampled):
    import sampler

    original, lost = sampler.LatentDAPS.sample, []

    def sample(self, y, streams, *rest):
        if streams.image_id == 1:
            lost.append(True)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return original(self, y, streams, *rest)

    def zeros(*shape, **named):
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return torch.ones(*shape, **named)

    monkeypatch.setattr(sampler.LatentDAPS, "sample", sample)
    monkeypatch.setattr(particledaps.runs.reconstruct, "probe", zeros)
    outcome = tiny_run()
    assert outcome.status == FAILED and "cpu answers no more (CUDA error: an illegal memory access" in outcome.err
    states = {p.stem: json.loads(p.read_text())["state"] for p in (tiny_run.folder / "records").glob("0*.json")}
    assert states == {"00000": "ok", "00001": "failed"}
    lost.clear(), monkeypatch.undo()
    assert tiny_run().status == 0


def test_a_measurement_goes_to_the_device_when_it_is_its_turn(tiny_run, monkeypatch):
    from particledaps.runs.result import Problem

    order, original = [], Problem.to

    def to(self, device):
        order.append((self.image_id, str(device)))
        return original(self, device)

    monkeypatch.setattr(Problem, "to", to)
    tiny_run("data.end_id=2")
    assert order == [(0, "cpu"), (1, "cpu")]
