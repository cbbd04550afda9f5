"""What an equation is told is what it stays told: a rule passes every parameter on."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import lora_jax
from tests.jaxprs import equations

PARAMS = {"W": jnp.ones((6, 6)), "V": jnp.ones((3, 6, 6))}
WRAPPED = lora_jax.wrap(PARAMS, ".*", rank=2, axes={"V": ("batch", "in", "out")})
X = jnp.ones((4, 6))

# What a rewritten body changes of necessity: the body itself and how many arrays go in.
OF_THE_BODY = {
    "branches",
    "call_jaxpr",
    "cond_jaxpr",
    "body_jaxpr",
    "jaxpr",
    "num_consts",
    "num_carry",
    "cond_nconsts",
    "body_nconsts",
    "ft_in",
    "ft_out",
    "linear",
    "ctx_mesh",
    "in_shardings",
    "in_layouts",
    "donated_invars",
    "in_specs",
    "jvp_jaxpr_fun",
    "fwd_jaxpr_thunk",
    "bwd",
    "out_trees",
}
SAVE_NAMED = jax.checkpoint_policies.save_only_these_names("h")


def with_remat(params: Any, x: jax.Array) -> jax.Array:
    layer = jax.checkpoint(
        lambda x: jnp.sin(checkpoint_name(x @ params["W"], "h")),
        policy=SAVE_NAMED,
        prevent_cse=False,
    )
    return layer(x)


def with_differentiated_remat(params: Any, x: jax.Array) -> jax.Array:
    return jax.grad(lambda x: jnp.sum(jax.checkpoint(lambda x: jnp.sin(x @ params["W"]))(x)))(x)


def with_scan(params: Any, x: jax.Array) -> jax.Array:
    return jax.lax.scan(
        lambda h, kernel: (h @ kernel, None), x, params["V"], reverse=True, unroll=3
    )[0]


def with_jit(params: Any, x: jax.Array) -> jax.Array:
    def named(kernel: jax.Array, x: jax.Array) -> jax.Array:
        return x @ kernel

    return jax.jit(named, keep_unused=True)(params["W"], x)


def with_platforms(params: Any, x: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(
        x, cpu=lambda x: x @ params["W"], tpu=lambda x: x, default=lambda x: 2 * x @ params["W"]
    )


def with_product(params: Any, x: jax.Array) -> jax.Array:
    return jax.lax.dot_general(
        x,
        params["W"],
        (((1,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def with_experts(params: Any, x: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(
        x, params["V"], jnp.array([1, 2, 1]), precision=jax.lax.Precision.HIGHEST
    )


def with_lookup(params: Any, x: jax.Array) -> jax.Array:
    places = jnp.array([0, 2])
    return params["W"].at[places].get(mode="clip", unique_indices=True, indices_are_sorted=True)


def with_shards(params: Any, x: jax.Array) -> jax.Array:
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    return jax.shard_map(
        lambda kernel, x: x @ kernel,
        mesh=mesh,
        in_specs=(spec(), spec("d")),
        out_specs=spec("d"),
        check_vma=False,
    )(params["W"], x)


CASES: dict[str, tuple[str, Callable[..., jax.Array]]] = {
    "remat": ("remat2 checkpoint", with_remat),
    "differentiated remat": ("remat2 checkpoint", with_differentiated_remat),
    "scan": ("scan", with_scan),
    "jit": ("jit", with_jit),
    "cond": ("cond", with_platforms),
    "dot_general": ("dot_general", with_product),
    "ragged_dot": ("ragged_dot_general", with_experts),
    "gather": ("gather", with_lookup),
    "shard_map": ("shard_map", with_shards),
}


def parameters(fn: Callable[..., Any], primitives: str, *arguments: Any) -> list[Mapping[str, Any]]:
    """Returns the parameters of all equations with one of these primitives, body aside."""
    found = equations(jax.make_jaxpr(fn)(*arguments).jaxpr)
    return [
        {name: str(value) for name, value in equation.params.items() if name not in OF_THE_BODY}
        for equation in found
        if equation.primitive.name in primitives.split()
    ]


@pytest.mark.parametrize(("primitives", "fn"), CASES.values(), ids=CASES)
def test_every_parameter_is_passed_on(primitives: str, fn: Callable[..., jax.Array]) -> None:
    expected = parameters(fn, primitives, PARAMS, X)
    assert expected
    actual = parameters(lora_jax.adapt(fn), primitives, WRAPPED, X)
    for each in expected:
        assert each in actual


def test_a_backward_pass_of_the_model_keeps_its_barriers() -> None:
    def barriers(fn: Callable[..., Any], *arguments: Any) -> int:
        return jax.jit(fn).lower(*arguments).as_text().count("optimization_barrier")

    expected = barriers(with_differentiated_remat, PARAMS, X)
    assert expected > 0
    assert barriers(lora_jax.adapt(with_differentiated_remat), WRAPPED, X) == expected


def test_donated_inputs_are_donated() -> None:
    step = jax.jit(lambda params, x: x @ params["W"], donate_argnums=1)
    x = jnp.ones((4, 6))
    np.testing.assert_array_equal(lora_jax.adapt(step)(WRAPPED, x), X @ PARAMS["W"])
    assert x.is_deleted()
    assert not WRAPPED["W"].base.is_deleted()
