"""Networks that predict something else than EDM's: trained, exported, loaded, used."""

from dataclasses import replace

import pytest
import torch
from tiny import DENOISER, LATENTS, command, write_images
from training_support import CPU, FEW_STEPS, TINY

from particledaps.diffusion.targets import TARGETS, target_of
from particledaps.priors.embedded import load_embedded, read_config
from particledaps.priors.errors import PriorError
from particledaps.training.denoiser import Bank, denoising_errors, train_denoiser, wrap


@pytest.mark.parametrize("target", TARGETS)
def test_a_short_training_learns(tmp_path, target):
    """Latents of one sign: the error at high noise falls well below that of the fresh network."""
    torch.manual_seed(0)
    latents = torch.rand(64, *LATENTS.shape) * 0.2 + 1
    loop = replace(FEW_STEPS, num_steps=100, batch_size=32, learning_rate=1e-2, checkpoint_every=100)
    settings = replace(DENOISER, target=target, min_snr_gamma=5.0, loop=replace(loop, ema_decay=0.9))

    class Fixed:
        def encode(self, x):
            return latents[: len(x)]

    def error(network):
        return denoising_errors(wrap(network, settings, LATENTS), latents)["validation_mse_sigma_1.2"]

    torch.manual_seed(1)
    trained = train_denoiser(Fixed(), settings, Bank(latents), LATENTS, torch.zeros(8, 3, 16, 16), tmp_path, 1, CPU)
    assert error(trained) < 0.4  # a third of what 0 everywhere (1.2) or the noisy latent itself (1.4) give


@pytest.mark.parametrize(
    ("target", "more"), [("v", ["denoiser.zero_terminal_snr=true", "denoiser.noise_offset=0.1"]), ("flow", [])]
)
def test_from_training_to_an_answer(tmp_path, target, more):
    pictures = write_images(tmp_path / "pictures", 12)
    folder = tmp_path / "prior"
    outcome = command(
        "train_prior", "name=tiny", f"save_dir={tmp_path}/t", f"export_dir={folder}", f"images={pictures}", *TINY,
        f"denoiser.target={target}", *more,
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    config, prior = read_config(folder), load_embedded(folder)
    assert target_of(prior.denoiser) == (target, target == "v") and prior.latent_std == 1
    assert config.get("noise_offset") == (0.1 if more else None)
    images = ["data=folder", f"data.dir={pictures}", "data.end_id=1", "num_samples=2", "device=cpu"]
    short = ["sampler.annealing.num_steps=2", "sampler.mcmc.num_steps=2", f"save_dir={tmp_path}/r"]
    outcome = command("posterior_sample", "model=embedded", f"model.path={folder}", *images, *short)
    assert outcome.status == 0, outcome.err
    (folder / "config.json").write_text((folder / "config.json").read_text().replace(f'"{target}"', '"w"'))
    with pytest.raises(PriorError, match="no valid entry target"):
        load_embedded(folder)


REFUSED = {
    "denoiser.target=w": "denoiser.target=w: allowed are edm, eps, v, x0, flow",
    "denoiser.zero_terminal_snr=true denoiser.target=eps": "where there is no signal denoiser.target=eps says nothing",
    "denoiser.min_snr_gamma=0": "denoiser.min_snr_gamma=0",
    "denoiser.target=v encoding=haar": "parts with noise of their own (encoding=haar) are trained with edm",
}


@pytest.mark.parametrize("case", REFUSED.items(), ids=lambda case: case[0])
def test_what_does_not_go_together(case):
    outcome = command("train_prior", "images=/pictures", *case[0].split())
    assert outcome.status == 2 and case[1] in outcome.err
