"""What a model answers: batches of prompts of about one length."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import lora_jax
from experiments.common.console import Console
from experiments.common.errors import InputError, as_input_error
from experiments.llm.adapter_folder import AdapterFolder
from experiments.llm.mesh import Devices
from experiments.llm.options import ModelOptions
from experiments.llm.soft_prompt import PromptedTexts, with_prompt
from experiments.llm.task import loaded_params
from experiments.llm.texts import Texts, texts_of
from experiments.models.generation import GREEDY, Sampling, generate
from experiments.models.pretrained import LanguageModel

# Prompts are filled up to a multiple of this, so that few programs serve all lengths.
_LENGTHS = 64


@dataclass(frozen=True)
class Writer:
    """A model that writes, with its adapter merged, or with several in a bank.

    Attributes:
      model: the model on the disk.
      network: what computes with its parameters.
      params: its parameters, or a bank of several adapters.
      texts: how it reads texts.
      count: how many answers each prompt gets: one of each adapter in the bank.
    """

    model: LanguageModel
    network: nn.Module
    params: Any
    texts: Texts
    count: int = 1

    @classmethod
    def read(cls, adapter: Path | None, model: Path | None, console: Console) -> "Writer":
        """Reads a model, and merges the adapter of a training if one is named.

        Raises:
          InputError: there is no such model or adapter, or the two do not belong together.
        """
        if adapter is None:
            chosen, prompt_length = ModelOptions(model=model), 0
            found = LanguageModel.read(chosen.model)
            params = loaded_params(found, chosen, Devices(), console)
        else:
            folder = AdapterFolder(adapter)
            card = folder.read_card()
            chosen, prompt_length = card.model_options(model), card.soft_prompt
            found = card.language_model(model)
            base = with_prompt(loaded_params(found, chosen, Devices(), console), prompt_length)
            params = lora_jax.merge(folder.restore(base))
        network = found.network(dtype=jnp.dtype(chosen.dtype), prompt_length=prompt_length)
        return cls(found, network, params, PromptedTexts(texts_of(found), prompt_length))

    @classmethod
    def of_several(cls, adapters: Sequence[Path], model: Path | None, console: Console) -> "Writer":
        """Reads a model, and several adapters of it into one bank.

        Raises:
          InputError: they are not adapters of one model, or train weights in full.
        """
        folders = [AdapterFolder(adapter) for adapter in adapters]
        cards = [folder.read_card() for folder in folders]
        if any(card.soft_prompt for card in cards):
            raise InputError(
                "one of these adapters has a soft prompt, and several answer in one batch without "
                "any; pass one adapter at a time"
            )
        chosen = cards[0].model_options(model)
        found = cards[0].language_model(model)
        params = loaded_params(found, chosen, Devices(), console)
        with as_input_error():
            bank = lora_jax.serving.bank([folder.restore(params) for folder in folders])
        network = found.network(dtype=jnp.dtype(chosen.dtype))
        return cls(found, network, bank, texts_of(found), len(folders))

    def answers(
        self,
        prompts: Sequence[np.ndarray],
        *,
        new_tokens: int,
        rows: int,
        console: Console,
        sampling: Sampling = GREEDY,
        seed: int = 0,
    ) -> list[list[str]]:
        """Returns the texts that follow each prompt: one, or one of each adapter.

        Args:
          prompts: the prompts as tokens.
          new_tokens: how many tokens to write at most.
          rows: how many prompts to answer at a time.
          console: where progress is shown.
          sampling: how tokens are drawn.
          seed: decides what is drawn.
        """
        self._check_lengths(prompts, new_tokens)
        compiled = self._compiled(new_tokens, sampling)
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        starts = range(0, len(order), rows)
        answers: list[list[str]] = [[]] * len(prompts)
        with console.progress("Writing", len(starts)) as progress:
            for start in starts:
                numbers = order[start : start + rows]
                tokens, lengths = filled_up([prompts[number] for number in numbers], rows=rows)
                key = jax.random.fold_in(jax.random.key(seed), start)
                written = np.asarray(compiled(self.params, tokens, lengths, key))
                for number, own in zip(numbers, written, strict=False):
                    answers[number] = [self.texts.tokenizer.decoded(row).strip() for row in own]
                progress.advance()
        return answers

    def _compiled(self, new_tokens: int, sampling: Sampling) -> Callable[..., Any]:
        """Returns a function from prompts to tokens (prompt, adapter, new)."""
        run = functools.partial(
            generate,
            new_tokens=new_tokens,
            end_ids=self.texts.tokenizer.end_ids,
            sampling=sampling,
        )

        def of_one(params: Any, tokens: Any, lengths: Any, key: Any) -> Any:
            # Weights that are not adapted may still be quantised.
            apply = lora_jax.adapt(self.network.apply)
            return run(apply, params, tokens=tokens, lengths=lengths, key=key)[:, None]

        def of_each(bank: Any, tokens: Any, lengths: Any, key: Any) -> Any:
            served = lora_jax.serving.adapt(
                lambda params, tokens, lengths, key: run(
                    self.network.apply, params, tokens=tokens, lengths=lengths, key=key[0]
                )
            )
            rows = len(tokens) * self.count
            tokens, lengths = (jnp.repeat(each, self.count, axis=0) for each in (tokens, lengths))
            ids = jnp.arange(rows) % self.count
            written = served(bank, ids, tokens, lengths, jax.random.split(key, rows))
            return written.reshape(-1, self.count, new_tokens)

        return jax.jit(of_one if self.count == 1 else of_each)

    def _check_lengths(self, prompts: Sequence[np.ndarray], new_tokens: int) -> None:
        longest, most = max(map(len, prompts)), self.model.greatest_length
        if longest + new_tokens > most:
            raise InputError(
                f"a prompt of {longest} tokens and --new-tokens {new_tokens} are more than the "
                f"{most} that the model was made for"
            )


def filled_up(prompts: Sequence[np.ndarray], *, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns prompts as rows of one width, and their lengths; rows that are left have a token."""
    width = -(-max(map(len, prompts)) // _LENGTHS) * _LENGTHS
    tokens = np.zeros((rows, width), np.int32)
    lengths = np.ones(rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        lengths[row] = len(prompt)
    return tokens, lengths
