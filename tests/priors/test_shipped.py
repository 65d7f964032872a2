"""The priors in ``assets/``: they load, know what their cards say, and see an image."""

import pytest
import torch
from tiny import no_lpips  # noqa: F401 (fixture)

from particledaps.checkout import ROOT
from particledaps.data.image_sets import demo_images
from particledaps.priors.embedded import load_embedded, read_config

PARTS = {"cats64": (), "cats64px": (3,), "haar64": (9, 3), "lift64": (12, 3)}


@pytest.mark.parametrize("name", PARTS)
def test_a_shipped_prior_denoises_the_demo(name):
    prior, x = load_embedded(ROOT / "assets" / name), demo_images(64).pixels[:1]
    assert (prior.name, prior.image_shape, prior.parts) == (name, (3, 64, 64), PARTS[name])
    z = prior.encode(x)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    figures = read_config(ROOT / "assets" / name)["figures"]["validation"]
    assert figures["orientation_upright_preferred"] > 0.95
    with torch.no_grad():
        for sigma in (0.3, 1.2):
            error = (prior.denoiser(z + sigma * noise, sigma) - z).square().mean().item()
            assert error < 2.5 * figures["denoising_mse"][str(sigma)], sigma
    card = (ROOT / "assets" / name / "README.md").read_text()
    assert read_config(ROOT / "assets" / name)["licence"] in card


@pytest.mark.parametrize("name", ["haar64", "lift64"])
def test_a_clean_coarse_part_helps_the_fine_one(name):
    """The network with two levels uses both: details are seen better when the averages are known."""
    prior, x = load_embedded(ROOT / "assets" / name), demo_images(64).pixels
    z, fine = prior.encode(x), prior.parts[0]
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    errors = []
    with torch.no_grad():
        for coarse in (1.0, 0.02):
            levels = torch.tensor([[1.0, coarse]])
            noisy = z + torch.cat([noise[:, :fine], coarse * noise[:, fine:]], dim=1)
            errors.append((prior.denoiser(noisy, levels) - z)[:, :fine].square().mean().item())
    assert errors[1] < 0.9 * errors[0]
