"""Models in the file format of ggml and llama.cpp, GGUF."""

from lora_jax.exchange.gguf._load import load as load
