"""A training that diverges stops, keeps what was good, and is never exported."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import DENOISER, LATENTS, RESOLUTION, command, reconstruct, write_images
from training_support import FEW_STEPS, TINY, autoencoder_of, curve, train_stage

from particledaps.checks import DataError
from particledaps.operators.phase_retrieval import PhaseRetrieval
from particledaps.priors.embedded import load_embedded, read_config, save_embedded
from particledaps.priors.prior import PriorError
from particledaps.training.denoiser import build, wrap
from particledaps.training.export import export_prior, misfit_excess
from particledaps.training.loop import DivergedError, TrainingLoop


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    for stage in ("autoencoder", "denoiser"):
        monkeypatch.setattr(f"particledaps.training.{stage}.plot_curve", lambda folder: None)


def diverging(monkeypatch, at):
    """The update of step ``at`` leaves an infinite weight, as a far too large learning rate does."""
    original = TrainingLoop._update

    def update(self, loss):
        original(self, loss)
        if self.step == at:
            with torch.no_grad():
                next(self.model.parameters()).view(-1)[0] = math.inf

    monkeypatch.setattr(TrainingLoop, "_update", update)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_the_first_loss_that_is_not_finite_stops_the_stage(stage, bfloat16, data, tmp_path, monkeypatch):
    folder, loop = tmp_path / stage, replace(FEW_STEPS, bfloat16=bfloat16)
    whole = train_stage(stage, data, tmp_path / "whole" / stage, loop, 1)
    with monkeypatch.context() as patch:
        diverging(patch, at=3)  # the fourth step: one checkpoint is written
        with pytest.raises(DivergedError) as error:
            train_stage(stage, data, folder, loop, 1)
    text = str(error.value)
    assert f"the training of the {stage} diverged after 4 steps: its loss is nan" in text
    assert f"{stage}.loop.learning_rate=0.002 is too large" in text and "\n" not in text
    assert f"{folder / 'checkpoint.pt'} still holds the last good state, of step 3" in text
    assert max(int(step) for step, _, _ in curve(folder)) == 4

    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 3
    resumed = train_stage(stage, data, folder, loop, 2)  # the fault is gone: as if it had never been
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())


def test_a_lower_learning_rate_goes_on_from_the_last_good_checkpoint(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        diverging(patch, at=4)
        with pytest.raises(DivergedError):
            train_stage("denoiser", data, tmp_path / "denoiser", FEW_STEPS, 1)
    good = torch.load(tmp_path / "denoiser" / "checkpoint.pt", weights_only=True)["model"]
    lower = train_stage("denoiser", data, tmp_path / "denoiser", replace(FEW_STEPS, learning_rate=1e-12), 2)
    state = torch.load(tmp_path / "denoiser" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 7 and all(torch.isfinite(value).all() for value in lower.state_dict().values())
    assert all(torch.allclose(state["model"][name], value, atol=1e-9) for name, value in good.items())


@pytest.mark.parametrize("at", [2, 6])
def test_a_checkpoint_never_holds_weights_that_are_not_finite(data, tmp_path, monkeypatch, at):
    """The update before a checkpoint spoils them: no loss has shown it yet."""
    diverging(monkeypatch, at)
    with pytest.raises(DivergedError, match=f"diverged after {at + 1} steps: the weight .* is not finite") as error:
        train_stage("autoencoder", data, tmp_path / "autoencoder", FEW_STEPS, 1)
    path = tmp_path / "autoencoder" / "checkpoint.pt"
    if at == 2:
        assert not path.exists() and "no checkpoint was written yet" in str(error.value)
    else:
        state = torch.load(path, weights_only=True)
        assert state["step"] == 6 and all(torch.isfinite(v).all() for k in ("model", "ema") for v in state[k].values())


def test_a_checkpoint_of_before_that_is_not_finite_is_refused(data, tmp_path):
    train_stage("autoencoder", data, tmp_path / "autoencoder", FEW_STEPS, 1)
    path = tmp_path / "autoencoder" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    name = next(iter(state["ema"]))
    state["ema"][name].view(-1)[0] = math.nan
    torch.save(state, path)
    with pytest.raises(DataError, match=f"checkpoint.pt: {name} is not finite: remove its folder"):
        train_stage("autoencoder", data, tmp_path / "autoencoder", FEW_STEPS, 1)


def test_a_diverged_training_ends_in_one_sentence(tmp_path):
    write_images(tmp_path / "pictures", 12)
    folders = [f"images={tmp_path}/pictures", f"save_dir={tmp_path}/t", f"export_dir={tmp_path}/exported"]
    steep = ["autoencoder.loop.learning_rate=1e20", "autoencoder.loop.warmup_steps=1"]
    outcome = command("train_prior", *folders, *TINY, *steep)
    assert outcome.status == 1, outcome.err
    line = outcome.err.strip().splitlines()[-1]
    assert line.startswith("train_prior.py: the training of the autoencoder diverged after ")
    assert "autoencoder.loop.learning_rate=1e+20 is too large" in line and "Traceback" not in outcome.err
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e6])
@pytest.mark.parametrize("part", ["autoencoder", "denoiser"])
def test_an_export_of_weights_that_are_not_finite_is_refused(tiny_prior, tmp_path, part, value):
    target = shutil.copytree(tiny_prior, tmp_path / "prior")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    prior = load_embedded(tiny_prior)
    network = prior.autoencoder.network if part == "autoencoder" else prior.denoiser.network.unet
    name, parameter = next(iter(network.named_parameters()))
    parameter.view(-1)[0] = value
    with pytest.raises(PriorError, match=f"nothing is exported: {part}.{name} is not finite in float16"):
        save_embedded(target, prior.autoencoder, prior.denoiser, {"name": "tiny"})
    assert before == {path.name: path.read_bytes() for path in target.iterdir()}


def test_statistics_that_are_not_finite_are_not_exported(tiny_prior, tmp_path):
    prior = load_embedded(tiny_prior)
    prior.autoencoder.std[0, 1] = 0
    with pytest.raises(PriorError, match="latent channel 1 is constant over the training images"):
        save_embedded(tmp_path / "a", prior.autoencoder, prior.denoiser, {"name": "tiny"})
    prior.autoencoder.std[0, 1] = math.nan
    with pytest.raises(PriorError, match="latent_std is not finite"):
        save_embedded(tmp_path / "a", prior.autoencoder, prior.denoiser, {"name": "tiny"})
    assert not (tmp_path / "a").exists()


def images(count):
    pixels = np.random.default_rng(0).uniform(-1, 1, (count, 3, RESOLUTION, RESOLUTION))
    return torch.from_numpy(pixels).float()


def test_the_spread_of_one_image_is_unknown(tiny_prior):
    prior, operator = load_embedded(tiny_prior), PhaseRetrieval()
    mean, spread = misfit_excess(prior, operator, images(1), num_steps=2)
    assert math.isfinite(mean) and spread is None
    pair = [misfit_excess(prior, operator, images(2)[i : i + 1], num_steps=2)[0] for i in (0, 1)]
    first = misfit_excess(prior, operator, images(2)[:1], num_steps=2)
    assert first == (pair[0], None)
    assert misfit_excess(prior, operator, images(2), num_steps=2)[1] > 0


@pytest.mark.parametrize("count", [1, 2])
def test_a_prior_of_few_images_is_exported_with_what_is_known(tmp_path, count):
    torch.manual_seed(0)
    denoiser = wrap(build(DENOISER, LATENTS), DENOISER, LATENTS)
    export_prior(tmp_path, autoencoder_of(0), denoiser, {"name": "few"}, images(count))
    config = read_config(tmp_path)
    mean, spread = config["misfit_excess"]["phase_retrieval"]
    error = config["figures"]["validation"]["autoencoder_psnr_db_standard_error"]
    assert ((spread is None), (error is None)) == ((count == 1), (count == 1))
    assert load_embedded(tmp_path).misfit_excess == {"phase_retrieval": (mean, spread or 0.0)}


@pytest.mark.parametrize("number", [2, 6, 11])
def test_few_images_make_a_prior_that_prunes(tmp_path, number):
    write_images(tmp_path / "pictures", number)
    folders = [f"images={tmp_path}/pictures", f"save_dir={tmp_path}/t", f"export_dir={tmp_path}/p"]
    assert command("train_prior", *folders, *TINY).status == 0
    json.dumps(read_config(tmp_path / "p"), allow_nan=False)
    overrides = ["model=embedded", f"model.path={tmp_path}/p", "data=folder", f"data.dir={tmp_path}/pictures"]
    few = ["sampler.annealing.num_steps=4", "sampler.mcmc.num_steps=2", "device=cpu", "save_trajectory=false"]
    pruning = ["data.end_id=1", "num_samples=4", "pruning_step=700", "pruning_keep=2", f"save_dir={tmp_path}/r"]
    outcome = reconstruct(*overrides, *few, *pruning)
    assert outcome.status == 0, outcome.err
    record = json.loads((tmp_path / "r" / "demo" / "metrics.json").read_text())
    assert len(record["measurement"]["per_image"][0]["loss"]) == 2  # pruned to two


KEPT = {
    "both known": ([3.0, 1.5], {"phase_retrieval": (3.0, 1.5)}),
    "spread null": ([3.0, None], {"phase_retrieval": (3.0, 0.0)}),
    "spread NaN": ([3.0, math.nan], {"phase_retrieval": (3.0, 0.0)}),
    "mean null": ([None, None], {}),
    "mean NaN": ([math.nan, 1.0], {}),
}


@pytest.mark.parametrize(("pair", "expected"), KEPT.values(), ids=KEPT)
def test_older_priors_with_unknown_numbers_load(tiny_prior, tmp_path, pair, expected):
    folder = shutil.copytree(tiny_prior, tmp_path / "prior")
    config = json.loads((folder / "config.json").read_text()) | {"misfit_excess": {"phase_retrieval": pair}}
    (folder / "config.json").write_text(json.dumps(config))
    assert load_embedded(folder).misfit_excess == expected


@pytest.mark.parametrize("entry", [[3.0, 1.0], {"x": 3.0}, {"x": [1.0]}, {"x": ["a", 1]}, {"x": [1.0, -1.0]}, "x"])
def test_an_excess_that_is_none_is_refused(tiny_prior, tmp_path, entry):
    folder = shutil.copytree(tiny_prior, tmp_path / "prior")
    config = json.loads((folder / "config.json").read_text()) | {"misfit_excess": entry}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PriorError, match=r"misfit_excess=.*: must be mean and spread by operator"):
        load_embedded(folder)
