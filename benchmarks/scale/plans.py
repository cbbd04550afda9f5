"""A plan: one training step of the study on language, compiled, and what it needs."""

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

import lora_jax
from benchmarks.machines import CPU, MACHINES, devices_of
from benchmarks.scale.collectives import Traffic, collectives
from benchmarks.scale.flops import product_flops
from benchmarks.scale.models import MODELS
from experiments.common.adamw import clipped_adamw, warmed_up
from experiments.llm.mesh import AXES, Devices
from experiments.llm.methods import ALL_LINEAR, Method
from experiments.llm.objectives import Answers
from experiments.llm.packing import Batch, Row, batch_of, stacked
from experiments.llm.step import training_step
from experiments.llm.task import quantized_as
from experiments.llm.texts import TokenizedExample
from experiments.models.llama import Llama, LlamaConfig
from experiments.models.shapes import ONE_TOKEN, param_shapes

LORA, NF4, FULL = KINDS = ("lora", "nf4", "full")
# How compilers say that a program has no room on a device.
_NO_ROOM = ("RESOURCE_EXHAUSTED", "Ran out of memory")


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be compiled.

    Attributes:
      model: the name of the model, one of `MODELS`.
      kind: `"lora"` on a bfloat16 base, `"nf4"` on a quantised one, or `"full"` fine-tuning.
      machine: the name of the machine, or `"cpu"`.
      devices: how many.
      tensor: how many of them share one example.
      length: tokens of an example.
      examples: examples in each group of devices that shares one.
      rank: the rank of the adapters.
      dtype: that of the base and of products.
    """

    model: str
    kind: str
    machine: str
    devices: int
    tensor: int
    length: int = 4_096
    examples: int = 1
    rank: int = 16
    dtype: str = "bfloat16"

    @property
    def config(self) -> LlamaConfig:
        """The settings of the model."""
        return MODELS[self.model]

    @property
    def batch(self) -> int:
        """The number of examples in a step."""
        return self.examples * self.devices // self.tensor


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a compiled step needs on each device, in bytes, and what it does.

    Attributes:
      base: what the step reads and does not change: frozen weights, and the batch.
      trained: what trains: adapters, or all weights.
      optimizer: the state of the optimiser.
      activations: the inputs of the layers, which the backward pass starts from.
      temporaries: all other temporary memory.
      flops_per_token: operations of all products, rematerialised ones included.
      traffic: what each kind of collective moves.
      compile_seconds: how long tracing and compiling took.
    """

    base: int
    trained: int
    optimizer: int
    activations: int
    temporaries: int
    flops_per_token: float
    traffic: dict[str, Traffic]
    compile_seconds: float

    @property
    def total(self) -> int:
        """All memory of a device."""
        kinds = (self.base, self.trained, self.optimizer, self.activations, self.temporaries)
        return sum(kinds)

    def fits(self, machine: str) -> bool | None:
        """Says whether it fits a device; None for virtual ones."""
        return None if machine == CPU else self.total <= MACHINES[machine].memory


def smallest_plan(task: Task) -> tuple[Task, Plan] | None:
    """Returns the plan for the smallest slice of the machine on which the step fits, if one does.

    Args:
      task: the task, whose number of devices does not matter; fewer devices than share an example
        elsewhere share it all.

    Raises:
      InputError: the compiler of the machine is missing.
    """
    machine = MACHINES[task.machine]
    for count in sorted(machine.topologies):
        sized = dataclasses.replace(task, devices=count, tensor=min(task.tensor, count))
        if count % sized.tensor or _held_bytes(sized) > machine.memory:
            continue
        try:
            plan = plan_of(sized)
        except jax.errors.JaxRuntimeError as error:
            if not any(said in str(error) for said in _NO_ROOM):
                raise
            continue
        if plan.fits(task.machine):
            return sized, plan
    return None


