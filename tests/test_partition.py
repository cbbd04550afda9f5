"""Weights that are cut over a mesh: every partition, on meshes with automatic and explicit axes."""

import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax
from tests.agreement import assert_agree
from tests.trained import as_if_trained

KINDS = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}
SIZES = (8, 4, 12)
# A batch axis in the middle and outputs first: nothing is where a matrix would have it.
AXES = {2: ("in", "out"), 3: ("out", "batch", "in")}


def partitions(ndim: int) -> Iterator[PartitionSpec]:
    """Every way to cut the axes of a weight along two axes of a mesh, which are alike."""
    choices = [*range(ndim), None]
    for x, y in itertools.combinations_with_replacement(choices, 2):
        held = [[name for name, axis in (("x", x), ("y", y)) if axis == own] for own in range(ndim)]
        yield PartitionSpec(*(tuple(names) or None for names in held))


PARTITIONS = [spec for ndim in (2, 3) for spec in partitions(ndim)]
# The inputs of a matrix, twice; a batch axis and the inputs.
SOME_PARTITIONS = [PartitionSpec(("x", "y"), None), PartitionSpec(None, "x", "y")]


@pytest.fixture(params=KINDS)
def mesh(request: pytest.FixtureRequest) -> Any:
    kinds = (KINDS[request.param],) * 2
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=kinds, devices=jax.devices()[:4])


def weight(ndim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=SIZES[:ndim]).astype(np.float32)


def cut(array: Any, mesh: Any, spec: PartitionSpec) -> jax.Array:
    return jax.device_put(array, NamedSharding(mesh, spec))


def wrapped(array: Any, **options: Any) -> Any:
    axes = {"kernel": AXES[array.ndim]}
    return lora_jax.wrap({"kernel": array}, "kernel", **{"rank": 2, "axes": axes, **options})


def as_cuts(spec: Any) -> tuple[Any, ...]:
    return tuple((each,) if isinstance(each, str) else each or None for each in spec)


def cuts(array: Any) -> tuple[Any, ...]:
    """Returns which axes of the mesh cut each axis of an array."""
    spec = (*array.sharding.spec, *(None,) * (array.ndim - len(array.sharding.spec)))
    return as_cuts(spec)


def shared_cuts(spec: PartitionSpec, ndim: int) -> Mapping[str, tuple[Any, ...]]:
    """Returns how the leaves beside a weight must be cut: on the axes that they share with it."""
    by_role = {
        role: tuple(spec[axis] for axis, own in enumerate(AXES[ndim]) if own == role)
        for role in ("batch", "in", "out")
    }
    return {
        "base": tuple(spec),
        "lora_A": (*by_role["batch"], *by_role["in"], None),
        "lora_B": (*by_role["batch"], None, *by_role["out"]),
        "magnitude": (*by_role["batch"], *by_role["out"]),
        "squared_norm": (*by_role["batch"], *by_role["out"]),
    }


def assert_cut(node: lora_jax.LoRAWeight, spec: PartitionSpec) -> None:
    expected = shared_cuts(spec, node.base.ndim)
    held = {name for name in expected if getattr(node, name) is not None}
    assert {name: cuts(getattr(node, name)) for name in held} == {
        name: as_cuts(expected[name]) for name in held
    }


