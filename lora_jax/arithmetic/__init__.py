"""Adapters made of adapters: of another rank, of several, of a model that was tuned in full."""

from lora_jax.arithmetic._blend import blend as blend
from lora_jax.arithmetic._extract import extract as extract
from lora_jax.arithmetic._original import on_original_base as on_original_base
from lora_jax.arithmetic._resize import resize as resize
