"""Inner functions that the model jits: rewritten once for each signature, and never for another."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.agreement import assert_agree

RNG = np.random.default_rng(3)
X = jnp.asarray(RNG.normal(size=(5, 6)), jnp.float32)
KEY = jax.random.key(2)


def weight(rank: int = 2, dtype: Any = jnp.float32, **options: Any) -> Any:
    """Returns an adapted (6, 6) weight whose factors are not zero."""
    base = jnp.asarray(RNG.normal(size=(6, 6)) / 3, dtype)
    wrapped = lora_jax.wrap({"W": base}, "W", rank=rank, **options)
    return jax.tree.map(
        lambda label, x: jnp.asarray(RNG.normal(size=x.shape) / 3, x.dtype) if "_" in label else x,
        lora_jax.labels(wrapped),
        wrapped,
    )["W"]


@jax.jit
def layer(kernel: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ kernel.astype(x.dtype))


@jax.custom_jvp
def opaque(kernel: jax.Array, x: jax.Array) -> jax.Array:
    return layer(kernel, x)


@opaque.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return jax.jvp(layer, primals, tangents)


ORDERS: dict[str, Callable[..., jax.Array]] = {
    "inside first": lambda p, x: layer(p["W"], opaque(p["V"], x)),
    "outside first": lambda p, x: opaque(p["W"], layer(p["V"], x)),
    "outside twice": lambda p, x: layer(p["W"], layer(p["V"], x)),
}


@pytest.mark.parametrize("fn", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("second", [{}, {"rank": 3}, {"dtype": jnp.bfloat16}, {"dora": True}])
def test_one_layer_of_different_weights(
    fn: Callable[..., jax.Array], second: dict[str, Any]
) -> None:
    params = {"V": weight(), "W": weight(**second)}
    actual = jax.jit(lora_jax.adapt(fn))(params, X)
    tolerance = 1e-5 if second.get("dtype") is None else 1e-2
    assert_agree(actual, fn(lora_jax.merge(params), X), tolerance=tolerance)


@pytest.mark.parametrize("name", ORDERS)
def test_dropout_outside_of_a_custom_rule_alone(name: str) -> None:
    """Whatever comes first, the layer outside has masks, and the one inside has none."""
    params = {"V": weight(), "W": weight()}
    adapted = jax.jit(lora_jax.adapt(ORDERS[name], dropout=0.5))
    outputs = [adapted(params, X, lora_key=jax.random.key(seed)) for seed in range(3)]
    assert not np.array_equal(outputs[0], outputs[1])
    inside = {"inside first": "V", "outside first": "W"}.get(name)
    if inside is None:
        return
    # With the adapter outside at zero nothing is left that a mask could change.
    outside = "V" if inside == "W" else "W"
    still = lora_jax.unwrap({"W": params[outside]})["W"]
    alone = [adapted({**params, outside: still}, X, lora_key=jax.random.key(s)) for s in range(2)]
    np.testing.assert_array_equal(*alone)


def test_explain_gives_each_call_its_own_cost() -> None:
    params = {"V": weight(rank=1), "W": weight(rank=4)}
    report = lora_jax.explain(ORDERS["outside twice"], params, X)
    flops = {target.path: target.uses[0].factored_flops for target in report.targets}
    assert flops == {"V": 2 * 5 * 1 * (6 + 6), "W": 2 * 5 * 4 * (6 + 6)}
