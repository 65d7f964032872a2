import csv
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import metrics_schema
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import AUTOENCODER, DENOISER, RESOLUTION, command, reconstruct, write_images

from priors.autoencoder import KLAutoencoder
from priors.embedded import load_embedded, read_config
from runs.images import DataError, validation_indices
from train_prior import standardised
from training.autoencoder import build, mean_psnr_db, reconstruction_loss, train_autoencoder
from training.data import TrainingImages, load_training_images, step_generator
from training.latent_diffusion import denoising_errors, edm_loss, latent_bank, train_denoiser
from training.loop import LoopSettings, TrainingLoop

ROOT, CPU = Path(__file__).resolve().parents[2], torch.device("cpu")
FEW_STEPS = LoopSettings(7, 4, 2e-3, warmup_steps=2, log_every=1, checkpoint_every=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write_images(tmp_path_factory.mktemp("training") / "images", 24, size=(40, 36))
    return load_training_images(folder, None, RESOLUTION, zoom=0.5, min_crop=0.5)


def autoencoder_of(seed):
    torch.manual_seed(seed)
    return KLAutoencoder(build(AUTOENCODER, RESOLUTION), 2, torch.zeros(4), torch.ones(4))


@pytest.fixture
def no_plots(monkeypatch):
    """Curves are written, not drawn: drawing takes longer than these trainings."""
    for stage in ("autoencoder", "latent_diffusion"):
        monkeypatch.setattr(f"training.{stage}.plot_curve", lambda folder: None)


def train_stage(stage, data, folder, loop, initial_seed):
    """One stage; ``initial_seed`` seeds the fresh weights only."""
    frozen = autoencoder_of(0)
    torch.manual_seed(initial_seed)
    if stage == "autoencoder":
        return train_autoencoder(replace(AUTOENCODER, loop=loop), data, folder, 3, CPU)
    return train_denoiser(frozen, replace(DENOISER, loop=loop, bank_views=1), data, folder, 3, CPU)


def curve(folder):
    with open(folder / "curve.csv", newline="") as handle:
        return list(csv.reader(handle))


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


def test_batch_depends_on_seed_and_step_only(data):
    global_state = torch.get_rng_state()
    batch = data.batch(8, step_generator(3, 11))
    for step in range(5):
        data.batch(8, step_generator(3, step))
    torch.manual_seed(99)
    assert torch.equal(data.batch(8, step_generator(3, 11)), batch)
    assert not torch.equal(data.batch(8, step_generator(3, 12)), batch)
    assert not torch.equal(data.batch(8, step_generator(4, 11)), batch)
    torch.set_rng_state(global_state)
    data.batch(8, step_generator(3, 11))
    assert torch.equal(torch.get_rng_state(), global_state)
    assert batch.shape == (8, 3, 16, 16) and batch.abs().max() <= 1


def test_a_gradient_keeps_its_top_and_meets_its_mirror():
    ramp = torch.linspace(250, 0, 32)[:, None] + torch.linspace(0, 5, 32)[None]
    large = ramp.expand(1, 3, 32, 32).to(torch.uint8)
    small = large[..., ::2, ::2].contiguous()
    data = TrainingImages(small, large, small / 127.5 - 1, zoom=0.7, min_crop=0.4)
    batch = data.batch(300, step_generator(0, 0))
    assert (batch[:, :, :4].mean((1, 2, 3)) > batch[:, :, -4:].mean((1, 2, 3)) + 0.3).all()
    turned = batch[..., :4].mean((1, 2, 3)) > batch[..., -4:].mean((1, 2, 3))
    assert 0.35 < turned.float().mean() < 0.65
    full = (batch[:, :, 0].mean((1, 2)) > 0.95) & (batch[:, :, -1].mean((1, 2)) < -0.85)
    assert 0.2 < full.float().mean() < 0.5  # the others are zooms


def test_close_ups_lie_about_the_middle():
    rows, columns = (torch.arange(64.0) * 4).expand(64, 64).T, (torch.arange(64.0) * 4).expand(64, 64)
    large = torch.stack([rows, columns, rows])[None].to(torch.uint8)  # a pixel's colour is its place
    small = large[..., ::2, ::2].contiguous()
    spread, centres = {}, {}
    for name, zoom, close_up in (("anywhere", 1.0, 0.0), ("middle", 0.0, 1.0)):
        data = TrainingImages(small, large, small / 127.5 - 1, zoom, 0.5, close_up)
        batch = (data.batch(400, step_generator(0, 0)) + 1) * 127.5 / 252  # places from 0 to 1
        sides = batch[:, 0, -1].mean(1) - batch[:, 0, 0].mean(1)
        centres[name], spread[name] = batch[:, 0].mean((1, 2)) - 0.5, (sides.min(), sides.max())
    assert 0.46 < spread["middle"][0] < 0.52 and 0.7 < spread["middle"][1] < 0.77  # side 0.5 to 0.75
    assert spread["anywhere"][1] > 0.95
    assert centres["middle"].abs().max() < 0.14 < centres["anywhere"].abs().max()  # a quarter of the free half


def test_close_ups_do_not_change_other_draws():
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    large = images.repeat_interleave(2, -1).repeat_interleave(2, -2)
    plain, close = (TrainingImages(images, large, images / 127.5 - 1, 0.3, 0.5, c) for c in (0.0, 0.4))
    a, b = (data.batch(200, step_generator(0, 0)) for data in (plain, close))
    same = (a == b).flatten(1).all(1).float().mean()
    assert 0.5 < same < 0.7


def test_no_zoom_without_large_images_or_probability():
    images = torch.arange(4, dtype=torch.uint8).reshape(4, 1, 1, 1).expand(4, 3, 16, 16).clone()
    images[..., 0] = 255
    for large, zoom in ((None, 1.0), (torch.zeros(4, 3, 32, 32, dtype=torch.uint8), 0.0)):
        batch = TrainingImages(images, large, images[:1].float(), zoom).batch(50, step_generator(0, 0))
        assert (batch == 1).any(-1).all()


def plain_levels(data, batches=30):
    """Grey levels that training batches of plain images show."""
    seen = torch.cat([data.batch(16, step_generator(0, step)) for step in range(batches)])
    assert seen.std((1, 2, 3)).max() < 1e-3
    return set(((seen[:, 0, 0, 0] + 1) * 127.5).round().int().tolist())


def levels_of(images):
    return set(((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist())


def test_validation_images_are_never_trained_on_folder(tmp_path):
    for index in range(25):
        Image.new("RGB", (40, 40), (10 * index,) * 3).save(tmp_path / f"{index}.png")
    data = load_training_images(tmp_path, None, RESOLUTION, 0.5, 0.5)
    held_out = levels_of(data.validation)
    assert held_out == {0, 100, 200}
    assert plain_levels(data) == set(range(0, 250, 10)) - held_out


def test_validation_images_are_never_trained_on_archive(tmp_path):
    count = 250
    shades = np.arange(count, dtype=np.uint8)
    images = np.broadcast_to(shades.reshape(-1, 1, 1, 1), (count, 16, 16, 3))
    groups = np.concatenate([np.repeat(np.arange(25), 2), np.arange(100, 300)])  # 25 pairs, 200 single images
    pieces = []
    for shade in shades.tolist():
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), (shade,) * 3).save(buffer, "JPEG", quality=100)
        pieces.append(np.frombuffer(buffer.getvalue(), np.uint8))
    offsets = np.cumsum([0, *map(len, pieces)])
    np.savez(tmp_path / "small.npz", train_images=images, train_dupgroup=groups)
    np.savez(tmp_path / "large.npz", train_bytes=np.concatenate(pieces), train_offsets=offsets)
    data = load_training_images(tmp_path / "small.npz", tmp_path / "large.npz", RESOLUTION, 0.5, 0.5)
    held_out = levels_of(data.validation)
    assert held_out == set(validation_indices(groups).tolist())
    assert plain_levels(data, 60) == set(range(count)) - held_out
    assert data.large.shape == (len(data.images), 3, 32, 32)
    np.savez(tmp_path / "short.npz", train_bytes=np.concatenate(pieces), train_offsets=offsets[:-1])
    with pytest.raises(DataError, match="short.npz holds 249 images"):
        load_training_images(tmp_path / "small.npz", tmp_path / "short.npz", RESOLUTION, 0.5, 0.5)


def test_latents_are_standardised_over_training_views(data):
    wrapped = standardised(autoencoder_of(0).network, 2, data, seed=3)
    with torch.no_grad():
        latents = torch.cat([wrapped.encode(data.batch(64, step_generator(8, s))) for s in range(16)])
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-3)
    assert torch.allclose(latents.transpose(0, 1).flatten(1).std(1), torch.ones(4), atol=1e-3)
    bank = latent_bank(wrapped, data, 3, seed=3, device=CPU)
    assert bank.shape[1:] == (4, 4, 4) and len(bank) >= 3 * len(data.images)
    assert torch.allclose(bank.mean((0, 2, 3)), torch.zeros(4), atol=0.1)


