"""What is to be learned: a model, and examples as its tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import lora_jax
from experiments.common.console import Console
from experiments.common.errors import InputError
from experiments.llm.dialogsum import NAME as DIALOGSUM
from experiments.llm.dialogsum import dialogues
from experiments.llm.examples import Example, read_examples, read_preferences
from experiments.llm.mesh import Devices
from experiments.llm.options import DataOptions, ModelOptions, TrainingOptions
from experiments.llm.soft_prompt import PromptedTexts
from experiments.llm.texts import Texts, TokenizedExamples, texts_of, tokenized, tokenized_pairs
from experiments.models.names import huggingface_rules
from experiments.models.pretrained import Config, LanguageModel
from lora_jax.exchange import peft

Part = TypeVar("Part")


@dataclass(frozen=True)
class LanguageTask:
    """A model with examples to train on, and others to choose the best adapter with.

    Attributes:
      name: the name of the data.
      model: the model on the disk.
      network: what computes with its parameters.
      texts: how it reads texts.
      max_length: the tokens of a row.
      train: the examples to train on.
      validation: the others.
    """

    name: str
    model: LanguageModel
    network: nn.Module
    texts: Texts
    max_length: int
    train: TokenizedExamples
    validation: TokenizedExamples


def language_task(
    model: LanguageModel,
    options: DataOptions,
    training: TrainingOptions,
    *,
    dtype: str,
    devices: Devices,
) -> LanguageTask:
    """Returns the task, with the examples that the seed draws.

    Raises:
      InputError: there are too few examples, or one of them is damaged; it is named.
    """
    if options.max_length > model.greatest_length:
        raise InputError(
            f"--max-length {options.max_length} is more than the {model.greatest_length} tokens "
            "that the model was made for"
        )
    prompt_length = training.soft_prompt or 0
    texts = PromptedTexts(texts_of(model), prompt_length)
    limits = {"max_length": options.max_length, "drop_long": options.drop_long}
    if training.objective == "dpo":
        _check_preferences(options)
        pairs = _divided(read_preferences(Path(options.data)), options, training.seed)
        train, validation = (tokenized_pairs(part, texts, **limits) for part in pairs)
    else:
        limits["learn_prompts"] = options.learn_prompts
        parts = _examples(options, training.seed)
        train, validation = (tokenized(part, texts, **limits) for part in parts)
    return LanguageTask(
        name=options.data if options.data == DIALOGSUM else Path(options.data).stem,
        model=model,
        network=model.network(
            dtype=jnp.dtype(dtype),
            remat=not training.no_remat,
            cut=devices.hidden_cut,
            prompt_length=prompt_length,
        ),
        texts=texts,
        max_length=options.max_length,
        train=train,
        validation=validation,
    )


def _check_preferences(options: DataOptions) -> None:
    if options.data == DIALOGSUM:
        raise InputError(
            f"--data {DIALOGSUM} has no preferences, which --objective dpo learns from; pass a "
            "file with `prompt`, `chosen` and `rejected` on each line"
        )
    if options.learn_prompts:
        raise InputError("--learn-prompts goes with --objective sft; dpo compares answers alone")


def _examples(options: DataOptions, seed: int) -> tuple[list[Example], list[Example]]:
    """Returns the examples to train on, and the held-out ones."""
    if options.data != DIALOGSUM:
        return _divided(read_examples(Path(options.data)), options, seed)
    train, held_out = (
        [dialogue.example for dialogue in dialogues(part)] for part in ("train", "dev")
    )
    return (
        _drawn(train, options.train_examples, seed, "--train-examples"),
        _drawn(held_out, options.validation_examples, seed, "--validation-examples"),
    )


def _divided(
    examples: Sequence[Part], options: DataOptions, seed: int
) -> tuple[list[Part], list[Part]]:
    """Returns what a file has to train on, and what is held out of it."""
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


def _drawn(examples: list[Part], count: int | None, seed: int, option: str) -> list[Part]:
    if count is None:
        return examples
    if count > len(examples):
        raise InputError(f"{option} is {count}, and there are {len(examples)}; pass at most that")
    order = np.random.default_rng((seed, 2)).permutation(len(examples))[:count]
    return [examples[number] for number in sorted(order)]


def loaded_params(
    model: LanguageModel, options: ModelOptions, devices: Devices, console: Console
) -> Any:
    """Returns the weights, in the dtype and the format that were chosen, read leaf by leaf."""
    shapes = devices.placed_shapes(model.shapes(jnp.dtype(options.dtype)))
    as_stored = options.quantize == "as-stored"
    if as_stored and model.path.is_dir():
        raise InputError(
            f"--quantize as-stored, and {model.path} is a folder whose weights are not quantised; "
            "pass int8 or nf4"
        )
    convert = quantized_as(options.quantize, model.config, shapes)
    with console.progress("Reading weights", len(jax.tree.leaves(shapes))) as progress:

        def read(path: str, leaf: Any) -> Any:
            progress.advance()
            return convert(path, leaf)

        return model.params(shapes, as_stored=as_stored, convert=read)


def quantized_as(chosen: str, config: Config, shapes: Any) -> Callable[[str, Any], Any]:
    """Returns a function of the path and the value of a leaf that quantises the layers' matrices.

    Args:
      chosen: a format, or one of `none` and `as-stored`, which keep every leaf as it is.
      config: the settings of the model.
      shapes: the shapes of its parameters.
    """
    axes = peft.preview(shapes, names=huggingface_rules(config)).axes

    def convert(path: str, leaf: Any) -> Any:
        is_kept = chosen in ("none", "as-stored")
        if is_kept or "in" not in axes[path] or "batch" not in axes[path]:
            return leaf
        return lora_jax.quantize({"leaf": leaf}, "leaf", format=chosen, axes={"leaf": axes[path]})[
            "leaf"
        ]

    return convert


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
