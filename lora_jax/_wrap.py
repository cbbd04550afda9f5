"""Adding adapters to the weights of a parameter tree, and removing them again."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, SupportsFloat, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from lora_jax._compat import is_tracer
from lora_jax._dtypes import common_dtype
from lora_jax._initial_factors import initial_factors
from lora_jax._node_shardings import node_shardings
from lora_jax._nodes import map_nodes
from lora_jax._norms import squared_norms
from lora_jax._originals import lora_weight, original
from lora_jax._partition import Partition, is_abstract, placed_shapes
from lora_jax._paths import listed, map_with_paths
from lora_jax._row_weight import check_rows, row_weight
from lora_jax._selection import (
    SelectedWeight,
    check_not_wrapped,
    selected_weights,
    trained_leaves,
)
from lora_jax._settings import Settings, check_rank_fits
from lora_jax._shapes import Axes, Layers, largest_rank
from lora_jax._targets import Targets
from lora_jax._weight import FullWeight, LoRAWeight, is_node
from lora_jax.init._registry import AnyInitializer
from lora_jax.quantization._programs import leaf_shardings
from lora_jax.quantization._weight import AnyWeight, is_quantized


def wrap(
    params: Any,
    targets: Targets,
    *,
    rank: SupportsIndex = 8,
    alpha: SupportsFloat | None = None,
    key: PRNGKeyArray | None = None,
    axes: Mapping[str, Sequence[str]] | None = None,
    init: str | AnyInitializer = "kaiming",
    rslora: bool = False,
    dora: bool = False,
    layers: Sequence[SupportsIndex] | np.ndarray | None = None,
    rows: Sequence[SupportsIndex] | np.ndarray | None = None,
    freeze: str | Sequence[str] = (),
    dtype: Any = None,
    exclude: Targets | None = None,
    train: Targets | None = None,
) -> Any:
    r"""Returns `params` with a `LoRAWeight` in place of each target leaf.

    The model then computes with $W + \frac{\alpha}{r} A B$ wherever it uses that leaf; call it
    through `adapt`.

    Args:
      params: any parameter pytree; its leaves may be `jax.ShapeDtypeStruct`, and so is then what is
        put beside them.
      targets: what to adapt: a regular expression that matches whole path segments anywhere in a
        path (`"query"` matches `layer_0/query/kernel`), a sequence of them, a function
        `(path, leaf) -> bool`, or a mapping from expression to overrides of any of the settings
        `rank`, `alpha`, `rslora`, `init`, `dora`, `layers`, `rows`, `freeze` and `dtype`
        (`{"query": dict(rank=16)}`). A matched module means its floating-point weights of
        two or more axes, not its biases; a bias is recognised by its name and by the weights beside
        it, or by `axes=infer_axes(...)`. `"all-linear"`, with `axes=infer_axes(...)`, means every
        weight of a product or convolution except the output head's; a weight whose smaller side is
        below `rank` gets that side as its rank.
      rank: r, at least 1 and at most the weight's smaller side.
      alpha: $\alpha$, with scale = $\alpha / r$; r by default.
      key: a random key, `jax.random.key(0)` by default. Each weight draws from a key of its own,
        derived from `key` and its path, so adding a target does not change the other weights.
      axes: for weights of more than two axes, and where two axes are not (in, out): a mapping from
        path or expression to each axis's role, `"in"`, `"out"` or `"batch"`; or what `infer_axes`
        returned; a matched module then means the weights that the function uses as weights.
      init: a name, a function `(key, weight2d, rank, scale) -> (base, lora_A, lora_B)`, or an
        initialiser that `lora_jax.init` made from data, such as `eva(moments)`.
      rslora: whether scale is $\alpha / \sqrt r$, which keeps the adapter's learning stable at high
        ranks.
      dora: whether each output feature also trains its magnitude, while the adapter turns its
        direction: $m \circ (W + s A B) / \lVert W + s A B \rVert$, with $m = \lVert W \rVert$ at
        the start.
      layers: which indices of a weight's first batch axis to adapt, such as `range(4, 8)` for
        layers 4 to 7 of a scan stack; all by default. No parameters are allocated for the other
        layers.
      rows: the numbers of single rows to train in place of low-rank factors, such as those of new
        tokens in an embedding table: `{"embed": dict(rows=[50257, 50258])}`. They are along the
        weight's one `"in"` axis, of two axes. `lora_A` is a `RowSelection` then, which is frozen,
        and `lora_B` the change of each row, zero at the start, with a scale of 1: `rank`, `alpha`,
        `rslora` and `init` have no effect. A call with `rows` alone also takes a wrapped tree, and
        puts them on top of the adapter that a weight may have.
      freeze: which of `"lora_A"`, `"lora_B"` and `"magnitude"` not to train; their gradients are
        not computed.
      dtype: the factors' dtype; by default float32, or the weight's dtype where that is wider.
      exclude: which of the selected weights not to adapt, in the forms of `targets`.
      train: what to train in full beside the adapters, in the forms of `targets`.

    Returns:
      A tree of the same structure with `LoRAWeight` nodes for the targets and `FullWeight` nodes
      for the leaves that `train` selects.

    Raises:
      ValueError: an argument or an override does not fit, a selected leaf may be a bias or a part
        of a quantised weight, or two leaves have the same path; the message names the argument and
        the leaf.
      TypeError: an argument has the wrong type.

    Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021; Kalajdzievski, A
    Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, 2023 (`rslora`); Liu et al., DoRA:
    Weight-Decomposed Low-Rank Adaptation, 2024 (`dora`).

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
      >>> wrapped = lora_jax.wrap(params, "dense", rank=2)
      >>> wrapped["dense"]["kernel"].lora_A.shape
      (4, 2)
    """
    defaults = Settings.checked(
        rank=rank,
        alpha=alpha,
        rslora=rslora,
        init=init,
        dora=dora,
        layers=layers,
        rows=rows,
        freeze=freeze,
        dtype=dtype,
    )
    # A tree of shapes is wrapped where no device can compute a key.
    if key is not None or not is_abstract(params):
        key = jax.random.key(0) if key is None else _checked_key(key)
    adapted = selected_weights(
        params, targets, exclude=exclude, axes=axes, may_be_wrapped=_may_add_rows(targets, rows)
    )
    settings = {
        path: defaults.overridden(path, weight.selection.overrides)
        for path, weight in adapted.items()
    }
    if train is not None or any(each.rows is None for each in settings.values()):
        check_not_wrapped(params)
    trained = trained_leaves(params, train, adapted)

    def node(path: str, leaf: Any) -> Any:
        if path in trained:
            return FullWeight(base=leaf, value=_trainable_copy(leaf))
        if path in adapted:
            weight, own = adapted[path], settings[path]
            if own.rows is None:
                own = dataclasses.replace(own, rank=_fitting_rank(path, weight, own.rank))
            else:
                check_rows(path, leaf, weight.axes, own)
            wrapped = _abstract_weight if is_abstract(leaf) else _wrapped_weight
            return wrapped(path, leaf, weight.axes, own, key)
        return leaf

    return map_with_paths(node, params, is_node)


def _may_add_rows(targets: Targets, rows: Any) -> bool:
    """Says whether single rows are adapted, which may be those of a weight with an adapter."""
    overrides = targets.values() if isinstance(targets, Mapping) else ()
    named = (each for each in overrides if isinstance(each, Mapping))
    return rows is not None or any("rows" in each for each in named)


def _trainable_copy(leaf: Any) -> Any:
    """Returns a copy, because a training step can't donate one buffer as two arguments.

    That of a weight in the host's memory is on its device, where a step changes it.
    """
    where = getattr(leaf, "sharding", None)
    if where is not None and where.memory_kind == "pinned_host":
        where = where.with_memory_kind("device")
        return placed_shapes(leaf, where) if is_abstract(leaf) else jax.device_put(leaf, where)
    return leaf if is_abstract(leaf) else jnp.copy(leaf)


def unwrap(wrapped: Any) -> Any:
    """Returns plain params without the adapters, bit-identical to those that were wrapped.

    Where an initialiser such as `pissa` moved a part of the weight into the factors, that part is
    added back, and the result equals the original to rounding.

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
    return map_nodes(original, wrapped)


