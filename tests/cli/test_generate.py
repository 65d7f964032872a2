import json
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import command
from tiny_checkpoints import checkpoints  # noqa: F401 (fixture)

import generate
from particledaps.diffusion.denoiser import EpsilonDenoiser
from particledaps.diffusion.noise import DiscreteNoise, alphas_cumprod, linear_betas
from particledaps.diffusion.solvers import SOLVERS, Solver
from particledaps.particles.prior_draws import SIGMA_MAX, drawing_path, largest_sigma
from particledaps.paths.schedules import DRAWING_PATHS
from particledaps.priors.checkpoint import load_checkpoint
from particledaps.priors.diffusers_folder import LoadOptions, open_folder
from particledaps.priors.embedded import load_embedded
from particledaps.priors.errors import PriorError
from particledaps.runs.draw import draw


@pytest.fixture(scope="module")
def prior(tiny_prior):
    return load_embedded(tiny_prior)


def embedded(tiny_prior, *more):
    return command("generate", "model=embedded", f"model.path={tiny_prior}", "device=cpu", "num_steps=4", *more)


def test_a_sample_depends_on_seed_and_index_only(prior):
    three, five = draw(prior, 3, seed=1, num_steps=5), draw(prior, 5, seed=1, num_steps=5)
    assert torch.allclose(three, five[:3], atol=1e-4)
    assert not torch.allclose(three, draw(prior, 3, seed=2, num_steps=5), atol=1e-2)
    assert not torch.allclose(five[0], five[1], atol=1e-2)


DRAWING = [Solver("ddim", 1.0), Solver("dpmpp2m"), Solver("consistency")]


@pytest.mark.parametrize("solver", DRAWING, ids=lambda solver: solver.name)
def test_whatever_the_solver_a_sample_depends_on_seed_and_index_only(prior, solver):
    three, five = (draw(prior, count, seed=1, num_steps=4, solver=solver) for count in (3, 5))
    assert torch.allclose(three, five[:3], atol=1e-4)
    assert not torch.allclose(three, draw(prior, 3, seed=2, num_steps=4, solver=solver), atol=1e-2)
    assert not torch.allclose(three, draw(prior, 3, seed=1, num_steps=4), atol=1e-3)


def test_the_solvers_of_the_command_line_are_those_there_are(tiny_prior, tmp_path):
    assert generate.SOLVERS == SOLVERS
    for solver in ("ddim", "dpmpp2m"):
        more = ["eta=0.5"] if solver == "ddim" else []
        assert embedded(tiny_prior, "count=1", f"solver={solver}", *more, f"out={tmp_path}/{solver}").status == 0


def test_batches_do_not_matter(prior, capsys):
    whole = draw(prior, 5, seed=1, num_steps=3)
    assert not capsys.readouterr().err
    assert torch.allclose(draw(prior, 5, seed=1, num_steps=3, batch_size=2), whole, atol=1e-4)
    assert "image 5 of 5" in capsys.readouterr().err


@pytest.mark.parametrize("path", DRAWING_PATHS)
def test_every_path_leads_from_noise_to_an_image(prior, path):
    if path == "trailing":
        with pytest.raises(PriorError, match=f"path=trailing: {prior.name} has no timesteps"):
            drawing_path(prior, 4, path)
        noise = DiscreteNoise(alphas_cumprod(linear_betas()))
        prior = replace(prior, denoiser=EpsilonDenoiser(lambda z, t: torch.zeros_like(z), noise))
        with pytest.raises(PriorError, match="1001 are more than the 1000 timesteps"):
            drawing_path(prior, 1001, path)
        assert drawing_path(prior, 4, path)[1].item() == pytest.approx(noise.sigmas[749].item())
    sigmas = drawing_path(prior, 4, path)
    first = noise.sigma_max if path == "trailing" else largest_sigma(prior)
    assert len(sigmas) == 5 and sigmas[0].item() == pytest.approx(first) and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    assert draw(prior, 2, seed=1, num_steps=4, path=path).isfinite().all()


def test_drawing_leaves_the_global_generator_alone(prior):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first = draw(prior, 1, seed=1, num_steps=2)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(draw(prior, 1, seed=1, num_steps=2), first)
    assert first.shape == (1, 3, 16, 16) and first.abs().max() <= 1


