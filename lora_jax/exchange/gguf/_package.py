"""The package gguf, which this part of the library needs."""

from typing import Any


def gguf_package() -> Any:
    """Returns the package, imported where it is used: importing lora_jax stays cheap."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "lora_jax.exchange.gguf needs the package gguf: pip install 'lora-jax[gguf]'."
        ) from error
    return gguf
