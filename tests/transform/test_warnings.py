"""`adapt`: what is said of a weight that is built."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from tests.agreement import assert_agree
from tests.transform.projection import MERGED, WRAPPED, X, project, trained


def with_sine(params: Any, x: jax.Array) -> jax.Array:
    return x @ jnp.sin(params["W"])


SINE_LINE = with_sine.__code__.co_firstlineno + 1

PLACES: dict[str, Callable[..., Any]] = {
    "directly": with_sine,
    "scan": lambda p, x: jax.lax.scan(lambda h, _: (with_sine(p, h), None), x, None, length=3)[0],
    "cond": lambda p, x: jax.lax.cond(x[0, 0] > -9, lambda: with_sine(p, x), lambda: x),
    "jit": jax.jit(with_sine),
    "remat": jax.checkpoint(with_sine),
    "while": lambda p, x: jax.lax.while_loop(
        lambda s: s[0] < 2, lambda s: (s[0] + 1, with_sine(p, s[1])), (0, x)
    )[1],
}


def warned(fn: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fn()
    assert all(issubclass(w.category, lora_jax.MaterializationWarning) for w in caught)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("fn", PLACES.values(), ids=PLACES)
def test_a_warning_names_path_op_and_line_once(fn: Callable[..., Any]) -> None:
    adapted = lora_jax.adapt(fn)
    (message,) = warned(lambda: adapted(WRAPPED, X))
    assert message.startswith("'W' reaches `sin` at ")
    assert f"test_warnings.py:{SINE_LINE} (with_sine)" in message
    assert warned(lambda: adapted(WRAPPED, X)) == []


def test_a_warning_points_at_the_users_code() -> None:
    with pytest.warns(lora_jax.MaterializationWarning) as caught:
        lora_jax.adapt(with_sine)(WRAPPED, X)
    with pytest.warns(lora_jax.MaterializationWarning) as caught_in_jit:
        jax.jit(lora_jax.adapt(with_sine))(WRAPPED, X)
    assert {warning.filename for warning in (*caught, *caught_in_jit)} == {__file__}


def test_a_rule_that_traces_a_line_twice_warns_once() -> None:
    fn = jax.custom_vjp(with_sine)
    fn.defvjp(lambda p, x: (fn(p, x), (p, x)), lambda r, g: jax.vjp(with_sine, *r)[1](g))
    messages = warned(lambda: jax.grad(lambda w: jnp.sum(lora_jax.adapt(fn)(w, X)))(WRAPPED))
    assert len(set(messages)) == len(messages) > 0


def test_each_weight_of_a_shared_function_is_warned_of() -> None:
    layer = jax.jit(lambda kernel, x: x @ jnp.sin(kernel))
    wrapped = trained(V=(24, 24), W=(24, 24))
    fn = lora_jax.adapt(lambda p, x: layer(p["W"], layer(p["V"], x)))
    first, second = warned(lambda: fn(wrapped, X))
    assert (first[:3], second[:3]) == ("'V'", "'W'")


def test_no_warning_for_what_is_factored_or_chosen() -> None:
    small = trained(W=(4, 3))
    assert warned(lambda: lora_jax.adapt(project)(WRAPPED, X)) == []
    assert warned(lambda: lora_jax.adapt(project)(small, jnp.ones((50, 4)))) == []


def test_a_weight_that_is_returned_is_said_to_be() -> None:
    (message,) = warned(lambda: lora_jax.adapt(lambda p: p["W"])(WRAPPED))
    assert "'W' reaches `the output`" in message


def test_refusing_or_ignoring() -> None:
    with pytest.raises(lora_jax.MaterializationError, match="'W' reaches `sin`.*targets"):
        lora_jax.adapt(with_sine, on_materialize="error")(WRAPPED, X)
    ignoring = lora_jax.adapt(with_sine, on_materialize="ignore")
    assert warned(lambda: ignoring(WRAPPED, X)) == []
    assert_agree(ignoring(WRAPPED, X), with_sine(MERGED, X))
