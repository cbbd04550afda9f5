"""Growing and pruning the rank of adapters."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from lora_jax._dtypes import common_dtype
from lora_jax._keys import own_key
from lora_jax._nodes import NodeIndex, check_single
from lora_jax._originals import on_original, with_norms
from lora_jax._partition import cut_as, factor_shardings
from lora_jax._paths import compile_expression, listed, nearest_paths
from lora_jax._row_selection import selects_rows
from lora_jax._settings import check_rank_fits, checked_rank
from lora_jax._shapes import Axes, factor_shapes, layers_shape, side_size
from lora_jax._weight import LoRABank, LoRAWeight, has_factors, innermost_base, is_bank
from lora_jax.arithmetic._svd import new_columns, truncated


def resize(
    wrapped: Any,
    rank: SupportsIndex | Mapping[str, SupportsIndex],
    *,
    key: PRNGKeyArray | None = None,
) -> Any:
    r"""Returns the tree with adapters of another rank.

    A larger rank does not change the model's outputs: the new rows of lora_B are zero. The new
    columns of lora_A are drawn as for a new adapter, since zeros there would never train. A smaller
    rank keeps the best approximation of each weight's change, its truncated singular value
    decomposition: with $A = Q_A R_A$, $B^\top = Q_B R_B$ and
    $R_A R_B^\top = U \Sigma V^\top$, the new factors are $Q_A U_r \Sigma_r^{1/2}$ and
    $\Sigma_r^{1/2} V_r^\top Q_B^\top$; $A B$ is never built. If an initialiser moved a part of
    the weight into the factors, it is moved back first, as by `on_original_base`, so that only the
    change is truncated. Directions in which a weight has not changed are drawn anew. The scale does
    not change with the rank.

    Args:
      wrapped: what `wrap` returned, trained or not; or a bank of adapters, each of which is
        resized. A weight that is the base of another has the path of that one and `/base`.
      rank: the new rank, or a mapping from expression to rank, as in `targets`; adapters that no
        expression matches keep theirs. Adapters of single rows have no rank: one number means all
        the others.
      key: a random key for new columns; `jax.random.key(0)` unless given.

    Returns:
      The resized tree.

    Raises:
      ValueError: the rank does not fit a weight, an expression matches no adapter, or the new rows
        of a lora_B that is frozen would never train.
      TypeError: a rank is not a whole number.

    Source: Eckart and Young, The approximation of one matrix by another of lower rank, 1936.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> wrapped = lora_jax.wrap({"kernel": jnp.ones((6, 4))}, "kernel", rank=2)
      >>> lora_jax.arithmetic.resize(wrapped, 3)["kernel"].lora_A.shape
      (6, 3)
    """
    index = NodeIndex.of(wrapped)
    is_for_all = not isinstance(rank, Mapping)
    resizable = {
        path: node
        for path, node in index.levels.items()
        if has_factors(node) and not (is_for_all and selects_rows(node))
    }
    ranks = _ranks(resizable, rank)
    key = jax.random.key(0) if key is None else key

    def with_new_rank(path: str, node: Any) -> Any:
        if is_bank(node) and node.norm is not None and node.base is not index.nodes[path].base:
            node = with_norms(node)
        if path not in ranks or ranks[path] == node.rank:
            return node
        if not is_bank(node):
            check_single(path, node)
        # `wrap` and each earlier growth drew the present columns from other keys.
        weight_key = own_key(key, f"{path} beyond {node.rank}")
        resized = _resized_bank if is_bank(node) else _resized
        return resized(node, ranks[path], weight_key)

    return index.mapped_levels(with_new_rank)


def _resized(node: LoRAWeight, rank: int, key: PRNGKeyArray) -> LoRAWeight:
    node = node if rank > node.rank else on_original(node)
    factors = _of_rank(node, rank, key)
    lora_A, lora_B = cut_as(
        factor_shardings(innermost_base(node), node.axes, node.layers, rank),
        factors,
        node.lora_A,
        node.lora_B,
    )
    return dataclasses.replace(node, lora_A=lora_A, lora_B=lora_B)


def _resized_bank(bank: LoRABank, rank: int, key: PRNGKeyArray) -> LoRABank:
    factors = _of_rank(bank, rank, key)

    def of_slot(lora_A: Array, lora_B: Array, scale: Array) -> tuple[Array, Array]:
        new_A, new_B = factors(lora_A, lora_B)
        # An all-zero slot is empty, and stays empty.
        is_empty = (scale == 0) & ~jnp.any(lora_A) & ~jnp.any(lora_B)
        return jnp.where(is_empty, 0, new_A), new_B

    lora_A, lora_B = cut_as(
        factor_shardings(innermost_base(bank), bank.axes, bank.layers, rank, in_slots=True),
        jax.vmap(of_slot),
        bank.lora_A,
        bank.lora_B,
        bank.scale,
    )
    resized = dataclasses.replace(bank, lora_A=lora_A, lora_B=lora_B)
    return resized if rank > bank.rank or bank.norm is None else with_norms(resized)


def _of_rank(
    node: LoRAWeight | LoRABank, rank: int, key: PRNGKeyArray
) -> Callable[[Array, Array], tuple[Array, Array]]:
    """Returns a function from the factors of one adapter to those of another rank."""
    shape = layers_shape(node.shape, node.axes, node.layers)
    changed = _grown if rank > node.rank else _pruned
    return lambda lora_A, lora_B: changed(lora_A, lora_B, shape, node.axes, rank, key)


@functools.partial(jax.jit, static_argnames=("shape", "axes", "rank"))
def _pruned(
    lora_A: Array,
    lora_B: Array,
    shape: tuple[int, ...],
    axes: Axes,
    rank: int,
    key: PRNGKeyArray,
) -> tuple[Array, Array]:
    """Returns the factors of the best approximation of a weight's change at a lower rank."""
    inputs, outputs = (side_size(shape, axes, role) for role in ("in", "out"))
    present = lora_A.shape[-1]
    wide = common_dtype(lora_A.dtype, jnp.float32)
    new_A, new_B = truncated(
        lora_A.reshape(-1, inputs, present).astype(wide),
        lora_B.reshape(-1, present, outputs).astype(wide),
        rank,
        key,
    )
    A_shape, B_shape = factor_shapes(shape, axes, rank)
    return new_A.reshape(A_shape).astype(lora_A.dtype), new_B.reshape(B_shape).astype(lora_B.dtype)


