"""Studies that use `lora_jax`; each is a small command line: `python -m experiments.mnist_lora`."""
