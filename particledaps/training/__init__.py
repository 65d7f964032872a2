"""Training of a prior: an autoencoder, then a denoiser in its latent space."""
