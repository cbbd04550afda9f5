"""Shardings of wrapped trees: by rules, from the weights, concrete and abstract."""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import sharding
from tests.agreement import assert_identical
from tests.arrays import random

RULES = {"kernel": P("x", "y"), "stack": P(None, "y", "x")}
AXES = {"stack": ("batch", "out", "in")}


@pytest.fixture(params=["automatic", "explicit"])
def mesh(request: pytest.FixtureRequest) -> Any:
    kind = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}[request.param]
    return jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind,) * 2)


def params() -> Any:
    return {
        "kernel": random(8, 16),
        "stack": random(3, 8, 4),
        "bias": random(16),
        "count": jnp.array(3),
    }


def wrapped(tree: Any, **options: Any) -> Any:
    return lora_jax.wrap(tree, "kernel|stack", **{"rank": 2, "axes": AXES, **options})


def cut(tree: Any, mesh: Any) -> Any:
    return jax.device_put(tree, sharding.of(tree, mesh, rules=RULES))


def specs(tree: Any) -> Any:
    """Returns what cuts each axis, without the axes at the end that nothing cuts."""

    def of_leaf(leaf: Any) -> tuple[Any, ...]:
        spec = tuple((leaf if isinstance(leaf, NamedSharding) else leaf.sharding).spec)
        while spec and spec[-1] is None:
            spec = spec[:-1]
        return spec

    return jax.tree.map(of_leaf, tree)


def test_what_is_beside_a_weight_follows_it(mesh: Any) -> None:
    found = sharding.of(wrapped(params(), dora=True, train="bias"), mesh, rules=RULES)
    kernel, stack = specs(found["kernel"]), specs(found["stack"])
    assert (kernel.base, kernel.lora_A, kernel.lora_B) == (("x", "y"), ("x",), (None, "y"))
    assert (kernel.magnitude, kernel.squared_norm, kernel.scale) == (("y",), ("y",), ())
    assert (stack.base, stack.lora_A, stack.lora_B) == (
        (None, "y", "x"),
        (None, "x"),
        (None, None, "y"),
    )
    assert specs(found["bias"]).value == specs(found["count"]) == ()


SETTINGS: dict[str, dict[str, Any]] = {
    "kaiming": {},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
    "loftq": {"init": "loftq"},
    "some layers, in full": {"layers": [1], "targets": "stack", "train": "bias"},
}


@pytest.mark.parametrize("form", [None, "nf4", "int8"])
@pytest.mark.parametrize("name", SETTINGS)
def test_shapes_are_wrapped_as_arrays_are(mesh: Any, name: str, form: str | None) -> None:
    """The same leaves, cut in the same way; and `of` says of arrays where `wrap` put them."""

    def made(tree: Any) -> Any:
        if form is not None:
            tree = lora_jax.quantize(tree, "kernel|stack", format=form, block=4, axes=AXES)
        options = {"targets": "kernel|stack", "rank": 2, "axes": AXES, **SETTINGS[name]}
        return lora_jax.wrap(tree, options.pop("targets"), **options)

    tree = cut(params(), mesh)
    concrete = made(tree)
    # Without a context: the mesh may be one of another machine.
    abstract = made(sharding.abstract(tree))
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), t) for t in (abstract, concrete)]
    assert shapes[0] == shapes[1]
    assert specs(abstract) == specs(sharding.of(abstract)) == specs(sharding.of(concrete))
    for leaf, found in zip(jax.tree.leaves(concrete), jax.tree.leaves(abstract), strict=True):
        # A scale is on one device, and not committed to it, until a program moves it.
        if leaf.ndim:
            assert leaf.sharding.is_equivalent_to(found.sharding, leaf.ndim)


def test_a_bank(mesh: Any) -> None:
    bank = lora_jax.serving.bank([wrapped(cut(params(), mesh), dora=True)] * 2, capacity=3)
    found = specs(sharding.of(bank)["kernel"])
    assert (found.lora_A, found.lora_B) == ((None, "x"), (None, None, "y"))
    assert found.magnitude == found.norm == (None, "y")
    assert (found.squared_norm, found.scale) == (("y",), ())
    placed = jax.device_put(bank, sharding.of(bank))
    ids, x = jnp.array([0, 1, -1, 0]), random(4, 8)
    apply = jax.jit(lora_jax.serving.adapt(lambda tree, x: jnp.tanh(x @ tree["kernel"])))
    with jax.set_mesh(mesh):
        rows = jax.device_put(x, NamedSharding(mesh, P()))
        found = apply(placed, ids, rows)
    assert_close(found, apply_alone(bank, ids, x))


