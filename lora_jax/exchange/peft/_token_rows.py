"""Rows of single tokens: `trainable_token_indices` in a config, and a tensor for each table.

PEFT trains the rows of some tokens of a module beside adapters of others. Its file has the rows
themselves, under the name of a delta, and not what was added to them; its config has their numbers:
a list, which means the input embedding, or a list for each module, by the end of its name. In the
tree a row is W + B, so B is what a file has, less the row of the params.

In PyTorch the tokens are the first axis of a weight, of an embedding and of an output layer. Where
the two share their weight, PEFT trains the rows of the embedding, and the other follows.

Source: peft.tuners.trainable_tokens.TrainableTokensLayer and peft.utils.other.set_additional_
trainable_modules of 0.21.2.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._dtypes import common_dtype
from lora_jax._folders import CheckpointError
from lora_jax._originals import lora_weight
from lora_jax._paths import listed
from lora_jax._processes import on_host
from lora_jax._row_selection import RowSelection, selects_rows
from lora_jax._shapes import Axes
from lora_jax._values import as_array
from lora_jax._weight import LoRAWeight
from lora_jax.exchange.peft._files import ROWS_KEY, Tensors
from lora_jax.exchange.peft._layout import exchanged_for_tokens
from lora_jax.exchange.peft._names import NamedLeaf, NamedTree, adapter_key


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """The rows of a tree, in PEFT's words.

    Attributes:
      tensors: the rows of each module, by their keys.
      numbers: the numbers of the rows of each module.
      paths: the path of each module's leaf.
    """

    tensors: Tensors
    numbers: Mapping[str, list[int]]
    paths: Mapping[str, str]


def exported_rows(tree: NamedTree) -> TokenRows:
    """Returns the rows of a tree that train.

    Raises:
      CheckpointError: PEFT can't train rows of that weight.
    """
    tensors: Tensors = {}
    numbers: dict[str, list[int]] = {}
    paths: dict[str, str] = {}
    for named in tree.leaves:
        if not selects_rows(named.leaf):
            continue
        module = _module(named)
        weight = named.leaf
        rows = on_host(weight.lora_A.rows)
        numbers[module], paths[module] = rows.tolist(), named.path
        key = adapter_key(module, "rows", is_embedding=False, depth=0)
        before = _rows_of(weight.base, weight.axes, rows, weight.lora_B.dtype)
        scale, lora_B = (
            on_host(each).astype(before.dtype) for each in (weight.scale, weight.lora_B)
        )
        tensors[key] = before + scale * lora_B
    return TokenRows(tensors, numbers, paths)


def row_weight_of_file(
    config: Mapping[str, Any], tensors: Tensors, named: NamedLeaf, key: str, frozen: Sequence[str]
) -> LoRAWeight:
    """Returns the weight with the rows that a file has for it."""
    assert named.axes is not None
    axes = exchanged_for_tokens(named.rule.kind, named.axes)
    rows = np.asarray(_configured(config, _lookup_module(named)), np.int32)
    before = _rows_of(named.leaf, axes, rows, tensors[key].dtype)
    lora_B = tensors[key].astype(before.dtype) - before
    return lora_weight(
        named.leaf,
        RowSelection(jnp.asarray(rows), named.leaf.shape[axes.index("in")]),
        jnp.asarray(lora_B),
        jnp.ones((), lora_B.dtype),
        axes,
        frozen=tuple(dict.fromkeys(("lora_A", *(name for name in frozen if name == "lora_B")))),
    )


def row_problems(
    config: Mapping[str, Any], tensors: Tensors, named: NamedLeaf, keys: Mapping[str, str]
) -> Iterator[str]:
    """Says why what a file holds of the rows of a leaf can't become a node there."""
    key = keys["rows"]
    others = sorted(set(keys.values()) - {key})
    if others:
        yield f"'{named.path}' has rows and an adapter of its own: '{key}' and {listed(others)}."
        return
    obstacle = _obstacle(named)
    if obstacle is not None:
        yield f"'{key}' has rows of '{named.path}', {obstacle}."
        return
    rows = _configured(config, _lookup_module(named))
    if rows is None:
        yield f"'{key}' has rows, and the config has `{ROWS_KEY}` {config.get(ROWS_KEY)!r}."
        return
    size, width = named.layout.weight_shape
    shape = tensors[key].shape
    if shape != (len(rows), width):
        yield (
            f"'{key}' has shape {shape}; expected {(len(rows), width)} for the {len(rows)} rows "
            f"of '{named.path}' of shape {tuple(named.leaf.shape)} in `{ROWS_KEY}`."
        )
    beyond = [str(row) for row in rows if not 0 <= row < size]
    if beyond or len(set(rows)) < len(rows):
        yield (
            f"`{ROWS_KEY}` has {listed(beyond) if beyond else 'a number twice'} for "
            f"'{named.path}' of shape {tuple(named.leaf.shape)}; expected numbers below {size}, "
            "each once. Was the vocabulary resized? Put the larger table into `params` first."
        )


