"""Priors that are not a latent one of RGB images, from a folder or an archive to a reconstruction and its pictures."""

from dataclasses import replace
from functools import partial

import metrics_schema
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import DENOISER, LATENTS, command, reconstruct, write_images
from training_support import CPU, FEW_STEPS, TINY, autoencoder_of

from particledaps.checks import DataError
from particledaps.data.image_sets import load_images
from particledaps.data.training_views import Augmentation, TrainingImages, load_training_images, step_generator
from particledaps.diffusion.targets import denoising_loss
from particledaps.priors.embedded import load_embedded, read_config
from particledaps.runs.draw import draw_samples
from particledaps.settings.schema import DataSettings
from particledaps.training import denoiser as stage_two
from particledaps.training.denoiser import Bank, LatentFacts, build, latent_facts, train_denoiser, wrap


@pytest.fixture(autouse=True)
def two_samples(monkeypatch):
    """An export draws 32 images, which is most of a tiny training's time."""
    monkeypatch.setattr("train_prior.draw_samples", partial(draw_samples, count=2))
    monkeypatch.setattr("particledaps.training.denoiser.plot_curve", lambda folder: None)


def archive(path, channels, count=170, labels=None):
    """Smooth images of 16 px, and a test split."""
    generator = np.random.default_rng(channels)
    coarse = torch.from_numpy(generator.integers(0, 256, (count, channels, 5, 5))).float()
    images = torch.nn.functional.interpolate(coarse, (16, 16), mode="bicubic").clamp(0, 255).permute(0, 2, 3, 1)
    arrays = {"train_images": images.numpy().astype(np.uint8), "test_images": images[:3].numpy().astype(np.uint8)}
    np.savez(path, **arrays, **({} if labels is None else {"train_labels": labels}))
    return path


def trained(tmp_path, *arguments):
    """``train_prior.py``, tiny; the folder of the prior."""
    own = [a for a in TINY if not any(a.split("=")[0] == b.split("=")[0] for b in arguments)]
    outcome = command(
        "train_prior", "name=tiny", f"save_dir={tmp_path}/trainings", f"export_dir={tmp_path}/prior", *own, *arguments
    )
    assert outcome.status == 0, outcome.err
    return tmp_path / "prior"


def reconstructed(tmp_path, prior, *arguments):
    outcome = reconstruct(
        "model=embedded",
        f"model.path={prior}",
        "data.end_id=1",
        "num_samples=2",
        "sampler.annealing.num_steps=2",
        "sampler.mcmc.num_steps=2",
        "device=cpu",
        f"save_dir={tmp_path}/results",
        "name=run",
        *arguments,
    )
    assert outcome.status == 0, outcome.err
    return metrics_schema.load(tmp_path / "results" / "run" / "metrics.json")


@pytest.mark.parametrize(("channels", "encoding"), [(1, "pixels"), (4, "autoencoder"), (4, "haar")])
def test_grey_and_four_channels_from_training_to_pictures(tmp_path, channels, encoding):
    data = archive(tmp_path / "data.npz", channels)
    patch = ["denoiser.patch=2"] if encoding == "pixels" else []
    prior = trained(tmp_path, f"images={data}", f"encoding={encoding}", *patch)
    assert load_embedded(prior).image_shape == (channels, 16, 16)
    assert (tmp_path / "trainings" / "tiny" / "autoencoder").exists() == (encoding == "autoencoder")
    assert Image.open(prior / "samples.png").width > 100
    few = ["count=2", "num_steps=2", f"out={tmp_path}/g"]
    outcome = command("generate", "model=embedded", f"model.path={prior}", *few)
    assert outcome.status == 0 and len(list((tmp_path / "g").iterdir())) == 2
    metrics = reconstructed(tmp_path, prior, "data=npz", f"data.path={data}")
    assert np.isfinite(metrics["psnr"]["per_image"][0]["best"])
    with np.load(tmp_path / "results" / "run" / "floats" / "00000.npz") as arrays:
        assert arrays["estimates"].shape == (2, channels, 16, 16)
    assert list((tmp_path / "results" / "run" / "sheets").glob("*.png"))
    assert list((tmp_path / "results" / "run" / "samples").rglob("*.png"))


