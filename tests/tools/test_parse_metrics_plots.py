import numpy as np
from hand_made_results import TWO, hand_made
from PIL import Image


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG" and min(image.size) > 200
        return np.asarray(image.convert("RGB"))


def test_plots_open_and_follow_the_data(write, call, tmp_path):
    names = ["data_misfit", "pairwise_distance", "psnr_particles", "repulsion_ratio"]
    other = {0: [1.0, 5.0], 1: [3.0, 6.0]}
    variants = [TWO, TWO, hand_made({0: [20.0, 11.0], 1: [26.0, 30.0]}, losses=(75.0, 90.0), distances=other)]
    folders = [tmp_path / "plots" / str(i) for i in range(3)]
    for metrics, folder in zip(variants, folders, strict=True):
        call(write(metrics), "--plot", folder)
        assert sorted(p.name for p in folder.iterdir()) == [f"{n}.png" for n in names]
    for name in names:
        first, again, different = (pixels(folder / f"{name}.png") for folder in folders)
        assert np.array_equal(first, again)
        assert first.shape != different.shape or not np.array_equal(first, different)


def test_runs_without_the_data_of_a_plot_are_left_out_with_a_note(write, call, tmp_path):
    blind = write(hand_made({0: [20.0]}, name=r"$\frac$", truth=False))
    err = call(write(TWO), blind, "--plot", tmp_path / "both").err
    assert "pairwise_distance.png leaves out" in err and "repulsion_ratio.png leaves out" in err
    assert "psnr_particles.png leaves out" in err and "data_misfit.png leaves out" not in err
    err = call(blind, "--plot", tmp_path / "one").err
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["data_misfit.png"]
    assert "pairwise_distance.png is not written: no repulsion rows in any run" in err


def test_plots_of_everything_diverged_are_not_written(write, call, tmp_path):
    call(write(hand_made({0: []})), "--plot", tmp_path / "none")
    assert list((tmp_path / "none").iterdir()) == []
