from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import AUTOENCODER
from training_support import CPU, FEW_STEPS, curve, train_stage

from particledaps.checks import DataError
from particledaps.data.training_views import TrainingImages
from particledaps.training.autoencoder import train_autoencoder
from particledaps.training.loop import TrainingLoop


@pytest.fixture
def no_plots(monkeypatch):
    """Curves are written, not drawn: drawing takes longer than these trainings."""
    for stage in ("autoencoder", "denoiser"):
        monkeypatch.setattr(f"particledaps.training.{stage}.plot_curve", lambda folder: None)


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_resume_is_no_resume(stage, bfloat16, data, tmp_path, monkeypatch, no_plots):
    loop = replace(FEW_STEPS, bfloat16=bfloat16)
    whole = train_stage(stage, data, tmp_path / "whole", loop, 1)

    original = TrainingLoop._update

    def update(self, loss):
        if self.step == 5:  # two steps after the last checkpoint
            raise KeyboardInterrupt
        original(self, loss)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "_update", update)
        with pytest.raises(KeyboardInterrupt):
            train_stage(stage, data, tmp_path / "parts", loop, 1)
    assert max(int(row[0]) for row in curve(tmp_path / "parts")) == 5
    parts = train_stage(stage, data, tmp_path / "parts", loop, 2)  # other fresh weights: the checkpoint must win

    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    states = [torch.load(tmp_path / f / "checkpoint.pt", weights_only=True) for f in ("whole", "parts")]
    for key in ("model", "ema"):
        assert all(torch.equal(v, states[1][key][k]) for k, v in states[0][key].items())
    assert (tmp_path / "whole" / "curve.csv").read_text() == (tmp_path / "parts" / "curve.csv").read_text()
    keys = [tuple(row[:2]) for row in curve(tmp_path / "parts")]
    assert len(keys) == len(set(keys))
    assert {int(step) for step, name in keys if name == "loss"} == set(range(1, 8))
    assert {int(step) for step, name in keys if name.startswith("validation")} == {3, 6, 7}


def test_a_finished_stage_stays_as_it_is(data, tmp_path, no_plots):
    train_stage("autoencoder", data, tmp_path, FEW_STEPS, 1)
    before = (tmp_path / "curve.csv").read_text(), (tmp_path / "checkpoint.pt").stat().st_mtime_ns
    train_stage("autoencoder", data, tmp_path, FEW_STEPS, 2)
    assert before == ((tmp_path / "curve.csv").read_text(), (tmp_path / "checkpoint.pt").stat().st_mtime_ns)


def test_a_checkpoint_of_another_network_is_refused(data, tmp_path, no_plots):
    train_stage("autoencoder", data, tmp_path, FEW_STEPS, 1)
    other = replace(AUTOENCODER, channels=[8, 16], loop=FEW_STEPS)
    with pytest.raises(DataError, match=r"checkpoint\.pt holds another network"):
        train_autoencoder(other, data, tmp_path, 3, CPU)


def test_seed_changes_the_training(data, tmp_path, no_plots):
    loop = replace(FEW_STEPS, num_steps=2)
    ends = []
    for seed in (3, 4):
        torch.manual_seed(0)
        network = train_autoencoder(replace(AUTOENCODER, loop=loop), data, tmp_path / str(seed), seed, CPU)
        ends.append(torch.cat([p.flatten() for p in network.parameters()]))
    assert not torch.equal(*ends)


@pytest.mark.parametrize(
    ("stage", "validation"), [("autoencoder", "validation_psnr_db"), ("denoiser", "validation_mse_sigma_0.8")]
)
def test_a_trivial_set_is_learned(stage, validation, tmp_path, no_plots):
    picture = torch.full((4, 3, 16, 16), 40, dtype=torch.uint8)
    picture[:, :, :8] = 200
    data = TrainingImages(picture, None, picture[:1] / 127.5 - 1)
    loop = replace(FEW_STEPS, num_steps=60, learning_rate=1e-2, checkpoint_every=5, bfloat16=False)
    train_stage(stage, data, tmp_path, loop, 1)
    losses = [float(value) for _, name, value in curve(tmp_path) if name == "loss"]
    assert len(losses) == 60
    assert np.mean(losses[-20:]) < 0.8 * np.mean(losses[:20])
    first, *_, last = (float(value) for _, name, value in curve(tmp_path) if name == validation)
    assert last > first + 3 if stage == "autoencoder" else last < 0.85 * first


def test_a_batch_that_is_not_finite_leaves_the_weights(tmp_path):
    model, ema = (torch.nn.Linear(2, 1) for _ in range(2))
    loop = TrainingLoop(model, ema, replace(FEW_STEPS, num_steps=3), tmp_path)
    before = model.weight.clone()
    loop._update(model.weight.sum() * float("nan"))
    assert torch.equal(model.weight, before)
    loop._update(model.weight.sum())
    assert not torch.equal(model.weight, before)


def test_the_average_starts_as_the_model_and_follows_it(tmp_path):
    model, ema = (torch.nn.Linear(2, 1) for _ in range(2))
    loop = TrainingLoop(model, ema, FEW_STEPS, tmp_path)
    start = model.weight.clone()
    assert torch.equal(ema.weight, start)
    loop._update(model.weight.sum())
    assert torch.allclose(ema.weight, start + 0.9 * (model.weight - start))  # decay (1 + 0) / (10 + 0)
    assert not ema.weight.requires_grad