def test_a_folder_of_grey_pictures_makes_a_grey_prior(tmp_path):
    for index in range(12):
        Image.fromarray(np.full((20, 20), 20 * index, np.uint8)).save(tmp_path / f"{index}.png")
    assert load_training_images(tmp_path, None, 16, Augmentation()).images.shape[1] == 1
    Image.new("RGB", (20, 20), "red").save(tmp_path / "12.png")
    assert load_training_images(tmp_path, None, 16, Augmentation()).images.shape[1] == 3
    assert load_training_images(tmp_path, None, 16, Augmentation(), channels=1).images.shape[1] == 1


@pytest.mark.parametrize("encoding", ["pixels", "two_scale"])
def test_what_an_export_alone_does_is_the_same(tmp_path, encoding):
    images = f"images={write_images(tmp_path / 'pictures', 12)}"
    prior = trained(tmp_path, images, f"encoding={encoding}")
    card, weights = read_config(prior), (prior / "denoiser.safetensors").read_bytes()
    assert card["encoding"] == encoding and card["figures"]["validation"]["autoencoder_psnr_db"] is None
    assert list(card["training"]) == ["denoiser"]
    again = trained(tmp_path, images, f"encoding={encoding}", "stages=[export]")
    assert read_config(again) == card and (again / "denoiser.safetensors").read_bytes() == weights


def test_another_encoding_does_not_go_on_with_a_training(tmp_path):
    images = f"images={write_images(tmp_path / 'pictures', 12)}"
    trained(tmp_path, images, "encoding=pixels")
    again = [images, "name=tiny", f"save_dir={tmp_path}/trainings", f"export_dir={tmp_path}/other", *TINY]
    outcome = command("train_prior", *again, "encoding=haar")
    assert (
        outcome.status == 2 and "is of a training with 1 parts and 0 classes, these settings ask for 2" in outcome.err
    )
    kept = tmp_path / "trainings" / "tiny" / "denoiser" / "latents.json"
    kept.write_text("{}")
    outcome = command("train_prior", *again, "encoding=pixels", "stages=[export]")
    assert outcome.status == 2 and "latents.json is damaged" in outcome.err
    assert not (tmp_path / "other").exists()


def test_mirroring_can_be_left_out():
    ramp = torch.linspace(0, 255, 16).expand(1, 1, 16, 16).to(torch.uint8)
    for mirror, kinds in ((True, 2), (False, 1)):
        data = TrainingImages(ramp, None, ramp / 127.5 - 1, Augmentation(mirror=mirror))
        batch = data.batch(20, step_generator(0, 0))
        assert len({row[0, 0, 0].item() for row in batch}) == kinds


# --- Classes ---------------------------------------------------------------------------------------------------------


def class_folders(tmp_path):
    for name, value in (("bright", 230), ("dark", 20)):
        (tmp_path / name).mkdir(parents=True)
        for index in range(8):
            Image.new("L", (20, 20), value + index).save(tmp_path / name / f"{index}.png")
    return tmp_path


def test_labels_of_class_folders_stay_with_their_images(tmp_path):
    data = load_training_images(class_folders(tmp_path), None, 16, Augmentation(zoom=0.3))
    assert data.class_names == ("bright", "dark") and len(data.labels) == len(data.images)
    batch, labels = data.labelled_batch(64, step_generator(0, 0))
    assert torch.equal(labels == 0, batch.mean((1, 2, 3)) > 0) and 10 < labels.sum() < 54
    Image.new("L", (20, 20)).save(tmp_path / "outside.png")
    assert load_training_images(tmp_path, None, 16, Augmentation()).labels is None