def plan_of(task: Task) -> Plan:
    """Returns the plan of a task, having compiled its step.

    Raises:
      InputError: the compiler of the machine is missing.
      jax.errors.JaxRuntimeError: the compiler finds no room for the step on a device.
    """
    devices = on_mesh(task)
    step, arguments = program(task, devices)
    with devices.in_use():
        start = time.perf_counter()
        # The study's own programs keep adapters and state, so that a step can be interrupted.
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
        seconds = time.perf_counter() - start
        flops = product_flops(step, *arguments)
    trained, state = map(device_bytes, arguments[:2])
    memory: Any = compiled.memory_analysis()
    activations = _carried_bytes(task)
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Plan(
        base=memory.argument_size_in_bytes - trained - state,
        trained=trained,
        optimizer=state,
        activations=activations,
        temporaries=memory.temp_size_in_bytes + max(new, 0) - activations,
        flops_per_token=flops / (task.batch * task.length),
        traffic=collectives(compiled.as_text() or ""),
        compile_seconds=seconds,
    )


def on_mesh(task: Task) -> Devices:
    """Returns the devices of a task: examples cut over groups of them, weights over all."""
    devices = devices_of(task.machine, task.devices)
    shape = (1, task.devices // task.tensor, task.tensor)
    return Devices(Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3))


def program(task: Task, devices: Devices) -> tuple[Any, tuple[Any, ...]]:
    """Returns the study's step, and the shapes of what it takes with their shardings."""
    shapes = devices.placed_shapes(param_shapes(Llama(task.config), ONE_TOKEN, dtype=task.dtype))
    method = Method(task.kind if task.kind == FULL else LORA, _rank(task))
    wrapped = method.wrapped(
        _in_format(task, shapes),
        task.config,
        targets=(ALL_LINEAR,),
        alpha=None,
        key=jax.random.key(0),
    )
    trained, frozen = lora_jax.split(wrapped)
    rates = warmed_up(method.learning_rate, warmup=0.1, steps=1_000)
    optimizer = clipped_adamw(rates, weight_decay=0.0)
    state = lora_jax.sharding.abstract(
        jax.eval_shape(optimizer.init, trained), lora_jax.sharding.of_state(optimizer, trained)
    )
    network = Llama(task.config, dtype=jnp.dtype(task.dtype), remat=True, cut=devices.hidden_cut)
    step = training_step(network.apply, optimizer, Answers())
    return step, (trained, state, frozen, _batch_shapes(task, devices))


def device_bytes(tree: Any) -> int:
    """Returns the bytes that one device holds of a tree."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _rank(task: Task) -> int | None:
    return None if task.kind == FULL else task.rank


def _in_format(task: Task, shapes: Any) -> Any:
    """Returns the shapes of the weights, quantised as the study quantises them."""
    convert = quantized_as(NF4 if task.kind == NF4 else "none", task.config, shapes)

    def converted(path: Any, leaf: Any) -> Any:
        return convert("/".join(key.key for key in path), leaf)

    return jax.tree_util.tree_map_with_path(converted, shapes)


def _batch_shapes(task: Task, devices: Devices) -> Batch:
    """Returns a batch of whole rows, each of which is one example that is learned but its start."""
    whole = TokenizedExample(np.zeros(task.length, np.int32), np.arange(task.length) > 0)
    batch = batch_of(
        [whole],
        [Row((0,))] * task.batch,
        length=task.length,
        room=task.examples * (task.length - 1),
        groups=devices.groups,
    )
    step = stacked([batch])
    sharding = devices.batch_sharding(step)
    return jax.tree.map(
        lambda each: jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=sharding), step
    )


def _held_bytes(task: Task) -> int:
    """Returns the bytes that a device surely holds of a step: less than that does not fit."""
    _, (trained, state, frozen, _) = program(task, on_mesh(task))
    read = 0 if task.kind == FULL else device_bytes(frozen)
    # Gradients are held all at once: they are clipped by their norm.
    return 2 * device_bytes(trained) + device_bytes(state) + read + _carried_bytes(task)


def _carried_bytes(task: Task) -> int:
    """Returns the bytes of the inputs of all layers on one device."""
    config = task.config
    rows = task.examples * task.length // task.tensor
    itemsize = jnp.dtype(task.dtype).itemsize
    return config.num_hidden_layers * rows * config.hidden_size * itemsize
