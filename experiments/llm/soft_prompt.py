"""A soft prompt: vectors that come before each text, and train in full (Lester et al., 2021).

They are a leaf of the parameters, `soft_prompt`, beside the model's own. In texts they are the
tokens -1, -2, ..., so that packing, caches and generation know nothing of them. A model without
them is the same with those tokens hidden: `without_prompt`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import lora_jax
from experiments.common.errors import InputError, as_input_error
from experiments.llm.examples import Example
from experiments.llm.loss import Apply
from experiments.llm.packing import Batch
from experiments.llm.texts import Texts, TokenizedExample
from experiments.models.tokenizer import ChatTokenizer, Message
from lora_jax.exchange import peft

LEAF = "soft_prompt"


class PromptedTexts(Texts):
    """Texts that begin with a soft prompt, as another kind of texts otherwise."""

    def __init__(self, texts: Texts, count: int) -> None:
        """Takes the other texts, and how many vectors come before each."""
        super().__init__(texts.tokenizer)
        self._texts, self._prompt = texts, -1 - np.arange(count, dtype=np.int32)

    def question(self, messages: Sequence[Message]) -> Int[np.ndarray, " length"]:
        return self._prompted(self._texts.question(messages))

    def prompt(self, text: str) -> Int[np.ndarray, " length"]:
        return self._prompted(self._texts.prompt(text))

    def example(self, example: Example, *, learn_prompts: bool = False) -> TokenizedExample:
        found = self._texts.example(example, learn_prompts=learn_prompts)
        if found.source is not None:
            return TokenizedExample(found.tokens, found.learned, self._prompted(found.source))
        # The first token is not learned, as without a prompt.
        own = np.append(False, found.learned[1:])
        learned = np.concatenate([np.zeros(len(self._prompt), bool), own])
        return TokenizedExample(self._prompted(found.tokens), learned)

    def _prompted(self, tokens: Int[np.ndarray, " length"]) -> Int[np.ndarray, " more"]:
        return np.concatenate([self._prompt, tokens])


def with_prompt(params: Mapping[str, Any], count: int) -> Mapping[str, Any]:
    """Returns the parameters of a model with a prompt of zeros, or as they are without one."""
    if not count:
        return params
    width = params["embed"]["embedding"].shape[-1]
    return {**params, LEAF: jnp.zeros((count, width), jnp.float32)}


def prompted(wrapped: Mapping[str, Any], start: Float[Array, "count width"]) -> Mapping[str, Any]:
    """Returns a wrapped tree with a prompt that trains from a start."""
    value = jnp.asarray(start, jnp.float32)
    return {**wrapped, LEAF: lora_jax.FullWeight(base=jnp.zeros_like(value), value=value)}


def start_of(
    apply: Apply,
    params: Mapping[str, Any],
    tokenizer: ChatTokenizer,
    count: int,
    source: str | None,
    *,
    seed: int,
) -> Float[Array, "count width"]:
    """Returns what a prompt starts from.

    Args:
      apply: the model's `apply`.
      params: its parameters, without a prompt.
      tokenizer: its tokenizer.
      count: how many vectors there are.
      source: a folder of PEFT's prompt tuning; a text, whose embeddings are repeated or cut to so
        many; or None, which draws embeddings of random tokens.
      seed: decides which.

    Raises:
      InputError: the folder's prompt has another shape, or the text has no tokens.
    """
    width = params["embed"]["embedding"].shape[-1]
    if source and Path(source).is_dir():
        with as_input_error():
            found = peft.load_prompt(source)
        if found.shape != (count, width):
            raise InputError(
                f"--soft-prompt-from {source} has a prompt of {found.shape[0]} vectors of "
                f"{found.shape[1]} numbers; expected --soft-prompt {count} of {width}"
            )
        return found
    if source is None:
        vocabulary = tokenizer.largest_id + 1
        tokens = np.random.default_rng((seed, 3)).choice(vocabulary, count)
    else:
        written = tokenizer.encoded(source, begins=False)
        if not len(written):
            raise InputError("--soft-prompt-from is a text without tokens; expected one with some")
        tokens = np.resize(written, count)
    # Weights may be quantised.
    vectors = lora_jax.adapt(apply)(
        {"params": params}, jnp.asarray(tokens, jnp.int32)[None], method="embedded"
    )
    return vectors[0].astype(jnp.float32)


def without_prompt(batch: Batch) -> Batch:
    """Returns a batch whose soft prompts are hidden: what a model without them reads.

    Positions stay: these models know distances alone.
    """
    hidden = batch._replace(segments=_shown(batch.tokens, batch.segments))
    if batch.source is None:
        return hidden
    source = batch.source
    return hidden._replace(source=source._replace(segments=_shown(source.tokens, source.segments)))


def _shown(tokens: Any, segments: Any) -> Any:
    return jnp.where(jnp.asarray(tokens) < 0, 0, segments)
