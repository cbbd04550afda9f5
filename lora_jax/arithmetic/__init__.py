"""New adapters from old ones, by resizing or blending, or from a fully fine-tuned model."""

from lora_jax.arithmetic._blend import blend as blend
from lora_jax.arithmetic._extract import extract as extract
from lora_jax.arithmetic._original import on_original_base as on_original_base
from lora_jax.arithmetic._resize import resize as resize
