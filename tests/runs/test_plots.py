import numpy as np
import pytest
import torch
from PIL import Image

from particledaps.reports.pictures import (
    Snapshot,
    contact_sheet,
    measurement_picture,
    save_png,
    to_uint8,
    trajectory_figure,
)
from particledaps.runs.drawing import accepted_moves


def green(path):
    """Green pixels of a PNG, in which emphasised titles are written."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"), int)
    return ((pixels[..., 1] > pixels[..., 0] + 60) & (pixels[..., 1] > pixels[..., 2] + 60)).sum()


def test_bytes_are_rounded_and_clipped():
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).reshape(1, 1, 5)
    assert to_uint8(x).ravel().tolist() == [0, 0, 128, 255, 255]
    every = torch.arange(256) / 127.5 - 1
    assert to_uint8(every.reshape(1, 1, -1)).ravel().tolist() == list(range(256))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_png_keeps_pixels_and_channel_order(tmp_path, channels, mode):
    x = torch.rand(channels, 5, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    save_png(tmp_path / "x.png", x)
    with Image.open(tmp_path / "x.png") as image:
        assert (image.mode, image.size) == (mode, (7, 5))
        assert np.array_equal(np.asarray(image).reshape(5, 7, channels), to_uint8(x))


def test_measurement_picture_fills_the_range():
    y = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0))
    picture = measurement_picture(y)
    assert picture.shape == (1, 6, 6)
    assert (picture.min().item(), picture.max().item()) == pytest.approx((-1, 1))
    assert measurement_picture(torch.ones(3, 6, 6)).isfinite().all()
    assert measurement_picture(torch.ones(10)).shape == (1, 1, 10)


def test_measurements_that_are_images_are_shown_as_they_are():
    y = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert measurement_picture(y, y) is y
    assert measurement_picture(torch.ones(2, 4, 4), torch.ones(2, 4, 4)).shape == (1, 4, 4)


def test_contact_sheet_takes_rows_of_any_length_and_marks_the_answer(tmp_path):
    colour, grey = torch.zeros(3, 8, 8), torch.zeros(1, 8, 8)
    rows = [[(colour, "truth", False), (grey, "y", False), (colour, "answer", True)], [(colour, "alone", False)]]
    contact_sheet(tmp_path / "sheet.png", rows, "heading")
    contact_sheet(tmp_path / "plain.png", [[(i, t, False) for i, t, _ in row] for row in rows], "heading")
    with Image.open(tmp_path / "sheet.png") as marked, Image.open(tmp_path / "plain.png") as plain:
        assert marked.size == plain.size
        assert marked.size[0] > marked.size[1]
    assert green(tmp_path / "sheet.png") > 0 == green(tmp_path / "plain.png")


def test_trajectory_marks_accepted_moves(tmp_path):
    rows = [
        {"step": 0, "move": "flip", "particle_ids": [0, 5], "accepted": [False, True]},
        {"step": 2, "move": "flip", "particle_ids": [0, 5], "accepted": [True, False]},
        {"step": 2, "move": "channels", "particle_ids": [0], "accepted": [True]},
    ]
    moves = accepted_moves(rows)
    assert moves == {(0, 5): "flip", (2, 0): "flip, channels"}
    levels = [Snapshot(k, 10.0 - k, [0, 5], *torch.zeros(2, 2, 3, 8, 8)) for k in range(3)]
    for at in moves:
        trajectory_figure(tmp_path / "marked.png", levels, {at: moves[at]})
        assert green(tmp_path / "marked.png") > 0
    trajectory_figure(tmp_path / "plain.png", levels, {})
    assert green(tmp_path / "plain.png") == 0


def test_trajectory_has_two_rows_a_particle(tmp_path):
    x = torch.zeros(2, 3, 8, 8)
    two = [Snapshot(k, 10.0 - k, [0, 5] if k < 2 else [5], x, x) for k in range(3)]  # a particle may end early
    trajectory_figure(tmp_path / "two.png", two, {})
    trajectory_figure(tmp_path / "one.png", [s._replace(ids=[0]) for s in two], {})
    two, one = (Image.open(tmp_path / n) for n in ("two.png", "one.png"))
    assert two.width == one.width
    assert two.height > 1.8 * one.height
