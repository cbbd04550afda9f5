"""Adapters of several tasks on one encoder, all of them in one batch."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import NDArray

import lora_jax
from experiments.common.errors import InputError, as_input_error
from experiments.data.tokens import TokenBatch, evaluation_batches, lengths_up_to
from experiments.models.bert import BertConfig, BertEncoder, Encoder, mean_pooled, with_new_head
from experiments.text.adapter_folder import AdapterFolder, Card
from experiments.text.evaluation import batches_of, log_probabilities
from experiments.text.task import adapted_apply, classifier_apply


@dataclass(frozen=True)
class Task:
    """An adapter with its head, and what it is for."""

    card: Card
    wrapped: Any

    @classmethod
    def read(cls, folder: AdapterFolder, encoder: Encoder) -> "Task":
        card = folder.read_card()
        card.check_encoder(encoder)
        key = jax.random.key(0)
        params = with_new_head(encoder.params, encoder.config, len(card.classes), key=key)
        return cls(card, folder.restore(params))

    def log_probabilities(self, sentences: Sequence[str], encoder: Encoder) -> NDArray[np.float32]:
        """Returns each class's log-probability for each sentence, with this adapter alone."""
        texts = encoder.tokenizer(self.card.max_length).unlabelled(sentences)
        batches = batches_of(texts, max_length=self.card.max_length)
        apply_fn = classifier_apply(encoder.config, len(self.card.classes))
        return log_probabilities(adapted_apply(apply_fn), self.wrapped, batches)


class ServedTasks:
    """A compiled function of a batch in which each row has its own task."""

    def __init__(self, tasks: Sequence[Task], encoder: Encoder) -> None:
        """Puts the adapters into a bank.

        Raises:
          InputError: they don't fit together; what differs is named.
        """
        self._tasks = tasks
        self._encoder = encoder
        self._max_length = min(task.card.max_length for task in tasks)
        with as_input_error():
            self._bank = lora_jax.serving.bank([task.wrapped["encoder"] for task in tasks])
        self._kernels, self._biases = _stacked_heads(tasks)
        fn = functools.partial(_log_probabilities, encoder.config)
        self._serve = jax.jit(lora_jax.serving.adapt(fn))

    def rows(self, sentences: Sequence[str]) -> TokenBatch:
        """Returns all sentences for the first task, then all of them for the second, and so on."""
        tokenizer = self._encoder.tokenizer(self._max_length)
        texts = tokenizer.unlabelled([*sentences] * len(self._tasks))
        (batch,) = evaluation_batches(
            texts, batch_size=len(texts), lengths=lengths_up_to(self._max_length)
        )
        order = np.argsort(batch.rows)
        return TokenBatch(*(field[order] for field in batch))

    def ids(self, sentences: Sequence[str]) -> NDArray[np.int32]:
        """Returns the number of each row's task."""
        return np.repeat(np.arange(len(self._tasks), dtype=np.int32), len(sentences))

    def __call__(self, batch: TokenBatch, ids: NDArray[np.int32]) -> Float[Array, "batch classes"]:
        """Returns each class's log-probability; it is -inf where a row's task lacks the class."""
        heads = self._kernels[ids], self._biases[ids]
        return self._serve(self._bank, ids, batch.token_ids, batch.mask, *heads)

    @property
    def programs(self) -> int:
        """How many programs were compiled."""
        return self._serve._cache_size()  # type: ignore[attr-defined]


def _log_probabilities(
    config: BertConfig,
    params: Any,
    token_ids: Int[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    kernel: Float[Array, "batch width classes"],
    bias: Float[Array, "batch classes"],
) -> Float[Array, "batch classes"]:
    hidden = BertEncoder(config).apply({"params": params}, token_ids, mask)
    logits = jnp.einsum("bw,bwc->bc", mean_pooled(hidden, mask), kernel) + bias
    return jax.nn.log_softmax(logits)


def _stacked_heads(
    tasks: Sequence[Task],
) -> tuple[Float[Array, "tasks width classes"], Float[Array, "tasks classes"]]:
    """Returns every head with as many classes as the largest has; added classes are impossible."""
    heads = [lora_jax.merge(task.wrapped)["classifier"] for task in tasks]
    most = max(len(task.card.classes) for task in tasks)
    kernels, biases = [], []
    for head in heads:
        missing = most - len(head["bias"])
        kernels.append(jnp.pad(head["kernel"], ((0, 0), (0, missing))))
        biases.append(jnp.pad(head["bias"], (0, missing), constant_values=-jnp.inf))
    return jnp.stack(kernels), jnp.stack(biases)


def common_model(cards: Sequence[Card]) -> Path | None:
    """Returns the folder of the encoder that all adapters are for, None for the packaged one.

    Raises:
      InputError: they are for different encoders.
    """
    if len({card.model_sha256 for card in cards}) > 1:
        raise InputError("--adapter: these adapters were trained beside different encoders")
    return cards[0].model_folder
