"""Tokens that are added to a model: rows of its embedding, and of an output layer of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.common.errors import InputError
from lora_jax.quantization import QuantizedWeight

# Where they are, by path, and along which axis.
TABLES: Mapping[tuple[str, str], int] = {("embed", "embedding"): 0, ("head", "kernel"): 1}


@dataclass(frozen=True)
class AddedToken:
    """A token that is added to a model.

    Attributes:
      text: what it stands for in texts.
      start: a text, the mean of whose embeddings it starts from; unless given, that of all.
    """

    text: str
    start: str | None = None


def read_added_tokens(path: Path) -> tuple[AddedToken, ...]:
    """Returns the tokens of a file: one in each line, and behind a tab the text it starts from.

    Raises:
      InputError: the file can't be read, has no tokens, or one twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--add-tokens {path} can't be read ({error})") from error
    found = [_added(line) for line in lines if line.strip()]
    texts = [each.text for each in found]
    twice = sorted({text for text in texts if texts.count(text) > 1})
    if twice or not found:
        held = f"has {twice[0]!r} twice" if twice else "has no tokens"
        raise InputError(f"--add-tokens {path} {held}; expected one token in each line")
    return tuple(found)


def _added(line: str) -> AddedToken:
    text, _, start = line.partition("\t")
    return AddedToken(text.strip(), start.strip() or None)


def smaller(shapes: Any, vocabulary: int) -> Any:
    """Returns the shapes of parameters with so many tokens."""

    def of_table(path: Any, shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axis = TABLES.get(tuple(key.key for key in path))
        if axis is None:
            return shape
        sizes = list(shape.shape)
        sizes[axis] = vocabulary
        return jax.ShapeDtypeStruct(tuple(sizes), shape.dtype, sharding=shape.sharding)

    return jax.tree_util.tree_map_with_path(of_table, shapes)


def grown(
    params: Any,
    shapes: Any,
    ids: Sequence[int],
    starts: Sequence[Int[np.ndarray, " tokens"] | None],
) -> Any:
    """Returns parameters with rows for added tokens.

    Args:
      params: the parameters of the model as it is on the disk.
      shapes: what the result should be; rows that no token has are zero.
      ids: the tokens that are added.
      starts: for each of them the tokens whose mean it starts from; None for that of all.

    Raises:
      InputError: a table is quantised.
    """

    def of_table(path: Any, leaf: Any, shape: jax.ShapeDtypeStruct) -> Any:
        axis = TABLES.get(tuple(key.key for key in path))
        if axis is None:
            return leaf
        if isinstance(leaf, QuantizedWeight):
            raise InputError(
                f"{'/'.join(key.key for key in path)} is quantised, and tokens are added to it; "
                "pass --quantize none, int8 or nf4, which leave it as it is"
            )
        rows = jnp.moveaxis(leaf, axis, 0)
        more = jnp.zeros((shape.shape[axis] - len(rows), *rows.shape[1:]), rows.dtype)
        table = jnp.concatenate([rows, more]).at[jnp.asarray(ids)].set(_means(rows, starts))
        placed = jnp.moveaxis(table, 0, axis)
        return placed if shape.sharding is None else jax.device_put(placed, shape.sharding)

    return jax.tree_util.tree_map_with_path(
        of_table, params, shapes, is_leaf=lambda node: isinstance(node, QuantizedWeight)
    )


def _means(
    rows: Float[Array, "tokens width"], starts: Sequence[Int[np.ndarray, " tokens"] | None]
) -> Float[Array, "added width"]:
    wide = rows.astype(jnp.float32)
    means = [wide.mean(0) if start is None else wide[start].mean(0) for start in starts]
    return jnp.stack(means).astype(rows.dtype)
