"""Models and adapters in the file format of ggml and llama.cpp, GGUF."""

from lora_jax.exchange.gguf._load import load as load
from lora_jax.exchange.gguf._save import save as save
