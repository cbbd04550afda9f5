"""Putting adapters beside the weights of a parameter tree, and taking them out again."""

import functools
import math
import operator
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from lora_jax._axes import InferredAxes
from lora_jax._dtypes import common_dtype
from lora_jax._paths import (
    compile_expression,
    leaves_with_paths,
    listed,
    map_with_paths,
    nearest_paths,
)
from lora_jax._targets import Overrides, Selection, Targets, select
from lora_jax._weight import (
    Axes,
    FullWeight,
    LoRAWeight,
    dense,
    factor_shapes,
    from_matrices,
    is_adapter_node,
    is_lora_weight,
    map_adapter_nodes,
    side_size,
    to_matrices,
)
from lora_jax.init import Initializer, initializer

_ROLES = ("in", "out", "batch")
_SETTINGS = ("rank", "alpha", "init", "dtype")


def wrap(
    params: Any,
    targets: Targets,
    *,
    rank: int = 8,
    alpha: float | None = None,
    key: PRNGKeyArray | None = None,
    axes: Mapping[str, Sequence[str]] | None = None,
    init: str | Initializer = "kaiming",
    dtype: Any = None,
    train: Targets | None = None,
) -> Any:
    r"""Returns `params` with a `LoRAWeight` in place of each target leaf.

    The model then computes with $W + \frac{\alpha}{r} A B$ wherever it uses that leaf; call it
    through `adapt`.

    Args:
      params: any parameter pytree.
      targets: what to adapt: a regular expression that matches whole path segments anywhere in a
        path (`"query"` matches `layer_0/query/kernel`), a sequence of them, a function
        `(path, leaf) -> bool`, or a mapping from expression to overrides of `rank`, `alpha`, `init`
        and `dtype` (`{"query": dict(rank=16)}`). A matched module means its weights of two or more
        axes, not its biases. `"all-linear"`, with `axes=infer_axes(...)`, means every weight of a
        product or convolution but the output head's; where a weight's smaller side is below
        `rank`, its rank is that side.
      rank: r, at least 1 and at most the weight's smaller side.
      alpha: $\alpha$, with scale = $\alpha / r$; r unless given.
      key: a random key; each weight draws from its own, derived from `key` and its path, so that
        another target does not change the others. `jax.random.key(0)` unless given.
      axes: for weights of more than two axes, and where two axes are not (in, out): a mapping from
        path or expression to each axis's role, `"in"`, `"out"` or `"batch"`; or what `infer_axes`
        returned, with which a matched module means the weights that the function uses as such.
      init: a name or a function `(key, weight2d, rank, scale) -> (base, lora_A, lora_B)`.
      dtype: the factors' dtype; float32 unless given, or the weight's where that is wider.
      train: what to train in full beside the adapters, in the forms of `targets`.

    Returns:
      A tree of the same structure with `LoRAWeight` nodes for targets and `FullWeight` nodes for
      what `train` selects.

    Raises:
      ValueError: an argument or an override does not fit; the message names it and the leaf.
      TypeError: an argument has the wrong type.

    Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
      >>> wrapped = lora_jax.wrap(params, "dense", rank=2)
      >>> wrapped["dense"]["kernel"].lora_A.shape
      (4, 2)
    """
    check_not_wrapped(params)
    defaults: Overrides = {"rank": rank, "alpha": alpha, "init": init, "dtype": dtype}
    for name, value in defaults.items():
        _CHECKS[name](f"`{name}`", value)
    _check_axes(axes, params)
    key = jax.random.key(0) if key is None else _checked_key(key)
    inferred = axes if isinstance(axes, InferredAxes) else None
    selected = select(
        params,
        targets,
        adaptable=lambda path, leaf: _is_adaptable(path, leaf, inferred),
        inferred=inferred,
        expected="a weight of two or more axes"
        + ("" if inferred is None else " that the function uses as one"),
    )
    trained = _trained_paths(params, train, selected)

    def node(path: str, leaf: Any) -> Any:
        if path in trained:
            # A copy: one buffer can't be donated as two arguments of a training step.
            return FullWeight(base=leaf, value=jnp.copy(leaf))
        if path in selected:
            settings = {**defaults, **_checked_overrides(path, selected[path].overrides)}
            leaf_axes = _axes_of(path, leaf, axes)
            rank = _fitting_rank(path, leaf, leaf_axes, settings["rank"], selected[path])
            return _lora_weight(path, leaf, leaf_axes, {**settings, "rank": rank}, key)
        return leaf

    return map_with_paths(node, params)


