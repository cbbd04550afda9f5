"""Blending several adapters into one."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, Real

from lora_jax._dtypes import common_dtype
from lora_jax._keys import own_key
from lora_jax._originals import on_original
from lora_jax._paths import listed
from lora_jax._settings import check_rank_fits, checked_rank
from lora_jax._shapes import factor_shapes, largest_rank, layers_shape, side_size
from lora_jax._weight import LoRAWeight
from lora_jax.arithmetic._alike import (
    check_no_magnitude,
    checked_adapters,
    checked_weights,
    common_layers,
    map_together,
    spread,
    with_rank,
)
from lora_jax.arithmetic._recipes import RECIPES, MajoritySign
from lora_jax.arithmetic._svd import truncated

Method = Literal[
    "cat",
    "svd",
    "linear",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]


def blend(
    adapters: Sequence[Any],
    weights: Sequence[float | Array] | Real[Array, " adapter"] | np.ndarray,
    method: Method = "cat",
    *,
    rank: int | None = None,
    density: float | None = None,
    majority_sign: MajoritySign = "total",
    key: PRNGKeyArray | None = None,
) -> Any:
    r"""Returns one adapter that represents the weighted sum of several.

    With $\Delta_i = s_i A_i B_i$ and $c_i = w_i s_i$, where the scale $s_i$ is $\alpha / r$, or
    $\alpha / \sqrt r$ for rsLoRA, the methods are as follows. The result has a scale of 1.

    - `"cat"`: $[c_1 A_1, \dots]\,[B_1; \dots] = \sum_i w_i \Delta_i$, exactly; the ranks add.
    - `"svd"`: the best approximation of that sum of rank `rank`; $\Delta_i$ is never built.
    - `"linear"`: $(\sum_i a_i A_i)(\sum_i b_i B_i)$ with $b_i = \sqrt{|c_i|}$ and
      $a_i = \operatorname{sgn}(c_i)\, b_i$. It keeps the rank, and differs from the sum by the
      cross terms $\sum_{i \ne j} a_i b_j A_i B_j$.
    - `"magnitude_prune"`: `"linear"` on factors that keep only the share `density` of their largest
      entries.
    - `"ties"`: on factors pruned in this way, each entry is the mean of the $a_i A_i$ with the sign
      of their sum, and likewise for $b_i B_i$.
    - `"dare_linear"`, `"dare_ties"`: the same two, on factors whose entries are kept with the
      probability `density` and divided by it.
    - `"magnitude_prune_svd"`, `"ties_svd"`, `"dare_linear_svd"`, `"dare_ties_svd"`: as in the
      papers, on $\Delta_i$ with the weights $w_i$, followed by the best approximation of rank
      `rank`. These have no cross terms, and don't depend on how a change is factored.

    Compared with Hugging Face PEFT: `"cat"`, `"svd"`, `"linear"` and `"magnitude_prune"` are the
    same. For TIES, PEFT elects the signs before it applies weights and scales, so a subtracted
    adapter votes as if it were added, and an even vote gives +; here the weighted changes vote, and
    an even vote gives 0, as in the paper's formula. Under rsLoRA PEFT keeps $\alpha = r$ for the
    result, which adds a scale of $\sqrt r$; here the scale is 1. Of n entries round(density · n)
    are kept, and each matrix of a stack of layers is pruned separately.

    Args:
      adapters: wrapped trees of the same params with the same targets.
      weights: $w_i$, one number for each adapter (adapter,); negative ones subtract.
      method: one of the above.
      rank: the rank of the result, for `"svd"` and the methods that end with it; by default the
        largest rank of the adapters, weight by weight.
      density: the share of entries to keep, above 0 and at most 1, for the methods that prune.
      majority_sign: whether the sum (`"total"`) or the number of signs (`"frequency"`) elects, for
        TIES.
      key: a random key for DARE; `jax.random.key(0)` unless given.

    Returns:
      A wrapped tree with the same base.

    Raises:
      ValueError: the adapters differ in base, structure, targets or axes, an option does not belong
        to the method, the factors of `"linear"` and its like differ in rank, or an adapter has a
        magnitude (DoRA) or is of single rows.
      TypeError: `adapters` is not a list, or an option has the wrong type.

    Source: Yadav et al., TIES-Merging: Resolving Interference When Merging Models, 2023; Yu et al.,
    Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch,
    2023 (DARE); Eckart and Young, The approximation of one matrix by another of lower rank, 1936.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> params = {"kernel": jnp.ones((6, 5))}
      >>> adapters = [lora_jax.wrap(params, "kernel", rank=rank) for rank in (1, 2)]
      >>> lora_jax.arithmetic.blend(adapters, [0.7, 0.3])["kernel"].rank
      3
      >>> lora_jax.arithmetic.blend(adapters, [0.7, 0.3], "svd")["kernel"].rank
      2
    """
    _check_options(method, rank, density, majority_sign)
    indices = checked_adapters(adapters)
    for number, index in enumerate(indices):
        for path, node in index.weights.items():
            check_no_magnitude(f"`adapters[{number}]`", path, node)
    numbers = checked_weights(weights, len(indices))
    key = jax.random.key(0) if key is None else key

    def combined(path: str, nodes: list[LoRAWeight]) -> LoRAWeight:
        factors = _factors(nodes, numbers)
        if method == "cat":
            return factors.node(*factors.side_by_side())
        if method == "svd":
            return factors.approximated(_fitting_rank(path, factors, rank))
        merged = functools.partial(
            RECIPES[method.removesuffix("_svd")].merged,
            density=1.0 if density is None else float(density),
            majority_sign=majority_sign,
        )
        weight_key = own_key(key, path)
        if method.endswith("_svd"):
            change = merged(factors.changes(), factors.shares, key=weight_key)
            return factors.node(*_leading(change, _fitting_rank(path, factors, rank)))
        _check_equal_ranks(path, method, nodes)
        return factors.node(*factors.each_merged(merged, weight_key))

    return map_together(combined, indices)


@dataclasses.dataclass(frozen=True)
class _Factors:
    """The factors of several adapters of one weight, as stacks of matrices in a wide dtype.

    Attributes:
      like: a weight with the base, the layers and the dtypes of the result.
      lora_A: the lora_A of each adapter (matrix, in, r).
      lora_B: the lora_B of each adapter (matrix, r, out).
      shares: for each adapter its weight times its scale.
    """

    like: LoRAWeight
    lora_A: Sequence[Array]
    lora_B: Sequence[Array]
    shares: Array

    @property
    def largest_rank(self) -> int:
        """The largest of the adapters' ranks."""
        return max(lora_A.shape[-1] for lora_A in self.lora_A)

    def side_by_side(self) -> tuple[Array, Array]:
        """Returns the factors of the weighted sum."""
        pairs = zip(self.shares, self.lora_A, strict=True)
        lora_A = jnp.concatenate([share * lora_A for share, lora_A in pairs], axis=-1)
        return lora_A, jnp.concatenate(self.lora_B, axis=-2)

    def approximated(self, rank: int) -> LoRAWeight:
        """Returns the best approximation of the weighted sum."""
        return with_rank(self.node(*truncated(*self.side_by_side(), rank, jax.random.key(0))), rank)

    def changes(self) -> Array:
        """Returns each adapter's lora_A · lora_B, of shape (adapter, matrix, in, out)."""
        pairs = zip(self.lora_A, self.lora_B, strict=True)
        return jnp.stack([jnp.matmul(A, B, precision=jax.lax.Precision.HIGHEST) for A, B in pairs])

    def each_merged(self, merged: Callable[..., Array], key: PRNGKeyArray) -> tuple[Array, Array]:
        """Returns the factors, each merged separately with the roots of the shares."""
        roots = jnp.sqrt(jnp.abs(self.shares))
        A_key, B_key = jax.random.split(key)
        lora_A = merged(jnp.stack(self.lora_A), jnp.sign(self.shares) * roots, key=A_key)
        return lora_A, merged(jnp.stack(self.lora_B), roots, key=B_key)

    def node(self, lora_A: Array, lora_B: Array) -> LoRAWeight:
        """Returns the weight with these factors and a scale of 1."""
        like = self.like
        adapted = layers_shape(like.shape, like.axes, like.layers)
        A_shape, B_shape = factor_shapes(adapted, like.axes, lora_A.shape[-1])
        return dataclasses.replace(
            like,
            lora_A=lora_A.reshape(A_shape).astype(like.lora_A.dtype),
            lora_B=lora_B.reshape(B_shape).astype(like.lora_B.dtype),
            scale=jnp.ones_like(like.scale),
        )


