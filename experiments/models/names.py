"""What the parameters of language models are called in Hugging Face's folders."""

from collections.abc import Sequence
from typing import Protocol

from lora_jax.exchange import peft


class Named(Protocol):
    """What the settings of a model say of the names of its parameters."""

    @property
    def model_type(self) -> str:
        """The architecture, by Hugging Face's name."""

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the output layer is the embedding."""


def huggingface_rules(config: Named) -> Sequence[peft.Rule]:
    """Returns the rules for Hugging Face's names."""
    return peft.ready_rules(config.model_type, "lora_jax", tied=config.tie_word_embeddings)