def test_image_sets_know_the_classes_of_what_was_asked_for(tmp_path):
    folder = class_folders(tmp_path / "pictures")
    asked = DataSettings(kind="folder", dir=str(folder), start_id=6, end_id=10)
    assert load_images(asked, (1, 16, 16)).labels().tolist() == [0, 0, 1, 1]
    file = archive(tmp_path / "data.npz", 1)
    plain = load_images(DataSettings(kind="npz", path=str(file), end_id=2), (1, 16, 16))
    assert plain.labels() is None
    with np.load(file) as arrays:
        np.savez(file, **arrays, test_labels=np.array([4, 2, 7]))
    assert load_images(DataSettings(kind="npz", path=str(file), start_id=1), (1, 16, 16)).labels().tolist() == [2, 7]
    with np.load(file) as arrays:
        np.savez(file, **(dict(arrays) | {"test_labels": np.array([0.5, 2, 7])}))
    with pytest.raises(DataError, match="test_labels is float64"):
        load_images(DataSettings(kind="npz", path=str(file)), (1, 16, 16)).labels()


def test_labels_of_an_archive_stay_with_their_images(tmp_path):
    labels = np.arange(170) % 2
    images = np.where(labels == 0, 30, 220).astype(np.uint8)[:, None, None].repeat(16, 1).repeat(16, 2)
    np.savez(tmp_path / "data.npz", train_images=images, train_labels=labels)
    data = load_training_images(tmp_path / "data.npz", None, 16, Augmentation())
    batch, drawn = data.labelled_batch(64, step_generator(0, 0))
    assert torch.equal(drawn == 1, batch.mean((1, 2, 3)) > 0) and data.class_names == ("0", "1")


BAD_LABELS = {
    "too few": ({"train_labels": np.zeros(169, int)}, r"train_labels is int64 \(169,\)"),
    "fractions": ({"train_labels": np.zeros(170)}, "whole numbers"),
    "negative": ({"train_labels": np.arange(170) % 2 - 1}, "class -1 is negative"),
    "a class without images": ({"train_labels": np.arange(170) % 2 * 2}, "class 1 has no images"),
    "names": ({"train_labels": np.arange(170) % 2, "class_names": np.array(["a"])}, "1 names for 2 classes"),
}


@pytest.mark.parametrize("case", BAD_LABELS.values(), ids=BAD_LABELS)
def test_labels_that_do_not_fit(tmp_path, case):
    arrays, fragment = case
    np.savez(tmp_path / "data.npz", train_images=np.zeros((170, 16, 16), np.uint8), **arrays)
    with pytest.raises(DataError, match=fragment):
        load_training_images(tmp_path / "data.npz", None, 16, Augmentation())


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_classes_from_training_to_a_conditional_answer(tmp_path, kind):
    if kind == "folder":
        images, data = class_folders(tmp_path / "pictures"), ["data=folder", f"data.dir={tmp_path}/pictures"]
    else:
        images = archive(tmp_path / "data.npz", 1, labels=np.arange(170) % 2)
        data = ["data=npz", f"data.path={images}"]
    prior = trained(tmp_path, f"images={images}", "class_conditional=true")
    assert read_config(prior)["class_names"] == (["bright", "dark"] if kind == "folder" else ["0", "1"])
    assert load_embedded(prior).conditions.count == 3  # the null class is the last
    asked = ["model.class_id=1", "model.guidance_scale=2", "model.negative_class_id=0", "model.guidance_rescale=0.5"]
    reconstructed(tmp_path, prior, *data, *asked, "model.guidance_interval=[0.1,5.0]")
    outcome = command("generate", "model=embedded", f"model.path={prior}", "count=2", "num_steps=2", *asked[:2])
    assert outcome.status == 0, outcome.err


def test_a_training_with_classes_shows_them_and_drops_some(monkeypatch, tmp_path):
    told, original = [], stage_two.UNetNetwork.conditioned

    def conditioned(self, condition):
        told.append(condition)
        return original(self, condition)

    monkeypatch.setattr(stage_two.UNetNetwork, "conditioned", conditioned)
    bank = Bank(torch.randn(40, 4, 4, 4), torch.arange(40) % 2)
    settings = replace(DENOISER, class_dropout=0.25, loop=replace(FEW_STEPS, batch_size=64))
    train_denoiser(
        autoencoder_of(0), settings, bank, replace(LATENTS, num_classes=2), torch.zeros(2, 3, 16, 16), tmp_path, 1, CPU
    )
    shown = torch.cat(told)
    assert set(shown.tolist()) == {0, 1, 2} and (shown == 2).float().mean().item() == pytest.approx(0.25, abs=0.06)