def test_losses_have_their_closed_forms():
    target = torch.zeros(2, 3, 8, 8)
    assert reconstruction_loss(target + 0.5, target, 10.0).item() == pytest.approx(0.25)
    ramp = torch.arange(8.0).expand(2, 3, 8, 8)
    assert reconstruction_loss(ramp, target, 2.0).item() == pytest.approx((ramp**2).mean().item() + 1.0)

    def perfect_but_for_one(z, sigma):
        return torch.ones_like(z)

    sigma, z0 = torch.tensor([0.5, 2.0]), torch.zeros(2, 4, 2, 2)
    expected = sum((s**2 + 9) / (3 * s) ** 2 for s in (0.5, 2.0)) / 2
    assert edm_loss(perfect_but_for_one, z0, sigma, torch.randn(2, 4, 2, 2), 3.0).item() == pytest.approx(expected)
    errors = denoising_errors(perfect_but_for_one, z0)
    assert set(errors.values()) == {1.0} and "validation_mse_sigma_0.5" in errors


def test_psnr_of_the_validation_is_a_mean_over_images():
    class Network:
        """Reconstructs black."""

        def encode(self, x):
            return self

        latent_dist = mean = property(lambda self: self)

        def decode(self, z):
            return type("Output", (), {"sample": torch.full((2, 3, 4, 4), -1.0)})

    images = torch.stack([torch.full((3, 4, 4), 0.0), torch.full((3, 4, 4), -0.8)])
    assert mean_psnr_db(Network(), images, 1) == pytest.approx((6.0206 + 20) / 2, abs=1e-3)