def _wrapped_weight(
    path: str,
    leaf: Any,
    axes: Axes,
    settings: Settings,
    key: PRNGKeyArray | None,
) -> LoRAWeight:
    if settings.rows is not None:
        return row_weight(leaf, axes, settings.rows, settings.dtype)
    key = jax.random.key(0) if key is None else key
    layers = _fitting_layers(path, leaf, axes, settings.layers)
    dtype = jnp.dtype(settings.dtype or common_dtype(leaf.dtype, jnp.float32))
    wide = common_dtype(dtype, jnp.float32)
    initial = initial_factors(path, leaf, axes, layers, settings, dtype, key)
    frozen = tuple(dict.fromkeys((*initial.frozen, *settings.freeze)))
    _check_trains(path, frozen, initial.lora_B, dora=settings.dora)
    scale = jnp.asarray(settings.scale(settings.rank), wide)
    weight = lora_weight(
        leaf,
        initial.lora_A,
        initial.lora_B,
        scale,
        axes,
        initial_A=None if initial.moved is None else scale * initial.moved[0].astype(wide),
        initial_B=None if initial.moved is None else jnp.copy(initial.moved[1]),
        layers=layers,
        frozen=frozen,
        encoding=initial.encoding,
    )
    return _with_magnitude(weight, leaf, wide) if settings.dora else weight