def _factors(nodes: Sequence[LoRAWeight], weights: Array) -> _Factors:
    untouched = next((node for node in nodes if node.initial_A is None), nodes[0])
    base = on_original(untouched).base
    layers = common_layers(nodes)
    nodes = [spread(on_original(node), layers) for node in nodes]
    dtypes = {
        name: common_dtype(*(getattr(node, name).dtype for node in nodes))
        for name in ("lora_A", "lora_B", "scale")
    }
    wide = common_dtype(*dtypes.values(), jnp.float32)
    inputs, outputs = (side_size(base.shape, nodes[0].axes, role) for role in ("in", "out"))
    return _Factors(
        like=dataclasses.replace(
            nodes[0],
            **{name: getattr(nodes[0], name).astype(dtype) for name, dtype in dtypes.items()},
            base=base,
            frozen=(),
        ),
        lora_A=[node.lora_A.reshape(-1, inputs, node.rank).astype(wide) for node in nodes],
        lora_B=[node.lora_B.reshape(-1, node.rank, outputs).astype(wide) for node in nodes],
        shares=weights.astype(wide) * jnp.stack([node.scale.astype(wide) for node in nodes]),
    )


@functools.partial(jax.jit, static_argnames="rank")
def _leading(change: Array, rank: int) -> tuple[Array, Array]:
    """Returns the factors of the best approximation of matrices (matrix, in, out)."""
    U, S, Vt = jnp.linalg.svd(change, full_matrices=False)
    root = jnp.sqrt(S[:, :rank])
    return U[..., :rank] * root[:, None, :], root[..., None] * Vt[:, :rank]