TINY = (
    "resolution=16",
    "device=cpu",
    "autoencoder.channels=[8,8]",
    "autoencoder.norm_groups=4",
    "denoiser.channels=[8,8]",
    "denoiser.attention_levels=0",
    "denoiser.norm_groups=4",
    "denoiser.head_channels=4",
    "denoiser.bank_views=1",
    *(f"{s}.loop.{k}" for s in ("autoencoder", "denoiser") for k in ("num_steps=4", "batch_size=4", "bfloat16=false")),
)


def test_folder_to_prior_to_reconstruction(tmp_path):
    write_images(tmp_path / "pictures", 12)
    train = [f"images={tmp_path}/pictures", f"save_dir={tmp_path}/trainings", f"export_dir={tmp_path}/exported", *TINY]
    facts = ["name=mine", "source=drawn by chance", "licence=CC0"]
    assert command("train_prior", *train, *facts, "stages=[autoencoder]").status == 0
    assert not (tmp_path / "exported").exists()
    outcome = command("train_prior", *train, *facts)
    assert outcome.status == 0, outcome.err
    assert '"autoencoder_psnr_db"' in outcome.out
    assert sorted(p.name for p in (tmp_path / "trainings" / "mine").iterdir()) == ["autoencoder", "denoiser"]
    assert all((tmp_path / "trainings" / "mine" / s / "curve.png").exists() for s in ("autoencoder", "denoiser"))

    card = read_config(tmp_path / "exported")
    json.dumps(card, allow_nan=False)
    assert (card["name"], card["source"], card["licence"]) == ("mine", "drawn by chance", "CC0")
    assert card["training"]["denoiser"]["steps"] == 4
    assert card["figures"]["validation"]["num_images"] == 2
    assert Image.open(tmp_path / "exported" / "samples.png").width > 500
    prior = load_embedded(tmp_path / "exported")
    assert prior.misfit_excess["phase_retrieval"][0] == pytest.approx(card["misfit_excess"]["phase_retrieval"][0])
    ema = torch.load(tmp_path / "trainings" / "mine" / "denoiser" / "checkpoint.pt", weights_only=True)["ema"]
    shipped = load_file(tmp_path / "exported" / "denoiser.safetensors")
    assert all(torch.equal(shipped[k], v.half()) for k, v in ema.items())

    outcome = reconstruct(
        "model=embedded",
        f"model.path={tmp_path}/exported",
        "data=folder",
        f"data.dir={tmp_path}/pictures",
        "data.end_id=1",
        "num_samples=2",
        "sampler.annealing.num_steps=2",
        "sampler.mcmc.num_steps=2",
        "device=cpu",
        "save_trajectory=false",
        f"save_dir={tmp_path}/results",
    )
    assert outcome.status == 0, outcome.err
    metrics_schema.load(tmp_path / "results" / "demo" / "metrics.json")


