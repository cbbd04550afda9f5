"""Adapters made from a model that was fine-tuned in full."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_jax._dtypes import common_dtype
from lora_jax._keys import own_key
from lora_jax._nodes import NodeIndex
from lora_jax._partition import Partition, base_sharding, cut_as, factor_shardings, uncut
from lora_jax._paths import leaves_with_paths, listed
from lora_jax._shapes import factor_shapes, to_matrices
from lora_jax._targets import Targets
from lora_jax._values import as_array
from lora_jax._weight import FullWeight, LoRAWeight, is_adapter_node, is_lora_weight
from lora_jax._wrap import wrap
from lora_jax.arithmetic._svd import balanced_factors
from lora_jax.quantization._weight import is_quantized


def extract(
    params: Any,
    tuned: Any,
    targets: Targets,
    *,
    rank: int | None = None,
    energy: float | None = None,
    axes: Mapping[str, Sequence[str]] | None = None,
    dtype: Any = None,
    train: Targets | None = None,
) -> Any:
    r"""Returns `params` wrapped with the adapters of a given rank that best approximate `tuned`.

    With $W' - W = U \Sigma V^\top$, the factors are $A = U_r \Sigma_r^{1/2}$ and
    $B = \Sigma_r^{1/2} V_r^\top$, with a scale of 1. The share of the change's energy that they
    keep is $\sum_{i \le r} \sigma_i^2 / \sum_i \sigma_i^2$.

    Args:
      params: the params before fine-tuning.
      tuned: the params after fine-tuning, of the same structure and shapes.
      targets: which weights get adapters, in the forms of `wrap`; a mapping may override `dtype`,
        and `rank` where `energy` is not given.
      rank: the rank of every adapter; give either this or `energy`.
      energy: the share of each change's energy to keep, above 0 and at most 1; each weight gets the
        smallest rank that keeps it.
      axes: as for `wrap`.
      dtype: the factors' dtype; by default float32, or the weight's dtype where that is wider.
      train: which other leaves to keep in full, in the dtypes of `params`; they become
        `FullWeight` nodes.

    Returns:
      The wrapped tree; `merge` of it approximates `tuned`.

    Raises:
      ValueError: the trees differ in structure or shape; or a leaf changed that neither `targets`
        nor `train` selects, which would be lost; or not exactly one of `rank` and `energy` is
        given.

    Source: Eckart and Young, The approximation of one matrix by another of lower rank, 1936.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> params = {"kernel": jnp.ones((6, 4))}
      >>> tuned = {"kernel": params["kernel"].at[:, 1].set(3.0)}
      >>> wrapped = lora_jax.arithmetic.extract(params, tuned, "kernel", energy=0.99)
      >>> error = abs(lora_jax.merge(wrapped)["kernel"] - tuned["kernel"]).max()
      >>> wrapped["kernel"].rank, bool(error < 1e-5)
      (1, True)
    """
    if (rank is None) == (energy is None):
        raise ValueError(
            f"`rank` is {rank} and `energy` is {energy}; expected exactly one of them."
        )
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"`energy` is {energy}; expected a share above 0 and at most 1.")
    _check_overrides(targets, ("dtype",) if rank is None else ("rank", "dtype"))
    tuned_leaves = _matching_leaves(params, tuned)
    wrapped = wrap(
        params, targets, rank=1 if rank is None else rank, axes=axes, dtype=dtype, train=train
    )
    index = NodeIndex.of(wrapped)
    lost = [
        path
        for path, node in index.tree.items()
        if not is_adapter_node(node) and not _is_same(node, tuned_leaves[path])
    ]
    if lost:
        raise ValueError(
            f"`tuned` differs from `params` at {listed(lost)}, which neither `targets` nor `train` "
            f"selects; extract(..., train={lost[:5]}) keeps what was learned there."
        )

    def extracted(path: str, node: Any) -> Any:
        if is_lora_weight(node):
            return _extracted(path, node, jnp.asarray(as_array(tuned_leaves[path])), energy)
        return _trained_in_full(node, tuned_leaves[path])

    return index.mapped(extracted)


def _trained_in_full(node: FullWeight, tuned: Any) -> FullWeight:
    # A copy, so that a training step that donates it leaves `tuned` alone.
    value = cut_as(
        base_sharding(node.base), lambda tuned: jnp.array(tuned).astype(node.dtype), tuned
    )
    return dataclasses.replace(node, value=value)


def _extracted(path: str, node: LoRAWeight, tuned: Array, energy: float | None) -> LoRAWeight:
    wide = common_dtype(node.dtype, tuned.dtype, jnp.float32)

    def decomposition(base: Array, tuned: Array) -> tuple[Array, Array, Array]:
        change = to_matrices(tuned.astype(wide) - base.astype(wide), node.axes)
        U, S, Vt = jnp.linalg.svd(change, full_matrices=False)
        return U, S, Vt

    partition = Partition.of(node.base)
    # The decomposition needs the whole matrix anyway.
    whole = None if partition is None else uncut(partition.mesh)
    U, S, Vt = cut_as(whole, decomposition, as_array(node.base), tuned)
    rank = node.rank if energy is None else _rank_of_energy(S, energy)
    key = own_key(jax.random.key(0), path)

    def factors(U: Array, S: Array, Vt: Array) -> tuple[Array, Array]:
        lora_A, lora_B = balanced_factors(U[..., :rank], S[:, :rank], Vt[:, :rank], key)
        A_shape, B_shape = factor_shapes(node.shape, node.axes, rank)
        return (
            lora_A.reshape(A_shape).astype(node.lora_A.dtype),
            lora_B.reshape(B_shape).astype(node.lora_B.dtype),
        )

    lora_A, lora_B = cut_as(factor_shardings(node.base, node.axes, None, rank), factors, U, S, Vt)
    return dataclasses.replace(node, lora_A=lora_A, lora_B=lora_B, scale=jnp.ones_like(node.scale))


def _check_overrides(targets: Targets, allowed: Sequence[str]) -> None:
    for expression, overrides in targets.items() if isinstance(targets, Mapping) else ():
        others = [name for name in overrides if name not in allowed]
        if others:
            raise ValueError(
                f"`targets` overrides {listed(others)} for '{expression}'; expected nothing but "
                f"{listed(allowed)} here."
            )


def _rank_of_energy(singular_values: Array, energy: float) -> int:
    """Returns the smallest rank that keeps this share in every matrix."""
    energies = np.asarray(singular_values, np.float64) ** 2
    kept = np.cumsum(energies, axis=-1)
    # Relative to the last sum, so that a share of 1 is reached in spite of rounding.
    wanted = energy * kept[:, -1:]
    return int(np.max(np.sum(kept < wanted, axis=-1))) + 1


def _matching_leaves(params: Any, tuned: Any) -> dict[str, Any]:
    # A quantised weight is a leaf here: what was trained beside it may be merged into an array.
    structure: Any = jax.tree.structure(params, is_leaf=is_quantized)
    tuned_structure: Any = jax.tree.structure(tuned, is_leaf=is_quantized)
    if structure != tuned_structure:
        raise ValueError(
            "`tuned` has a different structure from `params`; expected params of the same model.\n"
            f"`params`: {structure}\n`tuned`: {tuned_structure}"
        )
    before, after = dict(leaves_with_paths(params)), dict(leaves_with_paths(tuned))
    for path, leaf in before.items():
        if _shape(leaf) != _shape(after[path]):
            raise ValueError(
                f"`tuned` has the shape {_shape(after[path])} at '{path}', and `params` "
                f"{_shape(leaf)}; expected params of the same model."
            )
    return after


def _shape(leaf: Any) -> tuple[int, ...]:
    return tuple(leaf.shape) if hasattr(leaf, "shape") else np.shape(leaf)


def _is_same(leaf: Any, other: Any) -> bool:
    if is_quantized(leaf) or is_quantized(other):
        structures: list[Any] = [jax.tree.structure(each) for each in (leaf, other)]
        pairs = zip(jax.tree.leaves(leaf), jax.tree.leaves(other), strict=False)
        return structures[0] == structures[1] and all(_is_same(*pair) for pair in pairs)
    if not hasattr(leaf, "dtype"):
        return leaf is other or bool(leaf == other)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf, other = jax.random.key_data(leaf), jax.random.key_data(other)
    return leaf is other or np.array_equal(np.asarray(leaf), np.asarray(other))
