"""Training steps on quantised weights, and the memory that they need once compiled."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax
from benchmarks.machines import shapes_on
from benchmarks.models import Model, block_params, floats, scanned_transformer
from benchmarks.programs import (
    OPTIMIZER,
    SCALE,
    Program,
    adapted,
    base_function,
    label_shapes,
    training_step,
)
from lora_jax.quantization import QuantizedWeight

DENSE = "dense"
FORMATS = (DENSE, "nf4", "int8", "int4", "fp8_e4m3")


@dataclasses.dataclass(frozen=True)
class Memory:
    """The memory of a compiled program, in bytes.

    Attributes:
      arguments: what it takes.
      temporary: what it needs beside arguments and results.
    """

    arguments: int
    temporary: int

    @classmethod
    def of(cls, compiled: jax.stages.Compiled) -> "Memory":
        """Returns the memory of a compiled program, as XLA gives it."""
        found: Any = compiled.memory_analysis()
        return cls(found.argument_size_in_bytes, found.temp_size_in_bytes)


def transformer(*, layers: int, embed: int, heads: int, batch: int, tokens: int) -> Model:
    """Returns rematerialised blocks of these sizes in a scan, with a head."""
    return Model(
        name="scanned-transformer",
        description=f"{layers} rematerialised blocks in a scan, embed {embed}, {heads} heads, "
        f"batch {batch} of {tokens} tokens, rank 8",
        apply=scanned_transformer,
        params={
            "blocks": block_params(embed, heads, layers=(layers,)),
            "head": {"kernel": floats(embed, 10)},
        },
        inputs=floats(batch, tokens, embed),
        targets="blocks",
        rank=8,
    )


def in_dtype(model: Model, dtype: Any) -> Model:
    """Returns the model with parameters and inputs of this dtype."""

    def cast(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(leaf.shape, dtype if is_float else leaf.dtype)

    return dataclasses.replace(
        model, params=jax.tree.map(cast, model.params), inputs=cast(model.inputs)
    )


def wrapped_params(model: Model, name: str, params: Any = None) -> Any:
    """Returns parameters, quantised where the model is adapted, with adapters.

    Args:
      model: the model.
      name: a format, or `DENSE`.
      params: the parameters; the shapes of the model's unless given.
    """
    params = model.params if params is None else params
    axes = lora_jax.infer_axes(base_function(model), model.params, model.inputs)
    if name != DENSE:
        params = lora_jax.quantize(params, model.targets, format=name, axes=axes)
    alpha = SCALE * model.rank
    return lora_jax.wrap(params, model.targets, rank=model.rank, alpha=alpha, axes=axes)


def step_program(
    model: Model, wrapped: Any, *, forward: Callable[[Any, Any], Any] | None = None
) -> Program:
    """Returns a step of Adam on the adapters.

    Args:
      model: the model.
      wrapped: its parameters with adapters, or their shapes.
      forward: what takes wrapped parameters and a batch; by default the adapted model.
    """
    chosen = adapted(model) if forward is None else forward

    def apply(adapters: Any, frozen: Any, inputs: Any) -> Any:
        return chosen(lora_jax.combine(adapters, frozen), inputs)

    adapters, frozen = lora_jax.split(wrapped)
    state = jax.eval_shape(OPTIMIZER.init, adapters)
    arguments = (adapters, state, frozen, model.inputs, label_shapes(model))
    return Program(training_step(apply), arguments, donated=(0, 1))


def counted_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays of a tree."""
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def largest_matrix_bytes(wrapped: Any) -> int:
    """Returns the bytes of the largest quantised matrix once dequantised: one layer of a stack."""
    leaves = jax.tree.leaves(wrapped, is_leaf=_is_quantized)
    return max(
        math.prod(leaf.shape[leaf.batch_ndim :]) * jnp.dtype(leaf.dtype).itemsize
        for leaf in leaves
        if _is_quantized(leaf)
    )


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedWeight)


# --- accelerators that are not there -----------------------------------------------------------


def on_device(program: Program, device: Any) -> Program:
    """Returns a program whose arguments are on a device."""
    return dataclasses.replace(program, arguments=shapes_on(device, program.arguments))