def merge(wrapped: Any) -> Any:
    r"""Returns plain params with $W + s \cdot A B$ in place of each adapted weight.

    The sum is taken in the wider of the weight's and the factors' dtypes and cast once, so that
    structure, shapes and dtypes are those of the tree that was wrapped.

    Args:
      wrapped: what `wrap` returned, trained or not.

    Returns:
      Plain params, the original structure.

    Source: Hu et al. 2021, section 4.1, "No additional inference latency".

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> wrapped = lora_jax.wrap({"kernel": jnp.ones((4, 3))}, "kernel", rank=2)
      >>> lora_jax.merge(wrapped)["kernel"].shape
      (4, 3)
    """
    return map_adapter_nodes(
        lambda node: dense(node) if is_lora_weight(node) else node.value, wrapped
    )


def unwrap(wrapped: Any) -> Any:
    """Returns plain params with the adapters dropped: bit-identical to what was wrapped.

    Args:
      wrapped: what `wrap` returned, trained or not.

    Returns:
      The params that `wrap` was given.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> lora_jax.unwrap(lora_jax.wrap(params, "kernel", rank=2))["kernel"] is params["kernel"]
      True
    """
    return map_adapter_nodes(lambda node: node.base, wrapped)


def _lora_weight(
    path: str, leaf: Array, axes: Axes, settings: Overrides, key: PRNGKeyArray
) -> LoRAWeight:
    rank = settings["rank"]
    scale = (rank if settings["alpha"] is None else float(settings["alpha"])) / rank
    dtype = settings["dtype"] or common_dtype(leaf.dtype, jnp.float32)
    path_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    base, lora_A, lora_B = _initial_matrices(
        initializer(settings["init"]), axes, rank, scale, jnp.dtype(dtype), path_key, leaf
    )
    _check_factors(path, leaf, axes, rank, lora_A, lora_B)
    A_shape, B_shape = factor_shapes(leaf.shape, axes, rank)
    return LoRAWeight(
        base=leaf if base is None else base,
        lora_A=lora_A.reshape(A_shape),
        lora_B=lora_B.reshape(B_shape),
        scale=jnp.asarray(scale, common_dtype(dtype, jnp.float32)),
        axes=axes,
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _initial_matrices(
    init: Initializer,
    axes: Axes,
    rank: int,
    scale: float,
    dtype: Any,
    key: PRNGKeyArray,
    weight: Array,
) -> tuple[Array | None, Array, Array]:
    """Returns the base, or None where the initialiser leaves it, and the factors as matrices."""

    def of_matrix(key: PRNGKeyArray, weight2d: Array) -> tuple[Array | None, Array, Array]:
        base, lora_A, lora_B = init(key, weight2d, rank, scale)
        return None if base is weight2d else base, lora_A.astype(dtype), lora_B.astype(dtype)

    matrices = to_matrices(weight, axes)
    keys = jax.random.split(key, matrices.shape[0])
    base, lora_A, lora_B = jax.vmap(of_matrix)(keys, matrices)
    if base is not None:
        base = from_matrices(base, weight.shape, axes).astype(weight.dtype)
    return base, lora_A, lora_B


def _check_factors(
    path: str, leaf: Array, axes: Axes, rank: int, lora_A: Array, lora_B: Array
) -> None:
    inputs, outputs = (side_size(leaf.shape, axes, role) for role in ("in", "out"))
    if (lora_A.shape[1:], lora_B.shape[1:]) != ((inputs, rank), (rank, outputs)):
        raise ValueError(
            f"`init` returned lora_A of shape {lora_A.shape[1:]} and lora_B of shape "
            f"{lora_B.shape[1:]} for '{path}'; expected {(inputs, rank)} and {(rank, outputs)}."
        )


def _trained_paths(params: Any, train: Targets | None, selected: Mapping[str, Any]) -> set[str]:
    if train is None:
        return set()
    trained = select(
        params,
        train,
        adaptable=lambda path, leaf: _is_floating(leaf) and path not in selected,
        argument="train",
        expected="a floating-point array that `targets` does not select",
        biases=True,
    )
    for path, selection in trained.items():
        if selection.overrides:
            raise ValueError(
                f"`train` overrides {listed(list(selection.overrides))} for '{path}'; what is "
                "trained in full has no settings."
            )
    return set(trained)


def _axes_of(path: str, leaf: Array, axes: Mapping[str, Sequence[str]] | None) -> Axes:
    if isinstance(axes, InferredAxes) and path not in axes:
        raise ValueError(
            f"`axes` has none for '{path}' of shape {leaf.shape}: {axes.reason_against(path)}. "
            "Leave it out of `targets`, or give its axes by hand."
        )
    roles = _given_roles(path, axes or {})
    if roles is None:
        if leaf.ndim == 2:
            return ("in", "out")
        raise ValueError(
            f"`axes` is needed for '{path}' of shape {leaf.shape}: which of its {leaf.ndim} axes "
            "are inputs and which are outputs? Say so with wrap(..., axes={'" + path + "': "
            f"{('in',) * (leaf.ndim - 1) + ('out',)}}}) or whichever holds."
        )
    if len(roles) != leaf.ndim or not set(roles) <= set(_ROLES):
        raise ValueError(
            f"`axes` gives {tuple(roles)} for '{path}' of shape {leaf.shape}; expected one of "
            f"'in', 'out' or 'batch' for each of its {leaf.ndim} axes."
        )
    if "in" not in roles or "out" not in roles:
        raise ValueError(
            f"`axes` gives {tuple(roles)} for '{path}'; expected at least one 'in' and one 'out'."
        )
    return cast(Axes, tuple(roles))


def _given_roles(path: str, axes: Mapping[str, Sequence[str]]) -> Sequence[str] | None:
    if path in axes:
        return axes[path]
    for expression, roles in axes.items():
        if compile_expression(expression, "axes").search(path):
            return roles
    return None


def _is_floating(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _is_adaptable(path: str, leaf: Any, inferred: InferredAxes | None) -> bool:
    if not _is_floating(leaf) or leaf.ndim < 2:
        return False
    # A weight whose uses disagree is no bystander: passing it over would hide the disagreement.
    return inferred is None or path in inferred or path in inferred.disagreements


def check_not_wrapped(params: Any) -> None:
    """Raises if `params` holds a node that `wrap` made."""
    wrapped = [
        path
        for path, node in leaves_with_paths(params, is_leaf=is_adapter_node)
        if is_adapter_node(node)
    ]
    if wrapped:
        raise ValueError(
            f"`params` is wrapped already at {listed(wrapped)}; wrap(unwrap(params), ...) starts "
            "anew, wrap(merge(params), ...) adapts the merged weights."
        )


def _checked_overrides(path: str, overrides: Overrides) -> Overrides:
    for name, value in overrides.items():
        if name not in _CHECKS:
            raise ValueError(
                f"`targets` overrides {name!r} for '{path}'; expected one of {listed(_SETTINGS)}."
            )
        _CHECKS[name](f"`{name}` of '{path}'", value)
    return overrides


def _check_rank(subject: str, rank: Any) -> None:
    if isinstance(rank, bool) or not hasattr(rank, "__index__"):
        raise TypeError(f"{subject} is {rank!r}; expected a whole number of at least 1.")
    if operator.index(rank) < 1:
        raise ValueError(f"{subject} is {rank}; expected a whole number of at least 1.")


def _fitting_rank(path: str, leaf: Array, axes: Axes, rank: Any, selection: Selection) -> int:
    """Returns the rank as an int that is at most the weight's smaller side."""
    rank = operator.index(rank)
    largest = min(side_size(leaf.shape, axes, role) for role in ("in", "out"))
    if rank > largest and not selection.rank_may_shrink:
        raise ValueError(
            f"`rank` is {rank} for '{path}' of shape {leaf.shape} with the axes {axes}; expected "
            f"at most {largest}, its smaller side. A mapping gives this target a rank of its own: "
            f"wrap(..., {{'{path}': dict(rank={largest})}})."
        )
    return min(rank, largest)


def _check_alpha(subject: str, alpha: Any) -> None:
    if alpha is None:
        return
    if isinstance(alpha, bool | str) or not hasattr(alpha, "__float__") or np.ndim(alpha) != 0:
        raise TypeError(f"{subject} is {alpha!r}; expected a number.")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"{subject} is {alpha}; expected a positive, finite number.")


def _check_init(subject: str, init: Any) -> None:
    del subject
    initializer(init)


def _check_dtype(subject: str, dtype: Any) -> None:
    try:
        is_floating = dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        is_floating = False
    if not is_floating:
        raise TypeError(f"{subject} is {dtype!r}; expected a floating-point dtype or None.")


def _checked_key(key: Any) -> PRNGKeyArray:
    is_key = hasattr(key, "dtype") and (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.dtype == jnp.uint32
    )
    if not is_key:
        raise TypeError(f"`key` is {key!r}; expected a random key, such as jax.random.key(0).")
    return key


def _check_axes(axes: Any, params: Any) -> None:
    if axes is None or isinstance(axes, InferredAxes):
        return
    if not isinstance(axes, Mapping):
        raise TypeError(
            f"`axes` is {axes!r}; expected a mapping from path or expression to the role of each "
            "axis, such as {'query/kernel': ('in', 'out', 'out')}, or what infer_axes returned."
        )
    paths = [path for path, _ in leaves_with_paths(params)]
    for expression in axes:
        pattern = compile_expression(expression, "axes")
        if expression not in paths and not any(pattern.search(path) for path in paths):
            raise ValueError(
                f"`axes` has {expression!r}, which matches no leaf; the nearest paths are "
                f"{listed(nearest_paths(expression, paths))}."
            )


_CHECKS = {
    "rank": _check_rank,
    "alpha": _check_alpha,
    "init": _check_init,
    "dtype": _check_dtype,
}
