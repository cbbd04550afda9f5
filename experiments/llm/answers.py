"""What a model answers: batches of prompts of about one length."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from experiments.common.console import Console
from experiments.common.errors import InputError
from experiments.llm.adapter_folder import AdapterFolder
from experiments.llm.mesh import Devices
from experiments.llm.options import ModelOptions
from experiments.llm.task import loaded_params
from experiments.models.llama import (
    ChatTokenizer,
    LanguageModel,
    Llama,
    Sampling,
    generate,
)
from experiments.models.llama.generate import GREEDY

# Prompts are filled up to a multiple of this, so that few programs serve all lengths.
_LENGTHS = 64


@dataclass(frozen=True)
class Writer:
    """A model that writes, with its adapter merged.

    Attributes:
      model: the model on the disk.
      network: what computes with its parameters.
      params: its parameters.
      tokenizer: its tokenizer.
    """

    model: LanguageModel
    network: Llama
    params: Any
    tokenizer: ChatTokenizer

    @classmethod
    def read(cls, adapter: Path | None, model: Path | None) -> "Writer":
        """Reads a model, and merges the adapter of a training if one is named.

        Raises:
          InputError: there is no such model or adapter, or the two do not belong together.
        """
        if adapter is None:
            chosen = ModelOptions(model=model)
            found = LanguageModel.read(chosen.model)
            params = loaded_params(found, chosen, Devices())
        else:
            folder = AdapterFolder(adapter)
            chosen = folder.read_card().model_options(model)
            found = LanguageModel.read(chosen.model)
            params = lora_jax.merge(folder.restore(loaded_params(found, chosen, Devices())))
        network = Llama(found.config, dtype=jnp.dtype(chosen.dtype))
        return cls(found, network, params, found.tokenizer())

    def answers(
        self,
        prompts: Sequence[np.ndarray],
        *,
        new_tokens: int,
        rows: int,
        console: Console,
        sampling: Sampling = GREEDY,
        seed: int = 0,
    ) -> list[str]:
        """Returns the text that follows each prompt.

        Args:
          prompts: the prompts as tokens.
          new_tokens: how many tokens to write at most.
          rows: how many prompts to answer at a time.
          console: where progress is shown.
          sampling: how tokens are drawn.
          seed: decides what is drawn.
        """
        self._check_lengths(prompts, new_tokens)
        run = functools.partial(
            generate,
            # Weights that are not adapted may still be quantised.
            lora_jax.adapt(self.network.apply),
            model=self.network,
            new_tokens=new_tokens,
            end_ids=self.tokenizer.end_ids,
            sampling=sampling,
        )
        compiled = jax.jit(run)
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        starts = range(0, len(order), rows)
        answers = [""] * len(prompts)
        with console.progress("Writing", len(starts)) as progress:
            for start in starts:
                numbers = order[start : start + rows]
                tokens, lengths = filled_up([prompts[number] for number in numbers], rows=rows)
                key = jax.random.fold_in(jax.random.key(seed), start)
                written = compiled(self.params, tokens=tokens, lengths=lengths, key=key)
                for number, row in zip(numbers, np.asarray(written), strict=False):
                    answers[number] = self.tokenizer.decoded(row).strip()
                progress.advance()
        return answers

    def _check_lengths(self, prompts: Sequence[np.ndarray], new_tokens: int) -> None:
        longest, most = max(map(len, prompts)), self.model.config.max_position_embeddings
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
