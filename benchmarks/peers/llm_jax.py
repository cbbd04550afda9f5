"""The study on language models as `lora_jax` does it: the study's own step, and its own writing."""

import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from benchmarks.peers.batches import read_batches
from benchmarks.peers.llm_start import StartFolder
from benchmarks.peers.steps import timed_steps
from benchmarks.peers.xla_profile import xla_seconds
from experiments.common.adamw import clipped_adamw
from experiments.common.compiled_steps import CompiledSteps
from experiments.common.console import Console, device_name
from experiments.common.errors import InputError
from experiments.common.memory import accelerator_peak_bytes, keep_freed_memory, return_freed_memory
from experiments.llm.answers import filled_up
from experiments.llm.exporting import write_peft
from experiments.llm.mesh import Devices
from experiments.llm.objectives import Answers
from experiments.llm.packing import Batch
from experiments.llm.step import training_step
from experiments.llm.task import loaded_params
from experiments.models.generation import generate
from experiments.models.pretrained import LanguageModel
from lora_jax.exchange import peft

# The end of an answer is not looked for, so that all sides write the same number of tokens.
_NO_END = (-1,)


class _OnJax:
    """A side whose memory is that of JAX's device."""

    def accelerator_peak(self, *, forgotten: bool) -> int | None:
        """Returns the most memory of an accelerator so far; JAX can't begin to count anew."""
        del forgotten
        return accelerator_peak_bytes()


class LoraJax(_OnJax):
    """The study's model and its training; see `benchmarks.peers.llm_torch` for PEFT's."""

    def __init__(self, folder: str, remat: bool) -> None:
        """Reads what `benchmarks.peers.llm_start.Start` wrote.

        Args:
          folder: the folder that it was written to.
          remat: whether the backward pass computes each layer again.
        """
        keep_freed_memory()  # as on the other side, and in the study
        self._folder = StartFolder(Path(folder))
        self._model = LanguageModel.read(self._folder.model)
        dtype = self._folder.model_options().dtype
        settings = self._folder.settings()
        rates = jnp.array(settings["learning_rates"])
        self._tx = clipped_adamw(lambda step: rates[step], weight_decay=settings["weight_decay"])
        apply = self._model.network(dtype=jnp.dtype(dtype), remat=remat).apply
        self._steps = CompiledSteps(training_step(apply, self._tx, Answers()))

    def begin(self) -> None:
        """Takes the adapter and the batches."""
        wrapped = _adapted(self._folder, self._folder.adapter)
        self._trainable, self._frozen = lora_jax.split(wrapped)
        self._state = self._tx.init(self._trainable)
        self._batches = [Batch(**batch) for batch in read_batches(self._folder.batches)]

    def warm_up(self) -> None:
        """Compiles the step for batches of every length."""
        for batch in self._batches:
            self._steps.compile(batch.tokens.shape[-1], *self._arguments(batch))
        return_freed_memory()

    def steps(self, first: int, count: int) -> dict[str, Any]:
        """Takes these steps; returns their losses, and the seconds in all."""
        return timed_steps(self._step, first, count)

    def profile(self, first: int, count: int) -> dict[str, float]:
        """Takes these steps; returns how long kinds of operations took in all.

        Raises:
          InputError: they run elsewhere than on a CPU.
        """
        if jax.default_backend() != "cpu":
            raise InputError("steps are profiled on a CPU alone; JAX_PLATFORMS=cpu has them there")
        return xla_seconds(lambda: self.steps(first, count)["seconds"], self._steps.texts)

    def save(self) -> None:
        """Writes the adapter that both sides write with."""
        wrapped = lora_jax.combine(self._trainable, self._frozen)
        write_peft(self._folder.trained, wrapped, self._model)

    def versions(self) -> dict[str, str]:
        """Returns what computes."""
        return {"device": device_name(), "jax": jax.__version__}

    def _step(self, number: int) -> float:
        batch = self._batches[number]
        self._trainable, self._state, measured = self._steps(
            batch.tokens.shape[-1], *self._arguments(batch)
        )
        return float(measured["loss"])

    def _arguments(self, batch: Batch) -> tuple[Any, ...]:
        return self._trainable, self._state, self._frozen, batch


class LoraJaxWriter(_OnJax):
    """The model with its adapter merged, which answers all prompts in one batch."""

    def __init__(self, folder: str, new_tokens: int) -> None:
        """Reads the model, the adapter and the prompts.

        Args:
          folder: the folder of `benchmarks.peers.llm_start.Start`.
          new_tokens: how many tokens to write after each prompt.
        """
        keep_freed_memory()
        start = StartFolder(Path(folder))
        self._params = jax.jit(lora_jax.merge)(_adapted(start, start.trained))
        prompts = [prompt["tokens"] for prompt in read_batches(start.prompts)]
        self._prompts = filled_up(prompts, rows=len(prompts))
        dtype = jnp.dtype(start.model_options().dtype)
        apply = LanguageModel.read(start.model).network(dtype=dtype).apply
        self._generate = jax.jit(
            functools.partial(generate, apply, new_tokens=new_tokens, end_ids=_NO_END)
        )

    def write(self) -> dict[str, Any]:
        """Returns the tokens that follow each prompt, and the seconds that it took."""
        tokens, lengths = self._prompts
        start = time.perf_counter()
        written = np.asarray(self._generate(self._params, tokens=tokens, lengths=lengths))
        return {"seconds": time.perf_counter() - start, "tokens": written.tolist()}


def _adapted(start: StartFolder, adapter: Path) -> Any:
    model, quiet = LanguageModel.read(start.model), Console(to_stderr=True).without_progress()
    params = loaded_params(model, start.model_options(), Devices(), quiet)
    return peft.load(adapter, params, names=model.rules)
