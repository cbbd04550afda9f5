"""What is to be learned: a model, and examples as its tokens."""

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
from experiments.llm.dialogsum import NAME as DIALOGSUM
from experiments.llm.dialogsum import dialogues
from experiments.llm.examples import Example, TokenizedExamples, read_examples, tokenized
from experiments.llm.mesh import Devices
from experiments.llm.options import DataOptions, ModelOptions
from experiments.models.llama import ChatTokenizer, LanguageModel, Llama, huggingface_rules
from lora_jax.exchange import peft


@dataclass(frozen=True)
class LanguageTask:
    """A model with examples to train on, and others to choose the best adapter with.

    Attributes:
      name: the name of the data.
      model: the model on the disk.
      network: what computes with its parameters.
      tokenizer: its tokenizer.
      max_length: the tokens of a row.
      train: the examples to train on.
      validation: the others.
    """

    name: str
    model: LanguageModel
    network: Llama
    tokenizer: ChatTokenizer
    max_length: int
    train: TokenizedExamples
    validation: TokenizedExamples


def language_task(
    model: LanguageModel, options: DataOptions, *, dtype: str, remat: bool, seed: int
) -> LanguageTask:
    """Returns the task, with the examples that the seed draws.

    Raises:
      InputError: there are too few examples, or one of them is damaged; it is named.
    """
    if options.max_length > model.config.max_position_embeddings:
        raise InputError(
            f"--max-length {options.max_length} is more than the "
            f"{model.config.max_position_embeddings} tokens that the model was made for"
        )
    training, validation = _divided(options, seed)
    tokenizer = model.tokenizer()

    def as_tokens(examples: Sequence[Example]) -> TokenizedExamples:
        return tokenized(
            examples,
            tokenizer,
            max_length=options.max_length,
            learn_prompts=options.learn_prompts,
            drop_long=options.drop_long,
        )

    return LanguageTask(
        name=options.data if options.data == DIALOGSUM else Path(options.data).stem,
        model=model,
        network=Llama(model.config, dtype=jnp.dtype(dtype), remat=remat),
        tokenizer=tokenizer,
        max_length=options.max_length,
        train=as_tokens(training),
        validation=as_tokens(validation),
    )


def _divided(options: DataOptions, seed: int) -> tuple[list[Example], list[Example]]:
    """Returns the examples to train on, and the held-out ones."""
    if options.data == DIALOGSUM:
        train, held_out = (
            [dialogue.example for dialogue in dialogues(part)] for part in ("train", "dev")
        )
        return (
            _drawn(train, options.train_examples, seed, "--train-examples"),
            _drawn(held_out, options.validation_examples, seed, "--validation-examples"),
        )
    examples = read_examples(Path(options.data))
    order = np.random.default_rng((seed, 1)).permutation(len(examples))
    shuffled = [examples[number] for number in order]
    count = options.validation_examples
    if count >= len(examples):
        raise InputError(
            f"--validation-examples is {count}, and {options.data} has {len(examples)} examples; "
            "pass a smaller number, or more data"
        )
    held_out, rest = shuffled[:count], shuffled[count:]
    return _drawn(rest, options.train_examples, seed, "--train-examples"), held_out


def _drawn(examples: list[Example], count: int | None, seed: int, option: str) -> list[Example]:
    if count is None:
        return examples
    if count > len(examples):
        raise InputError(f"{option} is {count}, and there are {len(examples)}; pass at most that")
    order = np.random.default_rng((seed, 2)).permutation(len(examples))[:count]
    return [examples[number] for number in sorted(order)]


def loaded_params(model: LanguageModel, options: ModelOptions, devices: Devices) -> Any:
    """Returns the weights, in the dtype and the format that were chosen, read leaf by leaf."""
    shapes = devices.placed_shapes(model.shapes(jnp.dtype(options.dtype)))
    as_stored = options.quantize == "as-stored"
    if as_stored and model.path.is_dir():
        raise InputError(
            f"--quantize as-stored, and {model.path} is a folder whose weights are not quantised; "
            "pass int8 or nf4"
        )
    if options.quantize in ("none", "as-stored"):
        return model.params(shapes, as_stored=as_stored)
    axes = peft.preview(shapes, names=huggingface_rules(model.config)).axes

    def quantised(path: str, leaf: jax.Array) -> Any:
        if "in" not in axes[path] or "batch" not in axes[path]:
            return leaf
        return lora_jax.quantize(
            {"leaf": leaf}, "leaf", format=options.quantize, axes={"leaf": axes[path]}
        )["leaf"]

    return model.params(shapes, convert=quantised)


def describe(task: LanguageTask, console: Console) -> None:
    """Shows how many examples there are, and what became of long ones."""
    parts = {"training": task.train, "validation": task.validation}
    counts = ", ".join(f"{len(each.examples):,} for {name}" for name, each in parts.items())
    console.note(f"{task.name}, examples: {counts}")
    console.note(f"Model: {task.model.path}")
    if cut := sum(each.cut for each in parts.values()):
        console.note(f"{cut:,} examples are cut off at {task.max_length} tokens (--max-length)")
    if dropped := sum(each.dropped for each in parts.values()):
        console.note(f"{dropped:,} examples are left out: nothing of them could be learned")