def _fitting_rank(path: str, factors: _Factors, rank: int | None) -> int:
    like = factors.like
    if rank is None:
        return min(factors.largest_rank, largest_rank(like.shape, like.axes))
    check_rank_fits(rank, path, like.shape, like.axes)
    return rank


def _check_equal_ranks(path: str, method: str, nodes: Sequence[LoRAWeight]) -> None:
    ranks = [on_original(node).rank for node in nodes]
    if len(set(ranks)) > 1:
        raise ValueError(
            f"`method` is {method!r}, which merges factors entry by entry, and the adapters have "
            f"the ranks {ranks} at '{path}'; expected equal ones. blend(..., 'cat') and "
            "the methods with svd take any, and arithmetic.resize(wrapped, rank) "
            "changes them."
        )


def _check_options(method: Any, rank: Any, density: Any, majority_sign: Any) -> None:
    if method not in get_args(Method):
        raise ValueError(f"`method` is {method!r}; expected one of {listed(get_args(Method), 20)}.")
    if rank is not None:
        checked_rank("`rank`", rank)
        if not method.endswith("svd"):
            raise ValueError(
                f"`rank` is {rank}, but the method {method!r} takes no rank; expected "
                "'svd' or a method that ends with it, or arithmetic.resize(blended, rank)."
            )
    _check_density(method, density)
    if majority_sign not in get_args(MajoritySign):
        raise ValueError(
            f"`majority_sign` is {majority_sign!r}; expected one of "
            f"{listed(get_args(MajoritySign))}."
        )


def _check_density(method: str, density: Any) -> None:
    recipe = RECIPES.get(method.removesuffix("_svd"))
    if recipe is None or recipe.prunes is None:
        if density is not None:
            raise ValueError(f"`density` is {density}, but the method {method!r} prunes nothing.")
        return
    if density is None or not 0 < density <= 1:
        raise ValueError(
            f"`density` is {density}; the method {method!r} needs the share of entries to keep, "
            "above 0 and at most 1: blend(..., density=0.5)."
        )