# --- Parts -----------------------------------------------------------------------------------------------------------


def test_parts_are_noised_independently_and_their_losses_added():
    seen = []

    def denoiser(z, sigma):
        seen.append(sigma)
        return torch.zeros_like(z)

    z0 = torch.cat([torch.full((2, 3, 2, 2), 2.0), torch.full((2, 1, 2, 2), 3.0)], dim=1)
    sigma, scales = torch.tensor([[1.0, 2.0], [0.5, 4.0]]), [0.5, 2.0]
    loss = denoising_loss(denoiser, z0, sigma, torch.zeros_like(z0), scales, (3, 1))
    weights = (sigma.square() + torch.tensor(scales).square()) / (sigma * torch.tensor(scales)).square()
    expected = (weights * torch.tensor([4.0, 9.0])).mean(0).sum()
    torch.testing.assert_close(loss, expected)
    assert torch.equal(seen[0], sigma)


def test_the_scale_of_each_part_is_measured():
    latents = torch.cat([torch.full((5, 9, 2, 2), 0.2), torch.full((5, 3, 2, 2), -1.5)], dim=1)
    assert latent_facts(Bank(latents), (9, 3), None, 0).sigma_data == pytest.approx([0.2, 1.5])
    assert latent_facts(Bank(latents), (12,), None, 0).sigma_data == pytest.approx(((9 * 0.04 + 3 * 2.25) / 12) ** 0.5)
    assert latent_facts(Bank(latents), (12,), 0.7, 0).sigma_data == 0.7


def test_every_part_of_a_network_is_trained(tmp_path):
    """Also the embedding of the second level: no weight stays as it was drawn."""
    latents = LatentFacts((5, 4, 4), (4, 1), [1.0, 1.0])
    torch.manual_seed(0)
    before = {n: v.clone() for n, v in build(DENOISER, latents).state_dict().items()}
    torch.manual_seed(0)
    bank, validation = Bank(torch.randn(30, 5, 4, 4)), torch.zeros(2, 5, 4, 4)

    class Identity(torch.nn.Module):
        def encode(self, x):
            return x

    torch.manual_seed(0)
    network = train_denoiser(Identity(), replace(DENOISER, loop=FEW_STEPS), bank, latents, validation, tmp_path, 1, CPU)
    assert all(not torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert wrap(network, DENOISER, latents).parts == (4, 1)


REFUSED = {
    "encoding": (["encoding=wavelet"], "encoding=wavelet: allowed are autoencoder, pixels, haar, two_scale"),
    "patch of latents": (["denoiser.patch=2"], "denoiser.patch=2: latents of an autoencoder take none"),
    "side": (["encoding=haar", "resolution=18"], "resolution=18: must be a multiple of 4"),
    "channels": (["channels=2"], "channels=2: must be 1, 3 or null"),
    "dropout": (["denoiser.class_dropout=1.5"], "denoiser.class_dropout=1.5: must be at least 0 and at most 1"),
    "no classes": (["class_conditional=true"], "class_conditional=true"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_bad_input(tmp_path, case):
    arguments, fragment = case
    images = write_images(tmp_path / "pictures", 3)
    outcome = command("train_prior", f"images={images}", f"save_dir={tmp_path}/t", *TINY, *arguments)
    assert outcome.status == 2 and fragment in outcome.err and "Traceback" not in outcome.err
    assert not (tmp_path / "t").exists()


def test_a_training_that_began_before_goes_on(tmp_path):
    """Checkpoints used to hold the U-Net's own names."""
    torch.manual_seed(0)
    old, new = build(DENOISER, LATENTS), build(DENOISER, LATENTS)
    new.load_state_dict({name.removeprefix("unet."): value for name, value in old.state_dict().items()})
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))
