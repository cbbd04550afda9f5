"""What is to be learned: sentences as tokens, with the encoder that learns them."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax

import lora_jax
from experiments.common.console import Console
from experiments.common.errors import InputError
from experiments.common.training import ApplyFn
from experiments.data.dataset import TextDataset, divided, subset
from experiments.data.texts import load_texts
from experiments.data.tokens import TokenizedTexts
from experiments.models.bert import BertClassifier, BertConfig, Encoder, with_new_head
from experiments.text.options import DataOptions


@dataclass(frozen=True)
class TextTask:
    """Sentences to train on, to choose the best adapter with, and to test it on.

    Attributes:
      dataset: the name of the data.
      encoder: what the classifier is built on.
      classes: the names of the classes.
      max_length: how many tokens of a sentence are kept.
      train: the sentences to train on.
      validation: other sentences of the same file.
      test: the sentences of the evaluation file.
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


# A function that is adapted again is compiled again.
@lru_cache(maxsize=8)
def adapted_apply(apply_fn: ApplyFn, dropout: float = 0.0) -> ApplyFn:
    return lora_jax.adapt(apply_fn, dropout=dropout)


def loaded_texts(options: DataOptions, console: Console) -> TextDataset:
    """Returns the sentences, with the class names that were chosen."""
    dataset = load_texts(
        train_file=options.train_file,
        eval_file=options.eval_file,
        data=options.data,
        data_dir=options.data_dir,
        console=console,
    )
    names = _renamed(dataset.classes, options.class_names)
    train, test = (
        dataclasses.replace(texts, classes=names) for texts in (dataset.train, dataset.test)
    )
    return TextDataset(_name(options, dataset), train, test)


def _renamed(classes: tuple[str, ...], names: tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns what to call the classes; raises unless there is one name for each."""
    if names is None:
        return classes
    if len(names) != len(classes) or len(set(names)) != len(names):
        raise InputError(
            f"--class-names are {', '.join(names)}; expected {len(classes)} names, all different, "
            f"for the labels {', '.join(classes)}"
        )
    return names


def _name(options: DataOptions, dataset: TextDataset) -> str:
    """Returns the data's name, with that of the folder if it is a file: `sst2/train`."""
    file = options.train_file
    return dataset.name if file is None else f"{file.resolve().parent.name}/{dataset.name}"


def text_task(
    dataset: TextDataset, encoder: Encoder, options: DataOptions, *, seed: int
) -> TextTask:
    """Returns the task, with the sentences that the seed draws."""
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
    """Shows how many sentences there are, and which classes."""
    parts = {"training": task.train, "validation": task.validation, "test": task.test}
    counts = ", ".join(f"{len(texts):,} for {name}" for name, texts in parts.items())
    console.note(f"{task.dataset}, sentences: {counts}; classes: {', '.join(task.classes)}")
    if cut := sum(texts.truncated for texts in parts.values()):
        console.note(f"{cut:,} sentences are cut off at {task.max_length} tokens (--max-length)")


def shapes_line(shapes: Sequence[tuple[int, int]], batch_size: int) -> str:
    listed = ", ".join(f"{batch_size}×{length} ({count})" for length, count in shapes)
    return f"Compiled shapes (and how many batches an epoch has of each): {listed}"
