"""Adapters and models in the file formats of other projects, one module for each format."""

from lora_jax.exchange import bitsandbytes as bitsandbytes
from lora_jax.exchange import diffusers as diffusers
from lora_jax.exchange import gguf as gguf
from lora_jax.exchange import huggingface as huggingface
from lora_jax.exchange import kohya as kohya
from lora_jax.exchange import peft as peft
from lora_jax.exchange._place import place as place