def tied_row_problems(
    tensors: Tensors, named: NamedLeaf, own: Mapping[str, str], other: Mapping[str, str]
) -> Iterator[str]:
    """Says why the rows of an embedding and of the layer that shares its weight are not alike."""
    if not other:
        return
    is_alike = set(own) == set(other) == {"rows"} and np.array_equal(
        tensors[own["rows"]], tensors[other["rows"]]
    )
    if not is_alike:
        yield (
            f"{listed(sorted({*own.values(), *other.values()}))} change the output layer in "
            f"another way than the embedding, and '{named.path}' is both "
            f"(tied={named.rule.tied!r}); expected the rows of the embedding alone, which the "
            "output layer shares."
        )


def is_lookup(named: NamedLeaf, name: str) -> bool:
    """Says whether a parameter of a leaf is the embedding, of two that share a weight."""
    return not named.rule.tied or (named.rule.kind == "embedding") != (name == named.tied_name)


def _module(named: NamedLeaf) -> str:
    """Returns the module whose rows a leaf has."""
    obstacle = _obstacle(named)
    if obstacle is not None:
        raise CheckpointError(f"`wrapped` has rows of '{named.path}', {obstacle}.")
    return _lookup_module(named)


def _lookup_module(named: NamedLeaf) -> str:
    names = [named.name(()), *([] if named.tied_name is None else [named.tied_name])]
    name = next(name for name in names if is_lookup(named, name))
    return name.removesuffix(".weight")


def _obstacle(named: NamedLeaf) -> str | None:
    """Returns why PEFT has no rows of a leaf's module, or None."""
    rule = named.rule
    is_table = len(named.leaf.shape) == 2 and not named.stack
    if rule.kind not in {"embedding", "linear"} or rule.transposed or not is_table:
        how = "transposed" if rule.transposed else f"of the kind {rule.kind!r}"
        return (
            f"which is {how} and has {len(named.leaf.shape)} axes; PEFT has them of embeddings and "
            "of output layers, of two axes"
        )
    if not named.name(()).endswith(".weight"):
        return f"whose name is '{named.name(())}'; PEFT has them of a module: 'MODULE.weight'"
    if rule.tied is True and rule.kind != "embedding":
        return (
            f"which is '{named.name(())}' and an embedding that it shares: expected its name, as "
            f"in Rule({rule.name!r}, {rule.path!r}, ..., tied='model.embed_tokens.weight')"
        )
    return None


def _configured(config: Mapping[str, Any], module: str) -> list[int] | None:
    """Returns the numbers of the rows of a module, or None where the config has none."""
    given = config.get(ROWS_KEY)
    if not isinstance(given, dict):
        return given
    return next((rows for name, rows in given.items() if module.endswith(name)), None)


def _rows_of(weight: Any, axes: Axes, rows: np.ndarray, dtype: Any) -> np.ndarray:
    """Returns rows of a weight, in at least float32 and in a dtype that holds `dtype`."""
    array = as_array(weight)
    taken = on_host(jnp.take(array, rows, axis=axes.index("in")))
    in_order = taken if axes[0] == "in" else taken.T
    return in_order.astype(common_dtype(array.dtype, dtype, jnp.float32))