@functools.partial(jax.jit, static_argnames=("shape", "axes", "rank"))
def _grown(
    lora_A: Array,
    lora_B: Array,
    shape: tuple[int, ...],
    axes: Axes,
    rank: int,
    key: PRNGKeyArray,
) -> tuple[Array, Array]:
    """Returns the factors with new columns of lora_A and as many rows of zeros of lora_B."""
    added = rank - lora_A.shape[-1]
    inputs, batch = side_size(shape, axes, "in"), side_size(shape, axes, "batch")
    columns = new_columns(key, batch, inputs, added, lora_A.dtype)
    A_shape, B_shape = factor_shapes(shape, axes, added)
    return (
        jnp.concatenate([lora_A, columns.reshape(A_shape)], axis=-1),
        jnp.concatenate([lora_B, jnp.zeros(B_shape, lora_B.dtype)], axis=axes.count("batch")),
    )


def _ranks(
    nodes: Mapping[str, LoRAWeight | LoRABank],
    rank: SupportsIndex | Mapping[str, SupportsIndex],
) -> dict[str, int]:
    """Returns the new rank of each adapter that gets one, by path."""
    if not nodes:
        raise ValueError("`wrapped` has no adapters; expected what wrap(params, targets) returned.")
    ranks: dict[str, int] = {}
    for expression, each in (rank if isinstance(rank, Mapping) else {".*": rank}).items():
        subject = f"`rank` of '{expression}'" if isinstance(rank, Mapping) else "`rank`"
        new_rank = checked_rank(subject, each)
        pattern = compile_expression(expression, "rank")
        matched = [path for path in nodes if pattern.search(path)]
        if not matched:
            raise ValueError(
                f"`rank` has {expression!r}, which matches no adapter; the nearest paths are "
                f"{listed(nearest_paths(expression, nodes))}."
            )
        for path in matched:
            ranks.setdefault(path, new_rank)
    for path, each in ranks.items():
        if selects_rows(nodes[path]):
            raise ValueError(
                f"`rank` is given for '{path}', of which single rows are adapted: they have no "
                "rank. A mapping leaves them out: arithmetic.resize(..., {'query': 4})."
            )
        remedy = (
            f" A mapping gives it a rank of its own: arithmetic.resize(..., {{{{'{path}': "
            "{largest}}})."
        )
        check_rank_fits(each, path, nodes[path].shape, nodes[path].axes, remedy=remedy)
        if each > nodes[path].rank and "lora_B" in nodes[path].frozen:
            raise ValueError(
                f"`rank` is {each} for '{path}', whose lora_B is frozen: new rows of it would stay "
                f"zero. Expected at most its rank, {nodes[path].rank}."
            )
    return ranks
