"""What is to be learned: sentences as tokens, and the encoder that learns."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax

import lora_jax
from experiments.bert import (
    BertClassifier,
    BertConfig,
    TextTokenizer,
    encoder_params,
    model_folder,
    with_new_head,
)
from experiments.bert.config import read_config
from experiments.bert.folder import CONFIG, TOKENIZER, WEIGHTS
from experiments.console import Console
from experiments.data.text import TextDataset, divided, subset
from experiments.data.text_load import load_texts
from experiments.data.tokens import TokenizedTexts
from experiments.text.options import DataOptions, renamed
from experiments.training import ApplyFn


@dataclass(frozen=True)
class Encoder:
    """A pretrained encoder, on JAX's default device."""

    folder: Path
    config: BertConfig
    params: Any

    @classmethod
    def read(cls, chosen: Path | None) -> "Encoder":
        folder = model_folder(chosen)
        config = read_config(folder / CONFIG)
        return cls(folder, config, jax.device_put(encoder_params(folder / WEIGHTS, config)))

    @property
    def weights_file(self) -> Path:
        return self.folder / WEIGHTS

    def tokenizer(self, max_length: int) -> TextTokenizer:
        return TextTokenizer(self.folder / TOKENIZER, self.config, max_length=max_length)


@dataclass(frozen=True)
class TextTask:
    """Sentences to train on, to choose the best adapter by, and to test it on.

    Attributes:
      dataset: the name of the data.
      encoder: what the classifier is built on.
      classes: their names.
      max_length: how many tokens of a sentence are kept.
      train: what is trained on.
      validation: other sentences of the same file.
      test: those of the evaluation file.
    """

    dataset: str
    encoder: Encoder
    classes: tuple[str, ...]
    max_length: int
    train: TokenizedTexts
    validation: TokenizedTexts
    test: TokenizedTexts

    @property
    def apply(self) -> ApplyFn:
        return classifier_apply(self.encoder.config, len(self.classes))

    def initial_params(self, seed: int) -> Any:
        """Returns the encoder's parameters and a new head."""
        key = jax.random.fold_in(jax.random.key(seed), 0)
        return with_new_head(self.encoder.params, self.encoder.config, len(self.classes), key=key)


def classifier_apply(config: BertConfig, classes: int) -> ApplyFn:
    return BertClassifier(config, classes).apply


# The same function adapted anew is compiled anew.
@lru_cache(maxsize=8)
def adapted_apply(apply_fn: ApplyFn, dropout: float = 0.0) -> ApplyFn:
    return lora_jax.adapt(apply_fn, dropout=dropout)


def loaded_texts(options: DataOptions, console: Console) -> TextDataset:
    """Returns the sentences, their classes by the names that were chosen."""
    dataset = load_texts(
        train_file=options.train_file,
        eval_file=options.eval_file,
        data=options.data,
        data_dir=options.data_dir,
        console=console,
    )
    names = renamed(dataset.classes, options.class_names)
    train, test = (
        dataclasses.replace(texts, classes=names) for texts in (dataset.train, dataset.test)
    )
    return TextDataset(_name(options, dataset), train, test)


def _name(options: DataOptions, dataset: TextDataset) -> str:
    """Returns the data's name; that of a file says little without its folder's."""
    file = options.train_file
    return dataset.name if file is None else f"{file.resolve().parent.name}/{dataset.name}"


def text_task(
    dataset: TextDataset, encoder: Encoder, options: DataOptions, *, seed: int
) -> TextTask:
    """Returns the task with the sentences that the seed draws."""
    validation, rest = divided(
        dataset.train, options.validation_examples, seed=seed, option="--validation-examples"
    )
    train = (
        rest if options.train_examples is None else subset(rest, options.train_examples, seed=seed)
    )
    tokenizer = encoder.tokenizer(options.max_length)
    return TextTask(
        dataset.name,
        encoder,
        dataset.classes,
        options.max_length,
        *(tokenizer.tokenized(texts) for texts in (train, validation, dataset.test)),
    )


def describe(task: TextTask, console: Console) -> None:
    """Tells what there is to learn from."""
    parts = {"training": task.train, "validation": task.validation, "test": task.test}
    counts = ", ".join(f"{len(texts):,} for {name}" for name, texts in parts.items())
    console.note(f"{task.dataset}, sentences: {counts}; classes: {', '.join(task.classes)}")
    if cut := sum(texts.truncated for texts in parts.values()):
        console.note(f"{cut:,} sentences are cut off at {task.max_length} tokens (--max-length)")


def shapes_line(shapes: Sequence[tuple[int, int]], batch_size: int) -> str:
    listed = ", ".join(f"{batch_size}×{length} ({count})" for length, count in shapes)
    return f"Shapes that are compiled, and batches of each in an epoch: {listed}"
