"""What both sides of the comparison of language models start from: files that are written once."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.peers.batches import write_batches
from benchmarks.peers.random_model import in_sizes_of, random_params
from experiments.common.adamw import GREATEST_GRADIENT, warmed_up
from experiments.common.console import Console
from experiments.llm.exporting import write_huggingface, write_peft
from experiments.llm.mesh import Devices
from experiments.llm.options import ModelOptions, Options, parsed
from experiments.llm.packing import Batch
from experiments.llm.task import language_task, loaded_params
from experiments.llm.texts import TokenizedExample
from experiments.llm.training import Training
from experiments.models.pretrained import LanguageModel


@dataclass(frozen=True)
class StartFolder:
    """Where the files are.

    Attributes:
      path: the folder that holds them.
    """

    path: Path

    @property
    def model(self) -> Path:
        """The model, in Hugging Face's format, not quantised."""
        return self.path / "model"

    @property
    def adapter(self) -> Path:
        """The adapter at the start, in PEFT's format."""
        return self.path / "adapter"

    @property
    def trained(self) -> Path:
        """The adapter that both sides write with, in PEFT's format."""
        return self.path / "trained"

    @property
    def batches(self) -> Path:
        """The batches of each step, stacked."""
        return self.path / "batches.npz"

    @property
    def prompts(self) -> Path:
        """The prompts, each an array of tokens."""
        return self.path / "prompts.npz"

    def settings(self) -> dict[str, Any]:
        """Returns what decides the numbers of the training."""
        found: dict[str, Any] = json.loads(self._settings.read_text(encoding="utf-8"))
        return found

    def model_options(self) -> ModelOptions:
        """Returns which model both sides have, and what its frozen weights are."""
        settings = self.settings()
        return ModelOptions(
            model=self.model, dtype=settings["dtype"], quantize=settings["quantize"]
        )

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Writes what `settings` returns."""
        self._settings.write_text(json.dumps(settings), encoding="utf-8")

    @property
    def _settings(self) -> Path:
        return self.path / "start.json"


class Start:
    """The folder of those files, as `benchmarks.peers.processes.Remote` calls it."""

    def __init__(self, folder: str) -> None:
        """Takes the folder."""
        self._folder = StartFolder(Path(folder))

    def write(
        self,
        study_arguments: Sequence[str],
        most_steps: int,
        most_prompts: int,
        sizes: str | None = None,
    ) -> list[int]:
        """Writes the model, a new adapter, the batches of the first steps, and prompts.

        Args:
          study_arguments: what `python -m experiments.llm_lora` would be called with.
          most_steps: how many steps to write at most.
          most_prompts: how many prompts to write at most.
          sizes: the name of a model; if given, the weights are random, in its sizes.

        Returns:
          The tokens of each step, without those that fill rows up.
        """
        options, folder = parsed(study_arguments), self._folder
        console = Console(to_stderr=True).without_progress()
        chosen = dataclasses.replace(options.what_learns, quantize="none")
        model = LanguageModel.read(chosen.model)
        if sizes is not None:
            model = in_sizes_of(model, sizes)
        task = language_task(
            model,
            options.data,
            options.training,
            dtype=chosen.dtype,
            devices=Devices(),
        )
        params = (
            loaded_params(model, chosen, Devices(), console)
            if sizes is None
            else random_params(model, chosen.dtype)
        )
        packed = not options.data.no_packing
        training = Training(task, params, options.training, packed=packed, devices=Devices())
        steps = [training.steps[number] for number in range(min(most_steps, training.total))]
        write_huggingface(folder.model, params, model)
        write_peft(folder.adapter, training.wrapped, model)
        write_batches(folder.batches, [_arrays(step) for step in steps])
        held_out = task.validation.examples[:most_prompts]
        write_batches(folder.prompts, [{"tokens": _prompt(example)} for example in held_out])
        folder.write_settings(_settings(options, study_arguments, training.total))
        return [int((step.segments != 0).sum()) for step in steps]


def _arrays(step: Batch) -> dict[str, np.ndarray]:
    """Returns the arrays of a batch, which has no source where the model continues texts."""
    return {name: array for name, array in step._asdict().items() if array is not None}


def _prompt(example: TokenizedExample) -> np.ndarray:
    """Returns what stands before the first answer."""
    return example.tokens[: np.flatnonzero(example.learned)[0]]


def _settings(options: Options, study_arguments: Sequence[str], steps: int) -> dict[str, Any]:
    training = options.training
    rates = warmed_up(training.greatest_learning_rate, warmup=training.warmup, steps=steps)
    return {
        "arguments": list(study_arguments),
        "platform": jax.default_backend(),
        "dtype": options.what_learns.dtype,
        "quantize": options.what_learns.quantize,
        "learning_rates": [float(rates(step)) for step in range(steps)],
        "weight_decay": training.weight_decay,
        "greatest_gradient": GREATEST_GRADIENT,
    }
