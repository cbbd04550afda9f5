"""Adapters of single rows: the embeddings of new tokens, trained beside a frozen table."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from lora_jax._dtypes import common_dtype
from lora_jax._originals import lora_weight
from lora_jax._partition import cut_as, factor_shardings
from lora_jax._paths import listed
from lora_jax._row_selection import RowSelection
from lora_jax._settings import Settings
from lora_jax._shapes import Axes, side_size
from lora_jax._weight import LoRAWeight, innermost_base, is_adapter_node, is_lora_weight


def row_weight(weight: Any, axes: Axes, rows: Sequence[int], dtype: Any = None) -> LoRAWeight:
    """Returns a weight with a trainable change of some of its rows, which is zero.

    Args:
      weight: the weight: an array, quantised, or adapted already.
      axes: the role of each of its two axes.
      rows: the numbers of the rows, along the `"in"` axis.
      dtype: that of the change; by default float32, or the weight's dtype where that is wider.
    """
    dtype = jnp.dtype(dtype or common_dtype(weight.dtype, jnp.float32))
    shape = (len(rows), side_size(weight.shape, axes, "out"))
    shardings = factor_shardings(innermost_base(weight), axes, None, len(rows))
    return lora_weight(
        weight,
        RowSelection(jnp.asarray(rows, jnp.int32), side_size(weight.shape, axes, "in")),
        cut_as(shardings and shardings[1], lambda: jnp.zeros(shape, dtype)),
        jnp.ones((), common_dtype(dtype, jnp.float32)),
        axes,
        frozen=("lora_A",),
    )


def check_rows(path: str, weight: Any, axes: Axes, settings: Settings) -> None:
    """Raises unless the rows that the settings name are those of a weight that can have them."""
    rows = settings.rows or ()
    if sorted(axes) != ["in", "out"]:
        raise ValueError(
            f"`rows` is given for '{path}' of shape {weight.shape} with the axes {axes}; expected "
            "a table of two axes, one of which is 'in': that of the rows."
        )
    size = side_size(weight.shape, axes, "in")
    beyond = [str(row) for row in rows if row >= size]
    if beyond:
        raise ValueError(
            f"`rows` names {listed(beyond)} for '{path}' of shape {weight.shape}, whose rows are "
            f"its axis {axes.index('in')}; expected numbers below {size}. Grow the table first: "
            f"jnp.concatenate([table, new_rows], axis={axes.index('in')})."
        )
    if is_adapter_node(weight) and not is_lora_weight(weight):
        raise ValueError(
            f"`rows` is given for '{path}', which is a {type(weight).__name__}; expected a weight, "
            "or one with a single adapter."
        )
    for name, is_set, instead in (
        ("dora", settings.dora, "dora=False"),
        ("layers", settings.layers is not None, "layers=None"),
        ("freeze", "lora_B" in settings.freeze, "freeze=()"),
    ):
        if is_set:
            raise ValueError(
                f"`{name}` is {getattr(settings, name)!r} for '{path}', of which single rows are "
                f"adapted: they have no such setting. Expected wrap(..., {{'{path}': "
                f"dict(rows=..., {instead})}})."
            )
