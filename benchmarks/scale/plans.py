"""A plan: one training step of one model on one machine, compiled, and what it needs."""

import dataclasses
import functools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from benchmarks.llama_layers import TARGETS, Sizes
from benchmarks.machines import CPU, MACHINES, devices_of
from benchmarks.scale import llama
from benchmarks.scale.collectives import Traffic, collectives
from benchmarks.scale.flops import product_flops

LORA, NF4, FULL = KINDS = ("lora", "nf4", "full")
_ALL_LAYERS = dict.fromkeys(("layers/attention", "layers/mlp"), ("batch", "in", "out"))


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be compiled.

    Attributes:
      model: the name of the model.
      sizes: its sizes.
      kind: `"lora"` on a bfloat16 base, `"nf4"` on a quantised one, or `"full"` fine-tuning.
      machine: the name of the machine, or `"cpu"`.
      devices: how many.
      tensor: how many of them share one example.
      length: tokens of an example.
      examples: examples in each group of devices that shares one.
      rank: the rank of the adapters.
      dtype: that of the base.
    """

    model: str
    sizes: Sizes
    kind: str
    machine: str
    devices: int
    tensor: int
    length: int = 4_096
    examples: int = 1
    rank: int = 16
    dtype: Any = jnp.bfloat16

    @property
    def batch(self) -> int:
        """The number of examples in a step."""
        return self.examples * self.devices // self.tensor


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a compiled step needs on each device, in bytes, and what it does.

    Attributes:
      base: frozen weights.
      trained: what trains: adapters, or all weights.
      optimizer: the state of the optimiser.
      activations: the inputs of the layers, which the backward pass starts from.
      temporaries: all other temporary memory.
      flops_per_token: operations of all products, rematerialised ones included.
      traffic: what each kind of collective moves.
      compile_seconds: how long tracing and compiling took.
      optimal_seconds: the compiler's own estimate where it has one; a loop's body counts once.
    """

    base: int
    trained: int
    optimizer: int
    activations: int
    temporaries: int
    flops_per_token: float
    traffic: dict[str, Traffic]
    compile_seconds: float
    optimal_seconds: float | None

    @property
    def total(self) -> int:
        """All memory of a device."""
        kinds = (self.base, self.trained, self.optimizer, self.activations, self.temporaries)
        return sum(kinds)

    def fits(self, machine: str) -> bool | None:
        """Says whether it fits a device; None for virtual ones."""
        return None if machine == CPU else self.total <= MACHINES[machine].memory


def plan_of(task: Task) -> Plan:
    """Returns the plan of a task, having compiled its step.

    Raises:
      InputError: the compiler of the machine is missing.
    """
    mesh = mesh_of(task)
    with jax.set_mesh(mesh):
        step, arguments = program(task, mesh)
        start = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments)
        compiled = lowered.compile()
        seconds = time.perf_counter() - start
        flops = product_flops(step, *arguments)
    trained, state, frozen, _ = arguments
    memory: Any = compiled.memory_analysis()
    cost: Any = compiled.cost_analysis() or {}
    activations = _carried_bytes(task)
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Plan(
        base=device_bytes(frozen),
        trained=device_bytes(trained),
        optimizer=device_bytes(state),
        activations=activations,
        temporaries=memory.temp_size_in_bytes + max(new, 0) - activations,
        flops_per_token=flops / (task.batch * task.length),
        traffic=collectives(compiled.as_text() or ""),
        compile_seconds=seconds,
        optimal_seconds=cost.get("optimal_seconds"),
    )


def mesh_of(task: Task) -> Mesh:
    """Returns the mesh of a task: examples cut over groups of devices, weights over all."""
    devices = devices_of(task.machine, task.devices)
    shape = (1, task.devices // task.tensor, task.tensor)
    return Mesh(np.array(devices).reshape(shape), llama.AXES, axis_types=(AxisType.Auto,) * 3)


def program(task: Task, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    """Returns a step of Adam, and the shapes of what it takes with their shardings."""
    shapes = llama.shapes(task.sizes, task.dtype)
    sharded = lora_jax.sharding.of(shapes, mesh, rules=llama.RULES)
    params = lora_jax.sharding.abstract(shapes, sharded)
    optimizer = optax.adam(1e-4)
    batch = jax.ShapeDtypeStruct(
        (task.batch, task.length + 1),
        jnp.int32,
        sharding=NamedSharding(mesh, P(llama.BATCH)),
    )
    loss = functools.partial(llama.loss, task.sizes)
    if task.kind == FULL:
        trained, frozen = params, {}

        def applied(trained: Any, frozen: Any, tokens: Any) -> Any:
            del frozen
            return loss(trained, tokens)
    else:
        if task.kind == NF4:
            params = lora_jax.quantize(params, TARGETS, axes=_ALL_LAYERS)
        wrapped = lora_jax.wrap(params, TARGETS, rank=task.rank, axes=_ALL_LAYERS)
        trained, frozen = lora_jax.split(wrapped)
        adapted = lora_jax.adapt(loss)

        def applied(trained: Any, frozen: Any, tokens: Any) -> Any:
            return adapted(lora_jax.combine(trained, frozen), tokens)

    state = lora_jax.sharding.abstract(
        jax.eval_shape(optimizer.init, trained),
        lora_jax.sharding.of_state(optimizer, trained),
    )

    def step(trained: Any, state: Any, frozen: Any, tokens: Any) -> Any:
        value, gradients = jax.value_and_grad(applied)(trained, frozen, tokens)
        updates, state = optimizer.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state, value

    return step, (trained, state, frozen, batch)


def device_bytes(tree: Any) -> int:
    """Returns the bytes that one device holds of a tree."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _carried_bytes(task: Task) -> int:
    """Returns the bytes of the inputs of all layers on one device."""
    rows = task.examples * task.length // task.tensor
    return task.sizes.layers * rows * task.sizes.embed * jnp.dtype(task.dtype).itemsize
