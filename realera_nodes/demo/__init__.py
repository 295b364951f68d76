"""The embedded model: a small Stable Diffusion that ships with the project."""
