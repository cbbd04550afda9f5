"""Models in the folders of Hugging Face transformers: safetensors in one file or several."""

from lora_jax.exchange.huggingface._read import tensors as tensors
from lora_jax.exchange.huggingface._save import save as save
