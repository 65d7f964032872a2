"""Checkpoints of latent diffusion (CompVis) and guided diffusion (OpenAI) read into diffusers' networks."""
