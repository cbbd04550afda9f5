"""Adapters in the file format of kohya's training scripts, for text-to-image models."""

from lora_jax.exchange.kohya._load import load as load
from lora_jax.exchange.kohya._load import other_tensors as other_tensors
from lora_jax.exchange.kohya._load import preview as preview
from lora_jax.exchange.kohya._save import save as save