def test_interrupt_in_a_training(tmp_path, monkeypatch):
    def interrupt(self, loss):
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingLoop, "_update", interrupt)
    write_images(tmp_path / "pictures", 12)
    outcome = command("train_prior", f"images={tmp_path}/pictures", f"save_dir={tmp_path}/trainings", *TINY)
    assert outcome.status == 130
    assert "train_prior.py: interrupted" in outcome.err and "Traceback" not in outcome.err


REFUSED = {
    "no images": ([], "images is not set"),
    "absent": (["images=/not/there"], "/not/there does not exist"),
    "unknown key": (["images=x", "imges=x"], "imges: unknown key; did you mean images"),
    "wrong type": (["images=x", "resolution=big"], "resolution=big"),
    "unknown stage": (["images=x", "stages=[decoder]"], "stages=decoder: allowed are autoencoder, denoiser, export"),
    "device": (["images=x", "device=abacus"], "device=abacus: allowed are auto, cpu, cuda"),
    "name": (["images=x", "name=../x"], "name='../x'"),
    "resolution": (["images=x", "resolution=20"], "resolution=20: must be a multiple of 16"),
    "zoom": (["images=x", "zoom=1.5"], "zoom=1.5: must be at least 0 and at most 1"),
    "zoom and close-ups": (["images=x", "zoom=0.7", "close_up=0.5"], "their sum must be at most 1"),
    "steps": (["images=x", "denoiser.loop.num_steps=0"], "denoiser.loop.num_steps=0: must be at least 1"),
}


@pytest.mark.parametrize(("arguments", "fragment"), REFUSED.values(), ids=REFUSED)
def test_bad_input(tmp_path, arguments, fragment):
    outcome = command("train_prior", *arguments, f"save_dir={tmp_path}/trainings", f"export_dir={tmp_path}/exported")
    assert outcome.status == 2
    assert outcome.err.startswith("train_prior.py: ") and "Traceback" not in outcome.err
    assert fragment in outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_absent_cuda(tmp_path):
    outcome = command("train_prior", "images=x", "device=cuda", f"save_dir={tmp_path}/trainings")
    assert outcome.status == 2 and "no CUDA device" in outcome.err


def test_images_that_cannot_be_trained_on(tmp_path):
    write_images(tmp_path / "one", 1)
    np.savez(tmp_path / "few.npz", train_images=np.zeros((150, 16, 16, 3), np.uint8))
    np.savez(tmp_path / "grey.npz", train_images=np.zeros((160, 16, 16), np.uint8))
    cases = {"one": "at least 2", "few.npz": "none is left to train on", "grey.npz": "needs 16 px RGB"}
    for name, fragment in cases.items():
        with pytest.raises(DataError, match=fragment):
            load_training_images(tmp_path / name, None, RESOLUTION, 0.5, 0.5)


def test_a_stage_needs_the_one_before(tmp_path):
    write_images(tmp_path / "pictures", 12)
    save_dir = f"save_dir={tmp_path}/trainings"
    outcome = command("train_prior", f"images={tmp_path}/pictures", save_dir, "stages=[denoiser]", *TINY)
    assert outcome.status == 2
    assert "checkpoint.pt does not exist: run that stage first" in outcome.err


def test_the_program_itself(tmp_path):
    process = subprocess.run(
        [sys.executable, ROOT / "train_prior.py", "images=/not/there"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert (process.returncode, process.stderr) == (2, "train_prior.py: /not/there does not exist\n")
    assert list(tmp_path.iterdir()) == []
