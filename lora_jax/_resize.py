"""Growing and pruning the rank of adapters."""

import dataclasses
import operator
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from lora_jax._algebra import on_original
from lora_jax._paths import (
    compile_expression,
    leaves_with_paths,
    listed,
    map_with_paths,
    nearest_paths,
)
from lora_jax._settings import check_rank
from lora_jax._shapes import factor_shapes, layers_shape, side_size
from lora_jax._weight import LoRAWeight, is_adapter_node, is_lora_weight
from lora_jax.init import kaiming


def resize(wrapped: Any, rank: int | Mapping[str, int], *, key: PRNGKeyArray | None = None) -> Any:
    r"""Returns the tree with adapters of another rank, and the same scale.

    A larger rank changes no number that the model computes: the new rows of lora_B are zero, and
    the new columns of lora_A are drawn as for a new adapter, without which they would never train.
    A smaller one keeps the best approximation of the change of each weight, which is its truncated
    singular value decomposition: with $A = Q_A R_A$, $B^\top = Q_B R_B$ and
    $R_A R_B^\top = U \Sigma V^\top$, the new factors are $Q_A U_r \Sigma_r^{1/2}$ and
    $\Sigma_r^{1/2} V_r^\top Q_B^\top$; $A B$ is never built. What an initialiser had moved from the
    weight into the factors is moved back before, so that the change alone is cut.

    Args:
      wrapped: what `wrap` returned, trained or not.
      rank: the new rank, or a mapping from expression to rank, as in `targets`; adapters that it
        does not match keep theirs.
      key: a random key for new columns; `jax.random.key(0)` unless given.

    Returns:
      The resized tree.

    Raises:
      ValueError: the rank does not fit a weight, or an expression matches no adapter.
      TypeError: a rank is not a whole number.

    Source: Eckart and Young, The approximation of one matrix by another of lower rank, 1936.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> wrapped = lora_jax.wrap({"kernel": jnp.ones((6, 4))}, "kernel", rank=2)
      >>> lora_jax.resize(wrapped, 3)["kernel"].lora_A.shape
      (6, 3)
    """
    ranks = _ranks(wrapped, rank)
    key = jax.random.key(0) if key is None else key

    def resized(path: str, node: Any) -> Any:
        if path not in ranks or ranks[path] == node.rank:
            return node
        if ranks[path] > node.rank:
            own_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
            return _grown(node, ranks[path], own_key)
        return _pruned(node, ranks[path])

    return map_with_paths(resized, wrapped, is_leaf=is_adapter_node)


def truncated(lora_A: Array, lora_B: Array, rank: int) -> tuple[Array, Array]:
    """Returns the factors of the best approximation of lora_A · lora_B of a lower rank.

    Args:
      lora_A: matrices (batch, in, r).
      lora_B: matrices (batch, r, out).
      rank: the new rank.
    """
    Q_A, R_A = jnp.linalg.qr(lora_A)
    Q_B, R_B = jnp.linalg.qr(lora_B.mT)
    highest = jax.lax.Precision.HIGHEST
    U, S, Vt = jnp.linalg.svd(jnp.matmul(R_A, R_B.mT, precision=highest), full_matrices=False)
    root = jnp.sqrt(S[:, :rank])
    new_A = jnp.matmul(Q_A, U[..., :rank] * root[:, None, :], precision=highest)
    new_B = jnp.matmul(root[..., None] * Vt[:, :rank], Q_B.mT, precision=highest)
    return new_A, new_B


def _pruned(node: LoRAWeight, rank: int) -> LoRAWeight:
    node = on_original(node)
    inputs, outputs = (side_size(node.shape, node.axes, role) for role in ("in", "out"))
    wide = jnp.promote_types(node.lora_A.dtype, jnp.float32)
    lora_A, lora_B = truncated(
        node.lora_A.reshape(-1, inputs, node.rank).astype(wide),
        node.lora_B.reshape(-1, node.rank, outputs).astype(wide),
        rank,
    )
    A_shape, B_shape = factor_shapes(
        layers_shape(node.shape, node.axes, node.layers), node.axes, rank
    )
    return dataclasses.replace(
        node,
        lora_A=lora_A.reshape(A_shape).astype(node.lora_A.dtype),
        lora_B=lora_B.reshape(B_shape).astype(node.lora_B.dtype),
    )


def _grown(node: LoRAWeight, rank: int, key: PRNGKeyArray) -> LoRAWeight:
    added = rank - node.rank
    inputs, outputs = (side_size(node.shape, node.axes, role) for role in ("in", "out"))
    adapted = layers_shape(node.shape, node.axes, node.layers)
    keys = jax.random.split(key, side_size(adapted, node.axes, "batch"))
    like = jnp.zeros((inputs, outputs), node.lora_A.dtype)
    columns = jax.vmap(lambda key: kaiming(key, like, added, 1.0)[1])(keys)
    A_shape, B_shape = factor_shapes(adapted, node.axes, added)
    rank_axis = node.axes.count("batch")
    return dataclasses.replace(
        node,
        lora_A=jnp.concatenate(
            [node.lora_A, columns.reshape(A_shape).astype(node.lora_A.dtype)], axis=-1
        ),
        lora_B=jnp.concatenate([node.lora_B, jnp.zeros(B_shape, node.lora_B.dtype)], rank_axis),
    )


def _ranks(wrapped: Any, rank: int | Mapping[str, int]) -> dict[str, int]:
    """Returns the new rank of each adapter that gets one, by path."""
    nodes = {
        path: node
        for path, node in leaves_with_paths(wrapped, is_leaf=is_adapter_node)
        if is_lora_weight(node)
    }
    if not nodes:
        raise ValueError("`wrapped` has no adapters; expected what wrap(params, targets) returned.")
    ranks: dict[str, int] = {}
    for expression, each in (rank if isinstance(rank, Mapping) else {".*": rank}).items():
        check_rank(f"`rank` of '{expression}'" if isinstance(rank, Mapping) else "`rank`", each)
        pattern = compile_expression(expression, "rank")
        matched = [path for path in nodes if pattern.search(path)]
        if not matched:
            raise ValueError(
                f"`rank` has {expression!r}, which matches no adapter; the nearest paths are "
                f"{listed(nearest_paths(expression, nodes))}."
            )
        for path in matched:
            ranks.setdefault(path, operator.index(each))
    for path, each in ranks.items():
        _check_fits(path, nodes[path], each)
    return ranks


def _check_fits(path: str, node: LoRAWeight, rank: int) -> None:
    largest = min(side_size(node.shape, node.axes, role) for role in ("in", "out"))
    if rank > largest:
        raise ValueError(
            f"`rank` is {rank} for '{path}' of shape {node.shape}; expected at most {largest}, its "
            f"smaller side. A mapping gives it a rank of its own: resize(..., {{'{path}': "
            f"{largest}}})."
        )
