"""Collectives inside `shard_map`, and weights that the model puts somewhere."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax
from tests.agreement import assert_agree
from tests.trained import as_if_trained

RNG = np.random.default_rng(8)
P = PartitionSpec
X = np.asarray(RNG.normal(size=(4, 8)), np.float32)

COLLECTIVES: dict[str, Callable[[jax.Array, int], jax.Array]] = {
    "all_gather": lambda w, axis: jax.lax.all_gather(w, "d", axis=axis, tiled=True),
    "all_gather on a new axis": lambda w, axis: jax.lax.all_gather(w, "d")[1],
    "psum": lambda w, axis: jax.lax.psum(w, "d"),
    "pmean": lambda w, axis: jax.lax.pmean(w, "d"),
    "psum_scatter": lambda w, axis: jax.lax.psum_scatter(
        w, "d", scatter_dimension=1 - axis, tiled=True
    ),
    "ppermute to all": lambda w, axis: jax.lax.ppermute(
        w, "d", [(i, (i + 1) % 4) for i in range(4)]
    ),
    "ppermute to some": lambda w, axis: jax.lax.ppermute(w, "d", [(0, 1), (3, 0)]),
    "all_to_all": lambda w, axis: jax.lax.all_to_all(
        w, "d", split_axis=1 - axis, concat_axis=axis, tiled=True
    ),
    "all_to_all along one axis": lambda w, axis: jax.lax.all_to_all(
        jnp.concatenate([w] * 2, axis), "d", split_axis=axis, concat_axis=axis, tiled=True
    ),
    "pmax": lambda w, axis: jax.lax.pmax(jax.lax.stop_gradient(w), "d") + w,
    "scaled by the device": lambda w, axis: jax.lax.all_gather(
        w * (1.0 + jax.lax.axis_index("d").astype(w.dtype)), "d", axis=axis, tiled=True
    ),
}
# What an adapted weight that is cut along its inputs or outputs need not be built for.
FACTORED = {"all_gather", "all_gather on a new axis", "ppermute to all", "ppermute to some"}


def trained(axes: tuple[str, str], *, dora: bool) -> Any:
    base = jnp.asarray(RNG.normal(size=(8, 8)) / 3, jnp.float32)
    wrapped = lora_jax.wrap({"W": base}, "W", rank=2, axes={"W": axes}, alpha=3.0, dora=dora)
    return as_if_trained(wrapped)


LAYOUTS = (("in", "out"), ("out", "in"))
TREES = {(axes, dora): trained(axes, dora=dora) for axes in LAYOUTS for dora in (False, True)}


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request: pytest.FixtureRequest) -> Iterator[jax.sharding.Mesh]:
    mesh = jax.make_mesh((4,), ("d",), axis_types=(request.param,))
    with jax.set_mesh(mesh):
        yield mesh


def on(mesh: jax.sharding.Mesh, wrapped: Any, spec: PartitionSpec) -> Any:
    """Returns an adapted weight whose base is cut, and whose factors each device holds whole."""
    whole = jax.device_put(wrapped["W"], NamedSharding(mesh, P()))
    base = jax.device_put(whole.base, NamedSharding(mesh, spec))
    return {"W": dataclasses.replace(whole, base=base)}


def sharded(
    collective: Callable[[jax.Array, int], jax.Array], mesh: Any, axis: int, *, check: bool
) -> Callable[..., jax.Array]:
    spec = P(*("d" if i == axis else None for i in range(2)))

    def body(w: jax.Array, x: jax.Array) -> jax.Array:
        moved = collective(w, axis)
        return (x[:, : moved.shape[0]] @ moved)[None]

    mapped = jax.shard_map(body, mesh=mesh, in_specs=(spec, P()), out_specs=P("d"), check_vma=check)
    return lambda params, x: mapped(params["W"], x)


def value_and_gradient(apply: Callable[..., Any], wrapped: Any, x: Any) -> Any:
    adapters, frozen = lora_jax.split(wrapped)

    @jax.jit
    def of_adapters(adapters: Any) -> Any:
        def loss(adapters: Any) -> Any:
            y = apply(lora_jax.combine(adapters, frozen), x)
            return jnp.sum(jnp.sin(y)), y

        return jax.grad(loss, has_aux=True)(adapters)

    return of_adapters(adapters)


@pytest.mark.filterwarnings("ignore::lora_jax.MaterializationWarning")
@pytest.mark.parametrize(("axes", "dora"), TREES)
@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_collective_is_that_of_the_dense_weight(
    name: str, axes: tuple[str, str], dora: bool, mesh: jax.sharding.Mesh
) -> None:
    is_explicit = mesh.axis_types == (AxisType.Explicit,)
    if is_explicit and dora:
        pytest.skip("the two kinds of meshes differ in what is cut, and not in what is moved")
    wrapped, axis = TREES[axes, dora], len(name) % 2
    cut = on(mesh, wrapped, P(*("d" if i == axis else None for i in range(2))))
    x = jax.device_put(X, NamedSharding(mesh, P()))
    check = name != "pmax" and is_explicit
    fn = sharded(COLLECTIVES[name], mesh, axis, check=check)
    actual = value_and_gradient(lora_jax.adapt(fn), cut, x)
    expected = value_and_gradient(lambda w, x: fn(lora_jax.merge(w), x), cut, x)
    assert_agree(actual, expected)


@pytest.mark.parametrize("check", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("axes", LAYOUTS, ids="".join)
@pytest.mark.parametrize("name", sorted(FACTORED))
def test_nothing_is_built_for_what_is_only_moved(
    name: str, axes: tuple[str, str], axis: int, check: bool, mesh: jax.sharding.Mesh
) -> None:
    fn = sharded(COLLECTIVES[name], mesh, axis, check=check)
    cut = on(mesh, TREES[axes, False], P(*("d" if i == axis else None for i in range(2))))
    x = jax.device_put(X, NamedSharding(mesh, P()))
    report = lora_jax.explain(fn, cut, x)
    assert {use.how for target in report.targets for use in target.uses} <= {"factored", "dense"}


# --- placement ---------------------------------------------------------------------------------


def test_a_weight_goes_to_another_device_with_its_factors() -> None:
    wrapped = jax.device_put(TREES[("in", "out"), True], jax.devices()[0])
    x = jax.device_put(X, jax.devices()[1])

    def fn(params: Any, x: jax.Array) -> jax.Array:
        return x @ jax.device_put(params["W"], jax.devices()[1])

    actual = lora_jax.adapt(fn)(wrapped, x)
    assert actual.devices() == {jax.devices()[1]}
    assert_agree(actual, X @ np.asarray(lora_jax.merge(wrapped)["W"]))


@pytest.mark.parametrize("where", ["memory", "sharding"])
def test_a_weight_comes_out_of_the_hosts_memory_with_its_factors(where: str) -> None:
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    host = NamedSharding(mesh, P(None, "d"), memory_kind="pinned_host")
    device = host.with_memory_kind("device")
    wrapped = TREES[("in", "out"), False]
    node = wrapped["W"]
    node = dataclasses.replace(
        jax.device_put(node, NamedSharding(mesh, P(), memory_kind="pinned_host")),
        base=jax.device_put(node.base, host),
    )
    target = device if where == "sharding" else jax.memory.Space.Device

    def fn(params: Any, x: jax.Array) -> jax.Array:
        return x @ jax.device_put(params["W"], target)

    x = jax.device_put(X, NamedSharding(mesh, P()))
    actual = jax.jit(lora_jax.adapt(fn))({"W": node}, x)
    assert_agree(actual, X @ np.asarray(lora_jax.merge(wrapped)["W"]))
