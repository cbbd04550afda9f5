"""A model that differentiates itself: what JAX makes of a derivative keeps the weights factored."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.agreement import assert_agree
from tests.trained import as_if_trained

SHAPE, ROLES = (3, 4, 4), ("batch", "in", "out")


def layer(h: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
    return jnp.tanh(h @ w), None


def scanned(body: Callable[..., Any]) -> Callable[..., Any]:
    return lambda p, x: jnp.sum(jax.lax.scan(body, x, p["w"])[0])


def by_hand(p: Any, x: jax.Array) -> jax.Array:
    for i in range(SHAPE[0]):
        x, _ = layer(x, p["w"][i])
    return jnp.sum(x)


@jax.custom_jvp
def ruled(p: Any, x: jax.Array) -> jax.Array:
    return by_hand(p, x)


ruled.defjvp(lambda primals, tangents: jax.jvp(by_hand, primals, tangents))

ENERGIES = {
    "layers one by one": by_hand,
    "jit": jax.jit(by_hand),
    "remat": jax.checkpoint(by_hand),
    "scan": scanned(layer),
    "remat of a scan": jax.checkpoint(scanned(layer)),
    "scan of remat": scanned(jax.checkpoint(layer)),
    "a derivative rule": ruled,
}
DERIVATIVES: dict[str, Callable[[Any], Any]] = {
    "grad": lambda energy: jax.grad(energy, argnums=1),
    "jvp": lambda energy: lambda p, x: jax.jvp(lambda x: energy(p, x), (x,), (x,))[1],
    "linearize": lambda energy: lambda p, x: jax.linearize(lambda x: energy(p, x), x)[1](x),
    "grad of grad": lambda energy: (
        lambda p, x: jax.grad(lambda x: jnp.sum(jax.grad(energy, argnums=1)(p, x) ** 2))(x)
    ),
}


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("energy", ENERGIES)
def test_no_weight_is_built(energy: str, derivative: str) -> None:
    model = DERIVATIVES[derivative](ENERGIES[energy])
    random = np.random.default_rng(0)
    params = {"w": jnp.asarray(random.standard_normal(SHAPE) / 2, jnp.float32)}
    x = jnp.asarray(random.standard_normal((2, 4)), jnp.float32)
    wrapped = as_if_trained(lora_jax.wrap(params, "w", rank=1, axes={"w": ROLES}))
    actual = lora_jax.adapt(model, on_materialize="error")(wrapped, x)
    assert_agree(actual, model(lora_jax.merge(wrapped), x), tolerance=1e-5)