def apply_alone(bank: Any, ids: Any, x: Any) -> Any:
    # From an explicit mesh onto one device, JAX 0.10 keeps the mesh in the array's type.
    bank = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), bank)
    return jnp.stack(
        [
            jnp.tanh(x[i] @ np.asarray(lora_jax.merge(each)["kernel"]))
            for i, each in enumerate(lora_jax.serving.select(bank, int(j)) for j in ids)
        ]
    )


def assert_close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-5, atol=1e-6)


def test_adapters_on_adapters(mesh: Any) -> None:
    inner = wrapped(cut(params(), mesh))
    outer = lora_jax.LoRAWeight(
        inner["kernel"], random(8, 3), random(3, 16), jnp.ones(()), ("in", "out")
    )
    found = specs(sharding.of({"kernel": outer})["kernel"])
    assert (found.lora_A, found.base.lora_A, found.base.base) == (("x",), ("x",), ("x", "y"))
    own = {"kernel/lora_A": P(), "kernel/base/lora_B": P()}
    found = specs(sharding.of({"kernel": outer}, mesh, rules=own)["kernel"])
    assert (found.lora_A, found.lora_B, found.base.lora_B) == ((), (None, "y"), ())


class Scaled(NamedTuple):
    """A quantised array as another library has it."""

    codes: Any
    scale: Any
    shape = property(lambda self: self.codes.shape)


def test_arrays_of_other_libraries(mesh: Any) -> None:
    """Their parts stay as they are, and the factors beside them are whole."""
    foreign = Scaled(jnp.ones((8, 16), jnp.int8), jnp.ones((1, 16)))
    declared = lora_jax.quantization.declare(
        {"kernel": foreign}, Scaled, dequantize=lambda x: x.codes.astype(jnp.float32) * x.scale
    )
    tree = lora_jax.wrap(declared, "kernel", rank=2)
    found = sharding.of(tree, mesh)
    assert {str(spec) for spec in jax.tree.leaves(specs(found)["kernel"], is_leaf=is_spec)} == {
        "()"
    }
    jax.device_put(tree, found)
    with pytest.raises(ValueError, match="'kernel', a quantised array of another library"):
        sharding.of(tree, mesh, rules={"kernel": P("x")})


def is_spec(leaf: Any) -> bool:
    return isinstance(leaf, tuple) and not isinstance(leaf, Scaled)


def test_rules_for_factors_alone(mesh: Any) -> None:
    tree = wrapped(cut(params(), mesh))
    found = specs(sharding.of(tree, rules={"lora_A|lora_B": P()}))
    assert found["kernel"].base == ("x", "y")
    assert found["kernel"].lora_A == found["kernel"].lora_B == ()
    # The first rule that matches counts.
    with pytest.raises(ValueError, match=r"`rules` gives 'stack/lora_B' of shape \(3, 2, 8\)"):
        sharding.of(tree, rules={"stack/lora_B": P("y"), "lora_A|lora_B": P()})
    found = specs(sharding.of(tree, rules={"stack/lora_B": P(None, "x"), "lora_A|lora_B": P()}))
    assert found["stack"].lora_B == (None, "x")


def test_halves(mesh: Any) -> None:
    tree = wrapped(cut(params(), mesh))
    adapters, frozen = lora_jax.split(sharding.of(tree))
    assert specs(adapters["kernel"].lora_A) == ("x",)
    halves = jax.device_put(lora_jax.split(tree), (adapters, frozen))
    assert_identical(lora_jax.combine(*halves), tree)
    shapes = sharding.abstract(halves[0], adapters)
    assert shapes["kernel"].base is None
    assert shapes["kernel"].lora_B.sharding == adapters["kernel"].lora_B


def test_offloaded_weights_keep_their_memory(mesh: Any) -> None:
    """What trains is where the step computes, whatever memory the base is in."""
    on_host = NamedSharding(mesh, P("x", "y"), memory_kind="pinned_host")
    shapes = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=on_host)
    for kernel in (shapes, jax.device_put(random(8, 16), on_host)):
        tree = {"kernel": kernel, "stack": random(3, 8, 4), "other": kernel}
        made = wrapped(tree, train="other")
        for found in (sharding.of(made), jax.tree.map(lambda leaf: leaf.sharding, made)):
            assert found["kernel"].base.memory_kind == "pinned_host"
            assert found["kernel"].lora_A.memory_kind == "device"
            assert found["other"].base.memory_kind == "pinned_host"
            assert found["other"].value.memory_kind == "device"
        assert made["other"].value is not made["other"].base


