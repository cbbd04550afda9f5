"""The programs that are compared: the base model's own, and the LoRA step in three ways."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lora_jax
from benchmarks.models import Model
from benchmarks.operations import PLAIN, WrittenByHand, with_factors

SCALE = 2.0
OPTIMIZER = optax.adam(1e-3)

Forward = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Program:
    """A function to compile, the shapes of its arguments, and which of them it may overwrite."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: tuple[int, ...] = ()

    def lowered(self) -> jax.stages.Lowered:
        """Returns the function, traced and lowered."""
        return jax.jit(self.function, donate_argnums=self.donated).lower(*self.arguments)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a compiled program costs; the same at each compilation.

    Attributes:
      flops: floating-point operations.
      bytes: bytes that its operations read and write.
      temporary_bytes: the memory that it needs beside its arguments and results.
    """

    flops: float
    bytes: float
    temporary_bytes: int

    @classmethod
    def of(cls, compiled: jax.stages.Compiled) -> "Cost":
        """Returns the cost of a compiled program, as XLA gives it."""
        analysis: Any = compiled.cost_analysis()
        memory: Any = compiled.memory_analysis()
        return cls(analysis["flops"], analysis["bytes accessed"], memory.temp_size_in_bytes)


def program_text(compiled: jax.stages.Compiled) -> str:
    """Returns the compiled program without the source lines that it came from."""
    text = re.sub(r", metadata=\{[^}]*\}", "", compiled.as_text() or "")
    return re.sub(r"\n(FileNames|FunctionNames|FileLocations|StackFrames)\n(.+\n)*", "", text)


def programs(model: Model) -> Mapping[str, Callable[[], Program]]:
    """Returns a maker for each program; what it makes is new, so that nothing is traced already."""
    return {
        "base forward": functools.partial(base_forward, model),
        "base step": functools.partial(base_step, model),
        "by hand": lambda: lora_step(model, by_hand(model)),
        "adapt": lambda: lora_step(model, adapted(model)),
        "W + AB": lambda: lora_step(model, built(model)),
    }


def base_function(model: Model) -> Forward:
    """Returns the model as a function of its parameters and a batch."""

    def forward(params: Any, inputs: Any) -> Any:
        return model.apply(PLAIN, params, inputs)

    return forward


def by_hand(model: Model) -> Forward:
    """Returns the model with LoRA written into it, as a function of the wrapped parameters."""
    return lambda wrapped, x: model.apply(WrittenByHand(SCALE), with_factors(wrapped), x)


def adapted(model: Model) -> Forward:
    """Returns the adapted model."""
    return lora_jax.adapt(base_function(model), on_materialize="error")


def built(model: Model) -> Forward:
    """Returns the model on weights with their adapters folded in."""
    forward = base_function(model)
    return lambda wrapped, inputs: forward(lora_jax.merge(wrapped), inputs)


def base_forward(model: Model) -> Program:
    """Returns the base model's forward pass."""
    return Program(base_function(model), (model.params, model.inputs))


def merged_forward(model: Model) -> Program:
    """Returns the base model's forward pass on merged parameters."""
    merged = jax.eval_shape(lora_jax.merge, wrapped_params(model))
    return Program(base_function(model), (merged, model.inputs))


def base_step(model: Model) -> Program:
    """Returns a step in which all parameters train."""
    forward = base_function(model)
    step = training_step(lambda params, _, inputs: forward(params, inputs))
    return _step_program(model, step, model.params, None)


def lora_step(model: Model, forward: Forward, **options: Any) -> Program:
    """Returns a step in which the adapters train, by `forward`, which takes wrapped parameters."""

    def apply(adapters: Any, frozen: Any, inputs: Any) -> Any:
        return forward(lora_jax.combine(adapters, frozen), inputs)

    adapters, frozen = lora_jax.split(wrapped_params(model, **options))
    return _step_program(model, training_step(apply), adapters, frozen)


def training_step(apply: Callable[[Any, Any, Any], Any]) -> Callable[..., Any]:
    """Returns a step of Adam on what `apply` takes first."""

    def step(trained: Any, state: Any, frozen: Any, inputs: Any, labels: Any) -> Any:
        def loss(trained: Any) -> Any:
            return cross_entropy(apply(trained, frozen, inputs), labels)

        value, gradients = jax.value_and_grad(loss)(trained)
        updates, state = OPTIMIZER.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state, value

    return step


def cross_entropy(logits: Any, labels: Any) -> Any:
    """Returns the mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def wrapped_params(model: Model, **options: Any) -> Any:
    """Returns the shapes of the model's parameters with adapters at its targets.

    Args:
      model: the model.
      options: what `wrap` is told beside targets, rank, alpha and axes.
    """
    axes = lora_jax.infer_axes(base_function(model), model.params, model.inputs)
    return jax.eval_shape(
        lambda params: lora_jax.wrap(
            params, model.targets, rank=model.rank, alpha=SCALE * model.rank, axes=axes, **options
        ),
        model.params,
    )


def label_shapes(model: Model) -> jax.ShapeDtypeStruct:
    """Returns the shape of the labels: one for each place with logits."""
    logits = jax.eval_shape(base_function(model), model.params, model.inputs)
    return jax.ShapeDtypeStruct(logits.shape[:-1], jnp.int32)


def _step_program(model: Model, step: Callable[..., Any], trained: Any, frozen: Any) -> Program:
    state = jax.eval_shape(OPTIMIZER.init, trained)
    arguments = (trained, state, frozen, model.inputs, label_shapes(model))
    return Program(step, arguments, donated=(0, 1))
