"""The study of ranks: variants of LoRA and their ranks, side by side on the MNIST task."""