def _abstract_weight(
    path: str,
    leaf: Any,
    axes: Axes,
    settings: Settings,
    key: PRNGKeyArray | None,
) -> LoRAWeight:
    """Returns the same as `_wrapped_weight` of a weight without numbers, cut as the weight is."""
    # Without its sharding: tracing would need the mesh as its context.
    shapes = jax.tree.map(lambda each: jax.ShapeDtypeStruct(each.shape, each.dtype), leaf)
    node = jax.eval_shape(lambda leaf: _wrapped_weight(path, leaf, axes, settings, key), shapes)
    if Partition.of(leaf) is None:
        return node
    is_encoded = is_quantized(node.base) and not is_quantized(leaf)
    cut = placed_shapes(node.base, leaf_shardings(leaf, node.base)) if is_encoded else leaf
    node = dataclasses.replace(node, base=cut)
    return placed_shapes(node, node_shardings(node))


def _with_magnitude(weight: LoRAWeight, leaf: AnyWeight, dtype: Any) -> LoRAWeight:
    """Returns a DoRA weight whose magnitudes are its initial norms."""
    norms = squared_norms(weight.base, weight.axes, weight.layers)
    is_kept = weight.initial_A is None and weight.encoding is None
    whole = norms if is_kept else squared_norms(leaf, weight.axes, weight.layers)
    return dataclasses.replace(weight, magnitude=jnp.sqrt(whole).astype(dtype), squared_norm=norms)


def _check_trains(path: str, frozen: tuple[str, ...], lora_B: Array, *, dora: bool) -> None:
    """Raises if the frozen leaves keep the others from ever training."""
    if "magnitude" in frozen and not dora:
        raise ValueError(
            f"`freeze` names the magnitude of '{path}', which only dora=True gives it."
        )
    if dora and "magnitude" not in frozen:
        return
    if {"lora_A", "lora_B"} <= set(frozen):
        raise ValueError(f"`freeze` leaves nothing of '{path}' to train: {listed(frozen)}.")
    if "lora_B" in frozen and not is_tracer(lora_B) and not np.any(np.asarray(lora_B)):
        raise ValueError(
            f"`freeze` keeps lora_B of '{path}' at zero, where lora_A has no gradient; freeze "
            "'lora_A', or choose an `init` whose lora_B is not zero, such as 'mica' or 'pissa'."
        )


def _fitting_layers(path: str, leaf: AnyWeight, axes: Axes, layers: Layers | None) -> Layers | None:
    """Returns the adapted indices of the first batch axis in order, or None for all of them."""
    if layers is None:
        return None
    if "batch" not in axes:
        raise ValueError(
            f"`layers` is {layers} for '{path}' of shape {leaf.shape}, whose axes are {axes}; "
            "expected a weight with a batch axis"
            + (f": wrap(..., axes={{'{path}': {('batch', *axes[1:])}}})." if leaf.ndim > 2 else ".")
        )
    count = leaf.shape[axes.index("batch")]
    if layers[-1] >= count:
        raise ValueError(
            f"`layers` is {layers} for '{path}' of shape {leaf.shape}; expected indices below "
            f"{count}, the size of its batch axis."
        )
    return None if len(layers) == count else layers


def _fitting_rank(path: str, weight: SelectedWeight, rank: int) -> int:
    """Returns the rank, capped at the weight's smaller side if no expression names the weight."""
    shape, axes = weight.leaf.shape, weight.axes
    if weight.selection.rank_may_shrink:
        return min(rank, largest_rank(shape, axes))
    remedy = (
        f" A mapping gives this target a rank of its own: wrap(..., {{{{'{path}': "
        "dict(rank={largest})}})."
    )
    check_rank_fits(rank, path, shape, axes, remedy=remedy)
    return rank


def _checked_key(key: Any) -> PRNGKeyArray:
    is_key = hasattr(key, "dtype") and (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.dtype == jnp.uint32
    )
    if not is_key:
        raise TypeError(f"`key` is {key!r}; expected a random key, such as jax.random.key(0).")
    return key
