"""Adapters in the file format of diffusers, for text-to-image models."""

from lora_jax.exchange.diffusers._load import load as load
from lora_jax.exchange.diffusers._load import other_tensors as other_tensors
from lora_jax.exchange.diffusers._load import preview as preview
from lora_jax.exchange.diffusers._save import save as save
