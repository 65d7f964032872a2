import numpy as np
import pytest
import torch
from PIL import Image
from tiny import command

from generate import draw
from priors.embedded import load_embedded


@pytest.fixture(scope="module")
def prior(tiny_prior):
    return load_embedded(tiny_prior)


def test_a_sample_depends_on_seed_and_index_only(prior):
    three, five = draw(prior, 3, seed=1, num_steps=5), draw(prior, 5, seed=1, num_steps=5)
    assert torch.allclose(three, five[:3], atol=1e-4)
    assert not torch.allclose(three, draw(prior, 3, seed=2, num_steps=5), atol=1e-2)
    assert not torch.allclose(five[0], five[1], atol=1e-2)


def test_drawing_leaves_the_global_generator_alone(prior):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first = draw(prior, 1, seed=1, num_steps=2)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(draw(prior, 1, seed=1, num_steps=2), first)
    assert first.shape == (1, 3, 16, 16) and first.abs().max() <= 1


def test_a_grid_or_single_images(tiny_prior, tmp_path):
    assert command("generate", "--model", tiny_prior, "--count", 3, "--out", tmp_path / "a" / "grid.png").status == 0
    assert Image.open(tmp_path / "a" / "grid.png").width > 300
    assert command("generate", "--model", tiny_prior, "--count", 2, "--out", tmp_path / "b").status == 0
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["00000.png", "00001.png"]
    assert command("generate", "--model", tiny_prior, "--count", 1, "--out", tmp_path / "c").status == 0
    one, two = (np.asarray(Image.open(tmp_path / f / "00000.png"), dtype=int) for f in "bc")
    assert np.abs(one - two).max() <= 1


def test_bad_input(tiny_prior, tmp_path):
    (tmp_path / "file").write_text("mine")
    cases = (
        (["--count", 0], "--count 0"),
        (["--model", tmp_path / "nothing"], "no prior in"),
        (["--out", tmp_path / "file"], "file"),
        (["--out", tmp_path / "file" / "grid.png"], "file"),
    )
    for arguments, fragment in cases:
        outcome = command("generate", "--model", tiny_prior, "--count", 1, *arguments)
        assert outcome.status != 0
        assert fragment in outcome.err and "Traceback" not in outcome.err
    assert (tmp_path / "file").read_text() == "mine"
