"""The curve of quality against cost, on files with known numbers."""

import sys

import pytest
from hand_made_results import hand_made
from PIL import Image

from tools import plot_cost


def counted(psnr, calls, **changes):
    metrics = hand_made(psnr, **changes)
    metrics["timing"]["per_image_calls"] = [{"decoder_gradient": c} for c in calls]
    return metrics


@pytest.fixture
def plot(capsys, monkeypatch):
    def called(*arguments):
        monkeypatch.setattr(sys, "argv", ["plot_cost.py", *map(str, arguments)])
        plot_cost.main()
        return capsys.readouterr().out

    return called


def test_points_are_paired_over_the_common_images(write, plot, tmp_path):
    cheap = write(counted({0: [20.0, 10.0], 1: [26.0, 30.0], 2: [9.0, 9.0]}, [100, 300, 900]))
    first, second = write(hand_made({0: [22.0, 10.0]})), write(hand_made({1: [25.0, 29.0]}))
    picture = tmp_path / "curve.png"
    curves = ["--curve", "ours", "selected", cheap, "--curve", "oracle", "best", f"{first},{second}@1000"]
    rows = [line.split(" | ") for line in plot(*curves, "--output", picture).splitlines()[2:]]
    assert [row[0].strip("| ") for row in rows] == ["ours", "oracle"]
    assert [row[1] for row in rows] == ["200", "1000"]
    assert [row[2] for row in rows] == ["23.00 (3.00)", "25.50 (3.50)"]  # (20, 26) and (22, 29)
    assert [row[3] for row in rows] == ["-2.50 (0.50)", "0.00 (0.00)"]
    with Image.open(picture) as image:
        assert min(image.size) > 200


def test_the_aligned_oracle_may_turn_its_particles(write, plot):
    run = write(hand_made({0: [22.0, 10.0], 1: [25.0, 29.0]}))  # aligned: 1 dB more
    rows = [line.split(" | ")[2] for line in plot("--curve", "oracle", "best_aligned", f"{run}@5").splitlines()[2:]]
    assert rows == ["26.50 (3.50)"]


def test_runs_of_other_measurements_are_not_paired(write, plot, capsys):
    noisy = hand_made({0: [20.0]})
    noisy["metadata"]["conventions"]["noise_sigma"] = 0.1
    with pytest.raises(SystemExit):
        plot("--curve", "a", "best", f"{write(noisy)}@5", "--curve", "b", "best", f"{write(hand_made({0: [21.0]}))}@5")
    assert "noise_sigma is 0.1 there and 0.05" in capsys.readouterr().err


def test_ticks_do_not_overlap():
    assert plot_cost.tick_places([13000, 1262, 1280, 3840, 3862]) == [1262, 3840, 13000]


@pytest.mark.parametrize(
    ("suffix", "images", "message"),
    [("", [0], "did not count its calls"), ("@many", [0], "is no number: many"), ("@9", [7], "no image in common")],
)
def test_what_cannot_be_drawn_is_said(write, plot, capsys, suffix, images, message):
    run = write(hand_made({i: [20.0] for i in images}))
    with pytest.raises(SystemExit) as stop:
        plot("--curve", "a", "best", f"{write(hand_made({0: [21.0]}))}@5", "--curve", "b", "best", run + suffix)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_curve_without_runs_is_refused(plot, capsys):
    with pytest.raises(SystemExit):
        plot("--curve", "ours", "selected")
    assert "takes a label, one of selected, best, best_aligned" in capsys.readouterr().err
