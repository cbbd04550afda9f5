"""What both contenders of the comparison on text start from: files that are written once."""

import json
from collections.abc import Sequence
from pathlib import Path

import jax

from benchmarks.peers.batches import write_batches
from experiments.common.adamw import GREATEST_GRADIENT
from experiments.common.console import Console
from experiments.data.tokens import TrainingBatches, lengths_up_to
from experiments.models.bert import BertConfig, Encoder, huggingface_modules
from experiments.text.evaluation import batches_of
from experiments.text.options import Options, parsed
from experiments.text.step import learning_rates
from experiments.text.task import TextTask, loaded_texts, text_task
from lora_jax.exchange import peft


def peft_names(config: BertConfig) -> list[peft.Rule]:
    """Returns what `benchmarks.peers.text_torch.Classifier` calls the classifier's weights."""
    kernels = [
        peft.Rule(f"encoder.{name}.weight", f"encoder/{path}/kernel")
        for path, name in huggingface_modules(config).items()
    ]
    head = [
        peft.Rule("classifier.weight", "classifier/kernel"),
        peft.Rule("classifier.bias", "classifier/bias"),
    ]
    return [*kernels, *head]


class Start:
    """The folder of those files, as `benchmarks.peers.processes.Remote` calls it."""

    def __init__(self, folder: str) -> None:
        """Takes the folder."""
        self._folder = Path(folder)

    def write(self, study_arguments: Sequence[str]) -> int:
        """Writes, for each seed, batches and a new adapter with its head in PEFT's format.

        Args:
          study_arguments: what `python -m experiments.text_lora` would be called with.

        Returns:
          How many steps a training has.
        """
        options = parsed(study_arguments)
        console = Console(to_stderr=True).without_progress()
        encoder = Encoder.read(options.data.model)
        dataset = loaded_texts(options.data, console)
        steps = 0
        for seed in options.seeds:
            task = text_task(dataset, encoder, options.data, seed=seed)
            steps = _write_seed(self._folder / f"seed_{seed}", task, options, seed)
        _write_test(self._folder, task)
        rates = learning_rates(options.training, options.methods[0], steps)
        start = {
            "arguments": list(study_arguments),
            "model": str(encoder.folder),
            "classes": len(task.classes),
            "learning_rates": [float(rates(step)) for step in range(steps)],
            "weight_decay": options.training.weight_decay,
            "greatest_gradient": GREATEST_GRADIENT,
        }
        (self._folder / "start.json").write_text(json.dumps(start), encoding="utf-8")
        return steps


def _write_seed(folder: Path, task: TextTask, options: Options, seed: int) -> int:
    """Writes the adapter and the batches, and returns how many of these there are."""
    training = options.training
    wrapped = options.methods[0].wrapped(
        task.initial_params(seed),
        task.apply,
        targets=training.targets,
        alpha=training.alpha,
        key=jax.random.key(seed),
    )
    peft.save(
        folder / "adapter",
        wrapped,
        names=peft_names(task.encoder.config),
        config={"modules_to_save": ["classifier"]},
    )
    batches = TrainingBatches(
        task.train,
        batch_size=training.batch_size,
        epochs=training.epochs,
        seed=seed,
        lengths=lengths_up_to(task.max_length),
    )
    write_batches(folder / "batches.npz", [batch._asdict() for batch in batches])
    return len(batches)


def _write_test(folder: Path, task: TextTask) -> None:
    batches = batches_of(task.test, max_length=task.max_length)
    write_batches(folder / "test.npz", [batch._asdict() for batch in batches])