def test_a_grid_or_single_images(tiny_prior, tmp_path):
    assert embedded(tiny_prior, "count=3", f"out={tmp_path}/a/grid.png").status == 0
    assert Image.open(tmp_path / "a" / "grid.png").width > 300
    record = json.loads((tmp_path / "a" / "grid.json").read_text())
    assert record["calls"] == {"decoder_gradient": 0, "decoder": 3, "encoder": 0, "denoiser": 3 * 7}
    assert record["settings"]["num_steps"] == 4 and len(record["sigmas"]) == 5 and record["prior"]["sha256"]
    assert embedded(tiny_prior, "count=2", f"out={tmp_path}/b").status == 0
    assert (
        sorted(p.name for p in (tmp_path / "b").iterdir()) == ["00000.png", "00001.png"]
        and (tmp_path / "b.json").is_file()
    )
    assert embedded(tiny_prior, "count=1", f"out={tmp_path}/c").status == 0
    one, two = (np.asarray(Image.open(tmp_path / f / "00000.png"), dtype=int) for f in "bc")
    assert np.abs(one - two).max() <= 1


@pytest.mark.parametrize("name", ["adm", "ldm_ffhq", "ddpm", "stable_diffusion"])
def test_any_prior_can_be_drawn_from(checkpoints, tmp_path, name):  # noqa: F811
    kind = {"adm": "ffhq256ddpm", "ldm_ffhq": "ffhq256ldm"}.get(name, "diffusers")
    out = tmp_path / "images"
    outcome = command(
        "generate", f"model={kind}", f"model.path={checkpoints[name]}", "count=2", "num_steps=2", f"out={out}"
    )
    assert outcome.status == 0, outcome.err
    assert len(list(out.iterdir())) == 2


def test_a_custom_prior_is_drawn_from_its_own_distribution(tmp_path):
    options = ("model.options.side=16", "model.options.std=0.05", "model.options.mean=0.4", "model.options.channels=1")
    outcome = command("generate", "model=stationary_gaussian", *options, "count=8", f"out={tmp_path}/x")
    assert outcome.status == 0, outcome.err
    pixels = np.stack([np.asarray(Image.open(p), dtype=float) for p in sorted((tmp_path / "x").iterdir())])
    assert pixels.mean() / 127.5 - 1 == pytest.approx(0.4, abs=0.1) and 0.01 < pixels.std() / 127.5 < 0.15


def test_the_ode_begins_where_the_network_was_trained(prior, checkpoints):  # noqa: F811
    assert largest_sigma(prior) == SIGMA_MAX
    folder = open_folder(str(checkpoints["stable_diffusion"]), checkpoints["stable_diffusion"].parent)
    for scale in (1.0, 3.0):
        options = LoadOptions(torch.device("cpu"), torch.float32, guidance_scale=scale)
        assert largest_sigma(load_checkpoint(folder, "diffusers", options)) == pytest.approx(14.6, abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["count=0"], "count=0: must be at least 1"),
        (["num_steps=0"], "num_steps=0"),
        (["solver=leapfrog"], "solver=leapfrog: allowed are euler, ddim, heun, dpmpp2m, unipc, consistency"),
        (["solver=ddim", "eta=1.5"], "eta=1.5: must be at least 0 and at most 1"),
        (["eta=0.5"], "eta=0.5: only solver=ddim"),
        (["model.guidance_scale=2"], "model.guidance_scale=2.0: tiny holds an unconditional network"),
        (["model.class_id=1"], "model.class_id=1: tiny holds no network that takes a class"),
        (["model.guidance_interval=[3,1]"], "model.guidance_interval=[3.0, 1.0]: must be [low, high]"),
        (["model.guidance_rescale=2"], "model.guidance_rescale=2: must be at least 0 and at most 1"),
        (["precision=float8"], "precision=float8: allowed are"),
        (["model.path=NOTHING"], "no prior in"),
        (["out=FILE"], "file"),
        (["out=FILE/grid.png"], "file"),
        (["sampler=daps"], "sampler"),
        (["model=absent"], "model=absent: allowed are"),
    ],
)
def test_bad_input(tiny_prior, tmp_path, arguments, fragment):
    (tmp_path / "file").write_text("mine")
    own = [a.replace("FILE", f"{tmp_path}/file").replace("NOTHING", f"{tmp_path}/nothing") for a in arguments]
    outcome = embedded(tiny_prior, "count=1", *own)
    assert outcome.status != 0
    assert fragment in outcome.err and "Traceback" not in outcome.err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("old", "keys"),
    [
        ("--model assets/dogs64 --count 3", "model=embedded model.path=assets/dogs64 count=3"),
        ("--out=a.png --seed 7", "out=a.png seed=7"),
        ("--out 'my cats'", "'out=my cats'"),
    ],
)
def test_old_flags_are_answered_with_the_new_command(old, keys):
    assert generate.old_flags(shlex.split(old)) == f"takes keys instead of flags now: python generate.py {keys}"


def test_keys_and_hydras_own_options_are_no_old_flags():
    assert generate.old_flags(["count=3", "--multirun", "--help", "out=--model"]) is None
