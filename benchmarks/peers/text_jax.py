"""The study on text as `lora_jax` does it: the study's own step, on batches from a file."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lora_jax
from benchmarks.peers.batches import read_batches
from benchmarks.peers.steps import timed_steps
from benchmarks.peers.text_start import peft_names
from experiments.common.compiled_steps import CompiledSteps
from experiments.common.memory import keep_freed_memory, return_freed_memory
from experiments.data.tokens import TokenBatch, in_order
from experiments.models.bert import Encoder, with_new_head
from experiments.text.evaluation import log_probabilities
from experiments.text.options import parsed
from experiments.text.step import optimizer, training_step
from experiments.text.task import adapted_apply, classifier_apply
from lora_jax.exchange import peft


class LoraJax:
    """The study's classifier and its training; see `benchmarks.peers.text_torch` for PEFT's."""

    def __init__(self, folder: str, dropout: bool) -> None:
        """Reads what `benchmarks.peers.text_start.Start` wrote."""
        keep_freed_memory()  # as on the other side, and in the study
        self._folder = Path(folder)
        start = json.loads((self._folder / "start.json").read_text(encoding="utf-8"))
        encoder = Encoder.read(Path(start["model"]))
        self._names = peft_names(encoder.config)
        config = encoder.config
        if not dropout:
            config = dataclasses.replace(
                config,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                classifier_dropout=0.0,
            )
        self._params = with_new_head(
            encoder.params, config, start["classes"], key=jax.random.key(0)
        )
        options = parsed(start["arguments"])
        steps = len(start["learning_rates"])
        self._tx = optimizer(options.training, options.methods[0], steps)
        self._apply = classifier_apply(config, start["classes"])
        self._steps = CompiledSteps(
            training_step(self._apply, self._tx, options.training.adapter_dropout)
        )

    def begin(self, seed: int) -> None:
        """Takes the adapter and the batches of this seed."""
        self._key = jax.random.key(seed)
        folder = self._folder / f"seed_{seed}"
        self.load(str(folder / "adapter"))
        self._state = self._tx.init(self._trainable)
        self._batches = [TokenBatch(**batch) for batch in read_batches(folder / "batches.npz")]

    def load(self, folder: str) -> None:
        """Takes an adapter in PEFT's format."""
        wrapped = peft.load(folder, self._params, names=self._names)
        self._trainable, self._frozen = lora_jax.split(wrapped)

    def save(self, folder: str) -> None:
        """Writes the adapter, with its head, in PEFT's format."""
        peft.save(
            folder,
            lora_jax.combine(self._trainable, self._frozen),
            names=self._names,
            config={"modules_to_save": ["classifier"]},
        )

    def warm_up(self) -> None:
        """Compiles the step for batches of every length."""
        for number, batch in enumerate(self._batches):
            self._steps.compile(batch.mask.shape[1], *self._arguments(number, batch))
        return_freed_memory()

    def steps(self, first: int, count: int) -> dict[str, Any]:
        """Takes these steps; returns their losses, and the seconds in all."""
        return timed_steps(self._step, first, count)

    def test(self, path: str) -> float:
        """Returns the accuracy on the test sentences; log-probabilities of classes go to `path`."""
        batches = [TokenBatch(**batch) for batch in read_batches(self._folder / "test.npz")]
        wrapped = lora_jax.combine(self._trainable, self._frozen)
        logs = log_probabilities(adapted_apply(self._apply), wrapped, batches)
        np.save(path, logs)
        labels = in_order(batches, [batch.labels for batch in batches])
        return float((logs.argmax(axis=-1) == labels).mean())

    def versions(self) -> dict[str, str]:
        """Returns what computes."""
        return {"device": str(jax.devices()[0]), "jax": jax.__version__}

    def _step(self, number: int) -> float:
        batch = self._batches[number]
        self._trainable, self._state, loss, _ = self._steps(
            batch.mask.shape[1], *self._arguments(number, batch)
        )
        return float(loss)

    def _arguments(self, number: int, batch: TokenBatch) -> tuple[Any, ...]:
        return self._trainable, self._state, self._frozen, batch, np.int32(number), self._key
