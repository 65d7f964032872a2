import io

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import RESOLUTION, write_images

from particledaps.checks import DataError
from particledaps.data.npz_images import validation_indices
from particledaps.data.training_views import Augmentation, TrainingImages, load_training_images, step_generator


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
    data = TrainingImages(small, large, small / 127.5 - 1, Augmentation(0.7, 0.4))
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
        data = TrainingImages(small, large, small / 127.5 - 1, Augmentation(zoom, 0.5, close_up))
        batch = (data.batch(400, step_generator(0, 0)) + 1) * 127.5 / 252  # places from 0 to 1
        sides = batch[:, 0, -1].mean(1) - batch[:, 0, 0].mean(1)
        centres[name], spread[name] = batch[:, 0].mean((1, 2)) - 0.5, (sides.min(), sides.max())
    assert 0.46 < spread["middle"][0] < 0.52 and 0.7 < spread["middle"][1] < 0.77  # side 0.5 to 0.75
    assert spread["anywhere"][1] > 0.95
    assert centres["middle"].abs().max() < 0.14 < centres["anywhere"].abs().max()  # a quarter of the free half


def test_close_ups_do_not_change_other_draws():
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    large = images.repeat_interleave(2, -1).repeat_interleave(2, -2)
    plain, close = (TrainingImages(images, large, images / 127.5 - 1, Augmentation(0.3, 0.5, c)) for c in (0.0, 0.4))
    a, b = (data.batch(200, step_generator(0, 0)) for data in (plain, close))
    same = (a == b).flatten(1).all(1).float().mean()
    assert 0.5 < same < 0.7


def test_no_zoom_without_large_images_or_probability():
    images = torch.arange(4, dtype=torch.uint8).reshape(4, 1, 1, 1).expand(4, 3, 16, 16).clone()
    images[..., 0] = 255
    for large, zoom in ((None, 1.0), (torch.zeros(4, 3, 32, 32, dtype=torch.uint8), 0.0)):
        batch = TrainingImages(images, large, images[:1].float(), Augmentation(zoom)).batch(50, step_generator(0, 0))
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
    data = load_training_images(tmp_path, None, RESOLUTION, Augmentation(0.5, 0.5))
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
    data = load_training_images(tmp_path / "small.npz", tmp_path / "large.npz", RESOLUTION, Augmentation(0.5, 0.5))
    held_out = levels_of(data.validation)
    assert held_out == set(validation_indices(groups).tolist())
    assert plain_levels(data, 60) == set(range(count)) - held_out
    assert data.large.shape == (len(data.images), 3, 32, 32)
    np.savez(tmp_path / "short.npz", train_bytes=np.concatenate(pieces), train_offsets=offsets[:-1])
    with pytest.raises(DataError, match="short.npz holds 249 images"):
        load_training_images(tmp_path / "small.npz", tmp_path / "short.npz", RESOLUTION, Augmentation(0.5, 0.5))


def test_images_that_cannot_be_trained_on(tmp_path):
    write_images(tmp_path / "one", 1)
    np.savez(tmp_path / "few.npz", train_images=np.zeros((150, 16, 16, 3), np.uint8))
    np.savez(tmp_path / "large.npz", train_images=np.zeros((160, 18, 16), np.uint8))
    cases = {"one": "at least 2", "few.npz": "none is left to train on", "large.npz": "resolution=16 needs that side"}
    for name, fragment in cases.items():
        with pytest.raises(DataError, match=fragment):
            load_training_images(tmp_path / name, None, RESOLUTION, Augmentation(0.5, 0.5))