def test_logical_axes_of_flax_carry_over(mesh: Any) -> None:
    """Flax makes physical shardings of names; what is wrapped follows them."""
    init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "hidden"))
    model = nn.Dense(16, kernel_init=init)
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 8)))["params"]
    names = nn.get_partition_spec(boxed)
    placed = nn.logical_to_mesh_sharding(names, mesh, [("embed", "x"), ("hidden", "y")])
    tree = lora_jax.wrap(sharding.abstract(nn.unbox(boxed), placed), "kernel", rank=2)
    assert specs(tree["kernel"].lora_A) == ("x",)
    assert specs(tree["kernel"].lora_B) == (None, "y")
    assert specs(sharding.of(tree)["bias"]) == ()


class NnxModel(nnx.Module):
    """A layer that names the axes of its kernel."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "hidden"))
        self.dense = nnx.Linear(8, 16, kernel_init=init, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.dense(x)


@pytest.mark.parametrize("form", ["arrays", "shapes"])
def test_names_of_axes_of_nnx_carry_over(mesh: Any, form: str) -> None:
    """Flax puts parameters on the mesh by the names of their axes; what is wrapped follows them."""
    with jax.set_mesh(mesh), nnx.logical_axis_rules([("embed", "x"), ("hidden", "y")]):
        if form == "arrays":
            state = nnx.state(NnxModel(nnx.Rngs(0)))
        else:
            state = nnx.state(nnx.eval_shape(lambda: NnxModel(nnx.Rngs(0))))
            state = sharding.abstract(state, nnx.get_named_sharding(state, mesh))
    tree = lora_jax.wrap(state, "kernel", rank=2)
    kernel = tree["dense"]["kernel"].get_value()
    assert specs(kernel.lora_A) == ("x",)
    assert specs(kernel.lora_B) == (None, "y")
    assert specs(sharding.of(tree, mesh)["dense"]["bias"].get_value()) == ()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no match": ({"rules": {"kernal": P()}}, "matches no leaf; the nearest paths are 'kernel'"),
    "unknown axis": (
        {"rules": {"kernel": P("z")}},
        "the mesh has no axis 'z'; expected some of 'x', 'y'",
    ),
    "too many axes": ({"rules": {"bias": P("x", "y")}}, r"gives 'bias' of shape \(16,\)"),
    "no divisor": ({"rules": {"stack": P("x")}}, r"gives 'stack' of shape \(3, 8, 4\)"),
    "no expression": ({"rules": {"(": P()}}, "which is not a regular expression"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(mesh: Any, name: str) -> None:
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        sharding.of(wrapped(params()), mesh, **options)


def test_a_mesh_is_needed(mesh: Any) -> None:
    with pytest.raises(ValueError, match="`wrapped` are on no mesh; expected them on one"):
        sharding.of(wrapped(params()))
    other = jax.make_mesh((8,), ("z",))
    tree = {**cut(params(), mesh), "bias": cut_along(other)}
    with pytest.raises(ValueError, match="are on 2 meshes"):
        sharding.of(tree)
    with pytest.raises(ValueError, match="'bias' is cut over 'z' of another mesh"):
        sharding.of(tree, mesh)
    assert specs(sharding.of(tree, mesh, rules={"bias": P("y")})["bias"]) == ("y",)
    smaller = jax.make_mesh((2, 1), ("x", "y"), devices=jax.devices()[:2])
    moved = jax.device_put(tree["kernel"], sharding.of(tree["kernel"], smaller))
    assert specs(moved) == ("x", "y")


def cut_along(mesh: Any) -> Any:
    return jax.device_put(random(16), NamedSharding(mesh, P("z")))


def test_changes_of_a_bank(mesh: Any) -> None:
    serving = lora_jax.serving
    first, second = (trained(wrapped(cut(params(), mesh)), factor) for factor in (0.5, 2.0))
    bank = serving.bank([first, second], capacity=4)
    bank, place = serving.add(bank, second)
    bank = serving.replace(serving.remove(bank, 0), first, adapter_id=1)
    expected = specs(sharding.of(first)["kernel"])
    for each in (serving.select(bank, place), serving.activate(bank, [0.0, 1.0, 0.5, 0.0])):
        found = each["kernel"]
        assert specs(found.lora_A) == expected.lora_A
        assert specs(found.lora_B) == expected.lora_B
    assert_close(
        lora_jax.merge(serving.select(bank, place))["kernel"], lora_jax.merge(second)["kernel"]
    )


def trained(tree: Any, factor: float) -> Any:
    node = tree["kernel"]
    return {**tree, "kernel": dataclasses.replace(node, lora_B=node.lora_B + factor)}
