"""One call for a batch in which each example uses its own adapter."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_jax._compat import is_tracer
from lora_jax._nodes import NodeIndex
from lora_jax._weight import LoRABank, LoRAWeight
from lora_jax.serving._bank import bank_index, check_known
from lora_jax.serving._slots import slot_of
from lora_jax.transform._adapt import adapt_each
from lora_jax.transform._report import OnMaterialize

InAxes = int | None | Sequence[int | None]


def adapt(
    fn: Callable[..., Any],
    *,
    in_axes: InAxes = 0,
    out_axes: int = 0,
    on_materialize: OnMaterialize = "warn",
) -> Callable[..., Any]:
    r"""Returns `fn` as a function of a bank and of the id of each example's adapter.

    Example n uses $W + s_i A_i B_i$ with i = ids[n]. Products with $W$ are computed once for the
    whole batch; the factors are gathered by id and multiplied in small batched products. The
    compiled program depends on the sizes of the batch and of the bank, not on the ids.

    `fn` keeps its batch axis: it is called under `jax.vmap` with a batch of one example, and so
    must treat examples independently, as models do in inference.

    Args:
      fn: any JAX function `fn(params, *args, **kwargs)`.
      in_axes: the batch axis of each array in the arguments after `ids`: a number, None if all
        examples share it, or a sequence with one of these for each argument. Leaves that are not
        arrays, and keyword arguments, are shared.
      out_axes: the batch axis of each array that `fn` returns.
      on_materialize: as for `lora_jax.adapt`.

    Returns:
      A function `(bank, ids, *args, **kwargs)`, where `bank` is what `serving.bank` returned and
      `ids` holds an id for each example (batch,), with -1 for the base model. An unknown id is an
      error; where the ids are traced, under `jax.jit`, it gives the base model.

    Raises:
      ValueError: when called: an unknown id, an argument that does not fit `ids`, or an output
        without a batch axis; or, when differentiated with respect to `bank`, the bank caches
        DoRA norms, which `split` leaves out.
      TypeError: when called: `ids` are not whole numbers.

    Source: Chen et al., Punica: Multi-Tenant LoRA Serving, 2023.

    Examples:
      >>> import jax, jax.numpy as jnp, lora_jax
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> bank = lora_jax.serving.bank([lora_jax.wrap(params, "kernel", rank=2)])
      >>> serve = jax.jit(lora_jax.serving.adapt(lambda params, x: x @ params["kernel"]))
      >>> serve(bank, jnp.array([0, -1]), jnp.ones((2, 4))).tolist()
      [[4.0, 4.0, 4.0], [4.0, 4.0, 4.0]]
    """
    adapted = adapt_each(fn, on_materialize=on_materialize)

    def batched(bank: Any, ids: Any, *args: Any, **kwargs: Any) -> Any:
        index = bank_index(bank)
        ids = _checked_ids(index, ids)
        leaves, structure = jax.tree.flatten(args)
        axes = _leaf_axes(args, in_axes)
        _check_sizes(args, axes, ids.shape[0])
        mapped = {place: axis for place, axis in enumerate(axes) if axis is not None}

        def one(adapter_id: Array, *examples: Array) -> Any:
            single = list(leaves)
            for (place, axis), example in zip(mapped.items(), examples, strict=True):
                single[place] = jnp.expand_dims(example, axis)
            wrapped = index.mapped(lambda _, node: _served(node, adapter_id))
            outputs = adapted(wrapped, *jax.tree.unflatten(structure, single), **kwargs)
            return jax.tree.map(lambda output: _without_batch_axis(output, out_axes), outputs)

        over = jax.vmap(one, in_axes=(0, *mapped.values()), out_axes=out_axes)
        return over(ids, *(leaves[place] for place in mapped))

    return batched


def _served(bank: LoRABank, adapter_id: Array) -> LoRAWeight:
    """Returns an adapter of a weight; if its norm is cached, with factors that don't train."""
    weight = slot_of(bank, adapter_id)
    if bank.norm is None:
        return weight
    factors = {"lora_A": weight.lora_A, "lora_B": weight.lora_B, "scale": weight.scale}
    return dataclasses.replace(weight, **_fixed(factors))


@jax.custom_jvp
def _fixed(factors: dict[str, Any]) -> dict[str, Any]:
    return factors


@_fixed.defjvp
def _fixed_jvp(primals: Any, tangents: Any) -> Any:
    raise ValueError(
        "`bank` caches the norms of its adapters (DoRA), which a step would leave out of date; "
        "expected a derivative with respect to the half that trains: adapters, frozen = "
        "split(bank), which leaves the norms out, or with respect to a single adapter: "
        "serving.select(bank, id)."
    )


def _checked_ids(index: NodeIndex, ids: Any) -> Array:
    if not hasattr(ids, "dtype"):
        is_traced = any(map(is_tracer, jax.tree.leaves(ids)))
        ids = jnp.asarray(ids) if is_traced else np.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"`ids` has the dtype {ids.dtype}; expected whole numbers.")
    if ids.ndim != 1:
        raise ValueError(
            f"`ids` has the shape {ids.shape}; expected one id for each example (batch,). "
            "lora_jax.adapt(fn)(serving.select(bank, id), ...) "
            "gives all examples the same adapter."
        )
    if not is_tracer(ids):
        check_known(index, np.asarray(ids).tolist())
    return jnp.asarray(ids)


def _leaf_axes(args: Sequence[Any], in_axes: InAxes) -> list[int | None]:
    """Returns the batch axis of each leaf of the arguments, or None if it is shared."""
    if isinstance(in_axes, Sequence) and len(in_axes) != len(args):
        raise ValueError(
            f"`in_axes` has {len(in_axes)} entries, and {len(args)} arguments follow `ids`; "
            "expected one for each."
        )
    by_argument = in_axes if isinstance(in_axes, Sequence) else [in_axes] * len(args)
    return [
        axis if hasattr(leaf, "shape") else None
        for argument, axis in zip(args, by_argument, strict=True)
        for leaf in jax.tree.leaves(argument)
    ]


def _check_sizes(args: Sequence[Any], axes: Sequence[int | None], count: int) -> None:
    for (key_path, leaf), axis in zip(
        jax.tree_util.tree_leaves_with_path(tuple(args)), axes, strict=True
    ):
        if axis is None:
            continue
        if not -leaf.ndim <= axis < leaf.ndim or leaf.shape[axis] != count:
            raise ValueError(
                f"args{jax.tree_util.keystr(key_path)} after `ids` has the shape {leaf.shape}; "
                f"expected {count} examples, as many as `ids` has, on axis {axis}. `in_axes` says "
                "which axis it is, or None for what all examples share."
            )


def _without_batch_axis(output: Any, axis: int) -> Any:
    shape = jnp.shape(output)
    if not -len(shape) <= axis < len(shape) or shape[axis] != 1:
        raise ValueError(
            f"`fn` returned an array of shape {shape} for a batch of one example; expected the "
            f"batch on axis {axis}. `out_axes` says which axis it is."
        )
    return jnp.squeeze(output, axis)
