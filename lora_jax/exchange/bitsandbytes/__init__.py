"""Models in the 4-bit checkpoints of bitsandbytes."""

from lora_jax.exchange.bitsandbytes._load import load as load
