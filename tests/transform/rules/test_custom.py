"""Functions with derivative rules of their own: what their rules see and what they give."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.agreement import assert_agree
from tests.trained import as_if_trained

RNG = np.random.default_rng(4)
X = jnp.asarray(RNG.normal(size=(5, 6)), jnp.float32)


def trained() -> Any:
    params = {"W": jnp.asarray(RNG.normal(size=(6, 6)) / 3, jnp.float32)}
    return as_if_trained(lora_jax.wrap(params, "W", rank=2))


WRAPPED = trained()
ADAPTERS, FROZEN = lora_jax.split(WRAPPED)


def dense(loss: Callable[..., Any]) -> Callable[..., Any]:
    return lambda wrapped, x: loss(lora_jax.merge(wrapped), x)


def gradient(loss: Callable[..., Any], **options: Any) -> Any:
    """Returns a loss at X and its gradient with respect to the factors."""
    of_adapters = jax.value_and_grad(
        lambda adapters: loss(lora_jax.combine(adapters, FROZEN), X), **options
    )
    return of_adapters(ADAPTERS)


def is_symbolic_zero(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.SymbolicZero)


def instantiated(leaf: Any) -> Any:
    if not is_symbolic_zero(leaf):
        return leaf
    is_exact = not jnp.issubdtype(leaf.dtype, jnp.inexact)
    return np.zeros(leaf.shape, jax.dtypes.float0 if is_exact else leaf.dtype)


def custom_vjp(function: Callable[..., Any], seen: list[Any]) -> Callable[..., Any]:
    """Returns a function whose rule notes which of its inputs are said to be differentiated."""
    wrapped = jax.custom_vjp(function)

    def forward(*arguments: Any) -> Any:
        seen.append([argument.perturbed for argument in arguments])
        values = [argument.value for argument in arguments]
        return jax.vjp(function, *values)

    def backward(pullback: Any, cotangents: Any) -> Any:
        return pullback(jax.tree.map(instantiated, cotangents, is_leaf=is_symbolic_zero))

    wrapped.defvjp(forward, backward, symbolic_zeros=True)
    return wrapped


def custom_jvp(function: Callable[..., Any], seen: list[Any]) -> Callable[..., Any]:
    wrapped = jax.custom_jvp(function)

    def rule(primals: Any, tangents: Any) -> Any:
        seen.append([not is_symbolic_zero(tangent) for tangent in tangents])
        return jax.jvp(function, primals, tuple(map(instantiated, tangents)))

    wrapped.defjvp(rule, symbolic_zeros=True)
    return wrapped


@pytest.mark.parametrize("custom", [custom_vjp, custom_jvp])
@pytest.mark.parametrize("differentiated", ["adapter", "x", "both"])
def test_only_what_is_differentiated_is_perturbed(custom: Any, differentiated: str) -> None:
    seen: list[Any] = []
    fn = custom(lambda kernel, x, shift: jnp.tanh(x @ kernel + shift), seen)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(fn(params["W"], x, jnp.float32(0.5)) ** 2)

    arguments = {"adapter": (0,), "x": (1,), "both": (0, 1)}[differentiated]

    def derivative(apply: Any) -> Any:
        joined = lambda adapters, x: apply(lora_jax.combine(adapters, FROZEN), x)  # noqa: E731
        return jax.grad(joined, arguments)(ADAPTERS, X)

    actual = derivative(lora_jax.adapt(loss))
    assert seen[-1] == [0 in arguments, 1 in arguments, False]
    assert_agree(actual, derivative(dense(loss)))


@pytest.mark.parametrize("custom", [custom_vjp, custom_jvp])
@pytest.mark.parametrize("constant", [True, 1, 0.5, np.float32(2), np.ones(6, np.int8)])
def test_constants_among_the_inputs(custom: Any, constant: Any) -> None:
    fn = custom(
        lambda kernel, x, chosen: jnp.where(jnp.asarray(chosen).astype(bool), x @ kernel, 0), []
    )

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(fn(params["W"], x, constant) ** 2)

    assert_agree(gradient(lora_jax.adapt(loss)), gradient(dense(loss)))


@pytest.mark.parametrize("custom", [custom_vjp, custom_jvp])
def test_outputs_without_a_derivative(custom: Any) -> None:
    fn = custom(lambda kernel, x: (x @ kernel, jnp.argmax(x @ kernel, -1)), [])

    def loss(params: Any, x: jax.Array) -> Any:
        y, places = fn(params["W"], x)
        return jnp.sum(y**2), places

    assert_agree(gradient(lora_jax.adapt(loss), has_aux=True), gradient(dense(loss), has_aux=True))


def test_a_rule_that_refuses_what_is_not_differentiated() -> None:
    @eqx.filter_custom_vjp
    def fn(kernel: jax.Array, x: jax.Array, shift: jax.Array) -> jax.Array:
        return jnp.tanh(x @ kernel + shift)

    @fn.def_fwd
    def _(perturbed: Any, kernel: jax.Array, x: jax.Array, shift: jax.Array) -> Any:
        del perturbed
        return fn(kernel, x, shift), None

    @fn.def_bwd
    def _(residuals: Any, g: Any, perturbed: Any, kernel: Any, x: Any, shift: Any) -> Any:
        del residuals, perturbed
        return jax.vjp(lambda kernel: jnp.tanh(x @ kernel + shift), kernel)[1](g)[0]

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(fn(params["W"], x, jnp.float32(0.5)))

    assert_agree(gradient(lora_jax.adapt(loss)), gradient(dense(loss)))


def test_a_rule_with_optimised_rematerialisation() -> None:
    fn = jax.custom_vjp(lambda kernel, x: jnp.sin(x @ kernel))
    fn.defvjp(
        lambda kernel, x: (fn(kernel, x), (kernel, x)),
        lambda saved, g: jax.vjp(lambda kernel, x: jnp.sin(x @ kernel), *saved)[1](g),
        optimize_remat=True,
    )

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(fn(params["W"], x) ** 2)

    assert_agree(gradient(lora_jax.adapt(loss)), gradient(dense(loss)))


def test_checkpointed_loops() -> None:
    """Equinox's loops pass a Python `True` to a function with its own rule."""

    def loss(params: Any, x: jax.Array) -> jax.Array:
        def step(state: Any) -> Any:
            return state[0] + 1, jnp.tanh(state[1] @ params["W"])

        return jnp.sum(
            eqx.internal.while_loop(
                lambda state: state[0] < 3, step, (0, x), max_steps=4, kind="checkpointed"
            )[1]
        )

    assert_agree(gradient(lora_jax.adapt(loss)), gradient(dense(loss)))