def plain(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


@pytest.mark.parametrize("spec", PARTITIONS, ids=str)
def test_wrap_and_merge_keep_every_partition(mesh: Any, spec: PartitionSpec) -> None:
    original = weight(len(spec))
    tree = wrapped(cut(original, mesh, spec), init="pissa", dora=True)
    assert_cut(tree["kernel"], spec)
    merged, unwrapped = lora_jax.merge(tree)["kernel"], lora_jax.unwrap(tree)["kernel"]
    assert cuts(merged) == cuts(unwrapped) == cuts(tree["kernel"].base)
    assert_agree((plain(merged), plain(unwrapped)), (original, original))


def moments() -> lora_jax.init.InputMoments:
    rows = np.random.default_rng(2).normal(size=(4, 20, SIZES[2])).astype(np.float32)
    second = jnp.asarray(np.einsum("bni,bnj->bij", rows, rows))
    return lora_jax.init.InputMoments(second, jnp.asarray(rows.sum(1)), jnp.full((4,), 20))


def initialisers(array: Any) -> dict[str, Any]:
    """Returns every initialiser; those of data for a weight of three axes."""
    names = ("gaussian", "kaiming", "mica", "olora", "orthogonal", "pissa")
    randomised = functools.partial(lora_jax.init.pissa, power_iterations=2)
    with_data = {
        "eva": lora_jax.init.eva({"kernel": moments()}),
        "corda": lora_jax.init.corda({"kernel": moments()}),
    }
    return {
        **{name: name for name in names},
        "randomised pissa": randomised,
        "lora_ga": lora_jax.init.lora_ga({"kernel": array * 2}),
        **(with_data if array.ndim == 3 else {}),
    }


@pytest.mark.parametrize("name", initialisers(weight(3)))
def test_every_initialiser_gives_what_it_gives_on_one_device(mesh: Any, name: str) -> None:
    spec = PartitionSpec("x", None, "y")
    array = cut(weight(3), mesh, spec)
    tree = wrapped(array, init=initialisers(array)[name])
    assert_cut(tree["kernel"], spec)
    alone = wrapped(weight(3), init=initialisers(weight(3))[name])
    assert_agree(plain(lora_jax.merge(tree)), lora_jax.merge(alone))
    assert_agree(plain(products(tree["kernel"])), products(alone["kernel"]))


def products(node: lora_jax.LoRAWeight) -> Any:
    """Returns what does not depend on the signs that a decomposition leaves open."""
    lora_A, lora_B = plain((node.lora_A, node.lora_B))
    return abs(lora_A), abs(lora_B), np.einsum("bir,bro->bio", lora_A, lora_B)


@pytest.mark.parametrize("spec", SOME_PARTITIONS, ids=str)
class TestAfterTraining:
    def test_everything_else_keeps_the_partition(self, mesh: Any, spec: PartitionSpec) -> None:
        tree = as_if_trained(wrapped(cut(weight(len(spec)), mesh, spec), init="pissa"))
        merged = plain(lora_jax.merge(tree))
        on_original = lora_jax.arithmetic.on_original_base(tree)
        grown, pruned = lora_jax.arithmetic.resize(tree, 3), lora_jax.arithmetic.resize(tree, 1)
        assert_agree(plain(lora_jax.merge(on_original)), merged)
        assert_agree(plain(lora_jax.merge(grown)), merged)
        for each in (on_original, grown, pruned):
            assert_cut(each["kernel"], spec)
        assert pruned["kernel"].rank == 1

    def test_unmerge(self, mesh: Any, spec: PartitionSpec) -> None:
        tree = as_if_trained(wrapped(cut(weight(len(spec)), mesh, spec)))
        back = lora_jax.unmerge(lora_jax.merge(tree), tree)
        assert_cut(back["kernel"], spec)
        assert_agree(plain(back["kernel"].base), weight(len(spec)))

    def test_extract(self, mesh: Any, spec: PartitionSpec) -> None:
        params, tuned = (
            {"kernel": cut(weight(len(spec), seed), mesh, spec), "bias": jnp.full(3, 1.0 * seed)}
            for seed in (0, 1)
        )
        axes = {"kernel": AXES[len(spec)]}
        options = {"axes": axes, "train": "bias"}
        for limit in ({"energy": 1.0}, {"rank": 4 if len(spec) == 2 else 8}):
            tree = lora_jax.arithmetic.extract(params, tuned, "kernel", **options, **limit)
            assert_cut(tree["kernel"], spec)
            assert_agree(plain(lora_jax.merge(tree)), plain(tuned))


def test_a_stack_of_adapters(mesh: Any) -> None:
    spec = PartitionSpec(None, "x", "y")
    adapters = [as_if_trained(wrapped(cut(weight(3), mesh, spec)))] * 2
    bank = lora_jax.arithmetic.resize(lora_jax.serving.bank(adapters, capacity=3), 1)["kernel"]
    expected = shared_cuts(spec, 3)
    assert cuts(bank.lora_A)[1:] == as_cuts(expected["lora_A"])
    assert cuts(bank.lora_B)[1:] == as_cuts(expected["lora_B"])


def test_some_layers_of_a_cut_stack(mesh: Any) -> None:
    """A batch axis that is cut holds fewer places than the mesh has parts of it."""
    spec = PartitionSpec(None, "x", "y")
    tree = as_if_trained(wrapped(cut(weight(3), mesh, spec), layers=[2], init="olora", dora=True))
    node = tree["kernel"]
    assert cuts(node.base) == (None, ("x",), ("y",))
    assert cuts(node.lora_A) == (None, ("y",), None)
    merged = plain(lora_jax.merge(tree)["kernel"])
    np.testing.assert_array_equal(merged[:, [0, 1, 3]], weight(3)[:, [0, 1, 3]])
    assert_agree(plain(lora_jax.unwrap(tree)["kernel"]), weight(3))


def test_under_jit_and_within_a_mesh_context(mesh: Any) -> None:
    spec = PartitionSpec("x", "y")
    array = cut(weight(2), mesh, spec)
    eager = wrapped(array, init="pissa")
    compiled = jax.jit(lambda array: wrapped(array, init="pissa"))(array)
    with jax.set_mesh(mesh):
        in_context = wrapped(array, init="pissa")
        merged = jax.jit(lora_jax.merge)(in_context)
    assert_cut(in_context["kernel"], spec)
    if AxisType.Explicit in mesh.axis_types:
        assert_cut(compiled["kernel"], spec)
    for other in (compiled, in_context):
        assert_agree(plain(lora_jax.merge(other)), plain(lora_jax.merge(eager)))
    assert_agree(plain(merged), {"kernel": weight(2)})


def test_a_mesh_of_both_kinds() -> None:
    kinds = (AxisType.Explicit, AxisType.Auto)
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=kinds, devices=jax.devices()[:4])
    tree = wrapped(cut(weight(2), mesh, PartitionSpec("x", "y")), init="pissa")
    assert cuts(tree["kernel"].lora_A) == (("x",), None)
    assert_agree(plain(lora_jax.merge(tree)), {"kernel": weight(2)})
