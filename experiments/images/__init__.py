"""The study on images: a diffusion model that has never seen some digits learns to draw them."""
