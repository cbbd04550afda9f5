"""`adapt` under JAX's transformations, on devices, and with effects."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import lora_jax
from tests.agreement import assert_agree
from tests.transform.projection import MERGED, WRAPPED, X, project

CLOSURES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "jit": (jax.jit, lambda f: f(X)),
    "grad": (lambda f: jax.grad(lambda x: f(x).sum()), lambda f: f(X)),
    "vmap": (jax.vmap, lambda f: f(X)),
    "jit of vmap of grad": (
        lambda f: jax.jit(jax.vmap(jax.grad(lambda x: f(x).sum()))),
        lambda f: f(X),
    ),
    "jvp": (lambda f: lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),)), lambda f: f(X)),
    "linearize": (lambda f: lambda x: jax.linearize(f, x)[1](x), lambda f: f(X)),
    "jacfwd": (lambda f: jax.jacfwd(lambda x: f(x).sum(0)), lambda f: f(X)),
    "jacrev": (lambda f: jax.jacrev(lambda x: f(x).sum(0)), lambda f: f(X)),
    "hessian": (lambda f: jax.hessian(lambda x: f(x).sum()), lambda f: f(X[0])),
    "scan": (lambda f: lambda xs: jax.lax.scan(lambda c, x: (c, f(x)), 0, xs)[1], lambda f: f(X)),
    "map": (lambda f: lambda xs: jax.lax.map(f, xs), lambda f: f(X)),
    "remat": (lambda f: jax.grad(lambda x: jax.checkpoint(f)(x).sum()), lambda f: f(X)),
}


@pytest.mark.parametrize(("transform", "call"), CLOSURES.values(), ids=CLOSURES)
@pytest.mark.parametrize("closes_over", ["the input", "the weights"])
def test_closures(transform: Any, call: Any, closes_over: str) -> None:
    """The adapted function may close over values that are being traced."""
    if closes_over == "the input":
        actual = call(transform(lambda x: lora_jax.adapt(lambda p: project(p, x))(WRAPPED)))
    else:
        adapted = lora_jax.adapt(project)
        actual = call(transform(lambda x: adapted(WRAPPED, x)))
    assert_agree(actual, call(transform(lambda x: project(MERGED, x))))


def test_derivatives_with_respect_to_factors() -> None:
    """Forward mode, and forward over reverse, beside the dense sum."""
    adapters, frozen = lora_jax.split(WRAPPED)
    direction = jax.tree.map(jnp.cos, adapters)

    def loss_of(fn: Callable[..., Any]) -> Callable[..., Any]:
        return lambda a: jnp.sum(fn(lora_jax.combine(a, frozen), X) ** 2)

    adapted = loss_of(lora_jax.adapt(project))
    dense = loss_of(lambda w, x: project(lora_jax.merge(w), x))
    for derivative in (
        lambda f: jax.jvp(f, (adapters,), (direction,)),
        lambda f: jax.jvp(jax.grad(f), (adapters,), (direction,)),
        lambda f: jax.grad(lambda a: jax.jvp(f, (a,), (direction,))[1])(adapters),
    ):
        actual, expected = derivative(adapted), derivative(dense)
        assert_agree(actual, expected)


def test_without_jit() -> None:
    def fn(params: Any, x: jax.Array) -> jax.Array:
        layer = jax.jit(lambda w, h: jnp.tanh(h @ w))
        return jax.lax.scan(lambda h, _: (layer(params["W"], h), None), x, None, length=3)[0]

    with jax.disable_jit():
        actual = lora_jax.adapt(fn)(WRAPPED, X)
    assert_agree(actual, fn(MERGED, X))


def test_donated_adapters() -> None:
    adapters, frozen = lora_jax.split(jax.tree.map(jnp.copy, WRAPPED))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(adapters: Any, frozen: Any, x: jax.Array) -> Any:
        def loss(adapters: Any) -> jax.Array:
            return lora_jax.adapt(project)(lora_jax.combine(adapters, frozen), x).sum()

        return jax.tree.map(lambda a, g: a - g, adapters, jax.grad(loss)(adapters))

    after = step(adapters, frozen, X)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(adapters))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))
    assert lora_jax.adapt(project)(lora_jax.combine(after, frozen), X).shape == X.shape


def constant_sizes(jaxpr: Any) -> list[int]:
    return [np.size(constant) for constant in jaxpr.consts]


def test_no_weight_becomes_a_constant() -> None:
    adapted = lora_jax.adapt(project)
    assert not any(size >= 24 for size in constant_sizes(jax.make_jaxpr(adapted)(WRAPPED, X)))
    text = jax.jit(adapted).lower(WRAPPED, X).as_text()
    assert 'dense<"0x' not in text


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("weight_spec", "x_spec"),
    [
        (PartitionSpec(None, "m"), PartitionSpec()),
        (PartitionSpec("m", None), PartitionSpec()),
        (PartitionSpec(), PartitionSpec("m", None)),
    ],
    ids=["outputs", "inputs", "examples"],
)
def test_sharded(axis_type: Any, weight_spec: Any, x_spec: Any) -> None:
    mesh = jax.make_mesh((8,), ("m",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        kernel = jax.device_put(WRAPPED["W"].base, jax.NamedSharding(mesh, weight_spec))
        x = jax.device_put(jnp.concatenate([X, X[:3]]), jax.NamedSharding(mesh, x_spec))
        wrapped = lora_jax.wrap({"W": kernel}, "W", rank=2)
        wrapped = {"W": dataclasses.replace(wrapped["W"], lora_B=WRAPPED["W"].lora_B)}
        for transform in (jax.jit, lambda fn: fn):
            actual = transform(lora_jax.adapt(project))(wrapped, x)
            plain = transform(project)({"W": kernel}, x)
            assert actual.sharding.is_equivalent_to(plain.sharding, 2)
            assert_agree(np.asarray(actual), np.asarray(project(lora_jax.merge(wrapped), x)))
        merged = lora_jax.merge(wrapped)["W"]
        assert merged.sharding.is_equivalent_to(kernel.sharding, 2)


def test_effects_happen_once_and_in_order() -> None:
    seen = []

    def fn(params: Any, x: jax.Array) -> jax.Array:
        y = x @ params["W"]
        for name in ("first", "second"):
            jax.experimental.io_callback(
                lambda _, name=name: seen.append(name), None, y, ordered=True
            )
        return y

    jax.block_until_ready(jax.jit(lora_jax.adapt(fn))(WRAPPED, X))
    jax.effects_barrier()
    assert seen == ["first", "second"]


def test_mutable_arrays() -> None:
    def fn(params: Any, x: jax.Array) -> jax.Array:
        total = jax.new_ref(jnp.zeros_like(x))
        for _ in range(2):
            total[...] += x @ params["W"]
        total[0] = total[1]
        return total[...]

    assert_agree(lora_jax.adapt(fn)(WRAPPED, X), fn(MERGED, X))
