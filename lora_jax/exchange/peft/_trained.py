"""The weights of a wrapped tree that train in full, as PEFT has them."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lora_jax._folders import CheckpointError
from lora_jax._weight import FullWeight, is_lora_weight
from lora_jax.exchange.peft._export import Adapters
from lora_jax.exchange.peft._keys import PREFIX, bias_key
from lora_jax.exchange.peft._places import NamedTree, taken
from lora_jax.exchange.peft._tensors import Tensors

# What PEFT adds to `modules_to_save` by itself.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclasses.dataclass(frozen=True)
class TrainedWeights:
    """What trains in full, in PEFT's words.

    Attributes:
      tensors: the weights by their keys, with those that PEFT wants beside them.
      modules_to_save: the modules that train in full.
      bias: which biases train, `"none"`, `"lora_only"` (those of adapted modules) or `"all"`.
    """

    tensors: Tensors
    modules_to_save: tuple[str, ...]
    bias: str


def exported_weights(
    tree: NamedTree, adapters: Adapters, config: Mapping[str, Any]
) -> TrainedWeights:
    """Returns the weights that train in full.

    PEFT trains a module as a whole, and expects all of its tensors: `modules_to_save`. Biases may
    train alone.
    """
    trained = [name for name in tree.by_name if _is_trained(tree, name)]
    given = tuple(config.get("modules_to_save") or ())
    heads = _HEADS.get(str(config.get("task_type")), ())
    whole = {_module(name): None for name in trained if not name.endswith(".bias")}
    entries = (*given, *(module for module in whole if not _matches(module, given)))
    saved = _saved_modules(tree, (*entries, *heads))
    _check_apart(adapters, saved, entries)
    tensors = {
        f"{PREFIX}{name}": _value(tree, name) for name in tree.by_name if _is_inside(name, saved)
    }
    biases = [name for name in trained if not _is_inside(name, saved)]
    for name in biases:
        module = _module(name)
        key = bias_key(module, wrappers=adapters.wrappers.get(module, 0))
        tensors[key] = _value(tree, name)
    are_adapted = all(_module(name) in adapters.wrappers for name in biases)
    bias = "lora_only" if are_adapted and config.get("bias") != "all" else "all"
    return TrainedWeights(tensors, entries, bias if biases else "none")


def _is_trained(tree: NamedTree, name: str) -> bool:
    return isinstance(tree.by_name[name][0].leaf, FullWeight)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _matches(module: str, entries: Iterable[str]) -> bool:
    # As PEFT asks it: an entry may begin in the middle of a segment.
    return any(module.endswith(entry) for entry in entries)


def _saved_modules(tree: NamedTree, entries: Iterable[str]) -> tuple[str, ...]:
    """Returns the modules that PEFT takes these entries to mean, of those that the tree knows."""
    if "" in entries:
        loose = [name for name in tree.by_name if _is_trained(tree, name) and not _module(name)]
        raise CheckpointError(
            f"`wrapped` trains '{loose[0] if loose else ''}' in full, a parameter without a "
            "module; PEFT trains modules in full."
        )
    modules: dict[str, None] = {}
    for name in tree.by_name:
        parts = name.split(".")[:-1]
        modules |= {".".join(parts[: end + 1]): None for end in range(len(parts))}
    return tuple(module for module in modules if _matches(module, entries))


def _is_inside(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _check_apart(adapters: Adapters, saved: tuple[str, ...], entries: tuple[str, ...]) -> None:
    for adapter in adapters.each:
        if _is_inside(f"{adapter.module}.", saved):
            raise CheckpointError(
                f"`wrapped` adapts '{adapter.named.path}', which is in a module that trains in "
                f"full: `modules_to_save` {list(entries)}. PEFT trains whole modules and adapts "
                "nothing in them; leave one of the two out of wrap(..., train=...)."
            )


def _value(tree: NamedTree, name: str) -> np.ndarray:
    named, place = tree.by_name[name]
    leaf = named.leaf
    assert not is_lora_weight(leaf)
    value = leaf.value if isinstance(leaf, FullWeight) else leaf
    return named.layout.file_weight(taken(value, named, place))
