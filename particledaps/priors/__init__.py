"""Priors: an autoencoder and a denoiser of its latents, one file per family."""
