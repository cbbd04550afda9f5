"""Codes stay codes: whatever a model does with a stack, no float of its size is ever computed."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import lora_jax
from tests.jaxprs import equations

DEPTH, WIDTH = 6, 32
MATRIX = WIDTH * WIDTH

pytestmark = pytest.mark.usefixtures("promoted_ranks")

USES: dict[str, Callable[[Any, Any], Any]] = {}


def use(fn: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Registers a function of a stack of matrices and of activations (3, WIDTH)."""
    USES[fn.__name__] = fn
    return fn


def layer(h: Any, w: Any) -> tuple[Any, None]:
    return jnp.tanh(h @ w), None


@use
def scanned(w: Any, x: Any) -> Any:
    return jax.lax.scan(layer, x, w)[0]


@use
def scanned_in_remat(w: Any, x: Any) -> Any:
    return jax.lax.scan(jax.checkpoint(layer), x, w)[0]


@use
def scanned_transposed(w: Any, x: Any) -> Any:
    return jax.lax.scan(layer, x, w.swapaxes(1, 2))[0]


@use
def scanned_in_another_dtype(w: Any, x: Any) -> Any:
    return jax.lax.scan(layer, x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))[0]


@use
def scanned_with_split_axes(w: Any, x: Any) -> Any:
    """Attention kernels: the outputs of each layer are heads."""

    def heads(h: Any, w: Any) -> tuple[Any, None]:
        return jnp.tanh(jnp.einsum("bi,ihd->bhd", h, w).reshape(h.shape)), None

    return jax.lax.scan(heads, x, w.reshape(DEPTH, WIDTH, 4, WIDTH // 4))[0]


@use
def scanned_in_parts(w: Any, x: Any) -> Any:
    first, second = jnp.split(w, 2)
    return jax.lax.scan(layer, jax.lax.scan(layer, x, first)[0], second[1:])[0]


@use
def scanned_in_another_order(w: Any, x: Any) -> Any:
    return jax.lax.scan(layer, x, w, reverse=True)[0]


@use
def taken_one_by_one(w: Any, x: Any) -> Any:
    for index in range(DEPTH):
        x, _ = layer(x, w[index])
    return x


@use
def unstacked(w: Any, x: Any) -> Any:
    for each in w:
        x, _ = layer(x, each)
    return x


@use
def picked_in_a_loop(w: Any, x: Any) -> Any:
    def body(index: Any, h: Any) -> Any:
        return layer(h, jax.lax.dynamic_index_in_dim(w, index, keepdims=False))[0]

    return jax.lax.scan(lambda h, i: (body(i, h), None), x, jnp.arange(DEPTH))[0]


@use
def indexed_by_a_traced_number(w: Any, x: Any) -> Any:
    index = jnp.argmax(x[0]) % DEPTH
    return x @ w[index]


@use
def experts_of_each_token(w: Any, x: Any) -> Any:
    chosen = jnp.argmax(x, axis=1) % DEPTH
    return jnp.stack([x[row] @ jnp.take(w, chosen[row], axis=0) for row in range(3)])


@use
def branches(w: Any, x: Any) -> Any:
    def first(x: Any) -> Any:
        return layer(x, w[0])[0]

    def second(x: Any) -> Any:
        return layer(x, w[1])[0]

    return jax.lax.cond(x[0, 0] > 0, first, second, x)


@use
def rematerialised(w: Any, x: Any) -> Any:
    return jax.checkpoint(lambda w, x: jax.lax.scan(layer, x, w)[0])(w, x)


@use
def jitted(w: Any, x: Any) -> Any:
    return jax.jit(lambda w, x: jax.lax.scan(layer, x, w)[0])(w, x)


@use
def behind_a_barrier(w: Any, x: Any) -> Any:
    w, x = jax.lax.optimization_barrier((w, x))
    return jax.lax.scan(layer, x, w)[0]


@use
def cut_over_devices(w: Any, x: Any) -> Any:
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    each = jax.shard_map(
        lambda w, x: jax.lax.scan(layer, x, w)[0],
        mesh=mesh,
        in_specs=(PartitionSpec(None, None, "d"), PartitionSpec()),
        out_specs=PartitionSpec(None, "d"),
        check_vma=False,
    )
    return each(w, x)


@use
def gathered_from_shards(w: Any, x: Any) -> Any:
    """FSDP by hand: each device holds some rows of each matrix, and gathers them to compute."""
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def gathered(h: Any, w: Any) -> Any:
        return layer(h, jax.lax.all_gather(w, "d", axis=0, tiled=True))

    each = jax.shard_map(
        lambda w, x: jax.lax.scan(gathered, x, w)[0],
        mesh=mesh,
        in_specs=(PartitionSpec(None, "d"), PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    return each(w, x)


@use
def a_stack_gathered_from_shards(w: Any, x: Any) -> Any:
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def computed(w: Any, x: Any) -> Any:
        return jax.lax.scan(layer, x, jax.lax.all_gather(w, "d", axis=2, tiled=True))[0]

    each = jax.shard_map(
        computed,
        mesh=mesh,
        in_specs=(PartitionSpec(None, None, "d"), PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    return each(w, x)


def floats(jaxpr: Any) -> Iterator[Any]:
    for equation in equations(jaxpr):
        for variable in equation.outvars:
            if jnp.issubdtype(getattr(variable.aval, "dtype", jnp.int32), jnp.floating):
                yield equation.primitive.name, variable.aval


def program(name: str, **options: Any) -> Any:
    """Returns the jaxpr of a use and its gradients, the stack quantised and adapted."""
    weight = np.random.default_rng(0).standard_normal((DEPTH, WIDTH, WIDTH)).astype(np.float32)
    axes = {"w": ("batch", "in", "out")}
    params = lora_jax.quantize({"w": jnp.asarray(weight)}, "w", block=8, axes=axes, **options)
    wrapped = lora_jax.wrap(params, "w", rank=1, axes=axes)
    adapters, frozen = lora_jax.split(wrapped)
    adapted = lora_jax.adapt(lambda params, x: USES[name](params["w"], x))

    def loss(adapters: Any, frozen: Any, x: Any) -> Any:
        return jnp.sum(adapted(lora_jax.combine(adapters, frozen), x).astype(jnp.float32))

    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, WIDTH)), jnp.float32)
    return jax.make_jaxpr(jax.grad(loss))(adapters, frozen, x).jaxpr


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", USES)
def test_no_float_is_larger_than_a_matrix(name: str, kind: str) -> None:
    found = list(floats(program(name, format=kind)))
    largest = max(found, key=lambda each: math.prod(each[1].shape))
    assert math.prod(largest[1].shape) <= MATRIX, largest


@pytest.mark.parametrize("name", USES)
def test_no_matrix_is_kept_for_the_backward_pass(name: str) -> None:
    """What leaves a loop, or crosses from a forward to a backward one, has codes at most."""
    kept = [
        variable.aval
        for equation in equations(program(name))
        if equation.primitive.name in ("scan", "cond", "while")
        for variable in equation.outvars
    ]
    assert not any(math.prod(aval.shape) >= DEPTH * MATRIX for aval in kept)
