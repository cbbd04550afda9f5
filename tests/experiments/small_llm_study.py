"""A small study on a language model: its model, its examples, and what it has left behind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.llm.adapter_folder import AdapterFolder
from experiments.models.pretrained import LanguageModel
from tests import tiny_llama, tiny_t5, tiny_tokenizer

ANSWERS = {"hello": "the world", "world": "hello there", "other": "the other", "there": "world"}


def lines(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Returns conversations of one question and its answer."""
    words = np.random.default_rng(seed).choice(list(ANSWERS), count)
    return [
        {
            "messages": [
                {"role": "user", "content": f"{word}?"},
                {"role": "assistant", "content": ANSWERS[word]},
            ]
        }
        for word in words
    ]


def write_lines(path: Path, entries: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, entries)))
    return path


def write_model(path: Path, *, seed: int = 0, **changes: Any) -> None:
    """Writes a folder with a tiny model, of other settings where asked, and its tokenizer."""
    tiny_llama.write_folder(path, "llama", seed=seed, changes=changes)
    tiny_tokenizer.write_folder(path)


def write_encoder_decoder(path: Path) -> None:
    """Writes the same with an encoder-decoder, which has no chat template."""
    tiny_t5.write_folder(path, "flan")
    single = ("$A", tiny_tokenizer.END)
    tiny_tokenizer.write_folder(path, single=single, changes={"chat_template": None})


def write_study(folder: Path, write: Callable[[Path], None] = write_model) -> list[str]:
    """Writes a model and examples, and returns the arguments of a training on them."""
    write(folder / "model")
    examples = write_lines(folder / "examples.jsonl", lines(80))
    return [
        *("--model", str(folder / "model"), "--data", str(examples)),
        *("--max-length", "48", "--validation-examples", "16", "--rank", "4", "--epochs", "6"),
        *("--batch-size", "2", "--accumulate", "2", "--evaluate-every", "10"),
        *("--learning-rate", "0.02"),
    ]


def model_in(arguments: list[str]) -> LanguageModel:
    return LanguageModel.read(Path(arguments[arguments.index("--model") + 1]))


def restored(arguments: list[str], out: Path) -> tuple[LanguageModel, Any, Any]:
    """Returns the model, its parameters, and the adapter that a run left."""
    model = model_in(arguments)
    params = model.params()
    return model, params, AdapterFolder(out / "adapter").restore(params)


def assert_same(one: Any, other: Any) -> None:
    for leaf, its_other in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(leaf).tobytes() == np.asarray(its_other).tobytes()
