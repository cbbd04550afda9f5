"""A scanned transformer on meshes of eight devices: the same numbers, and nothing more is moved."""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import sharding
from tests.agreement import assert_agree
from tests.trained import as_if_trained

LAYERS, EMBED, HIDDEN, HEADS, VOCABULARY = 4, 32, 64, 4, 64
BATCH, LENGTH = 8, 16
AXES = dict.fromkeys(("layers/attention", "layers/mlp"), ("batch", "in", "out"))
TARGETS = "attention|mlp|embedding"

# What cuts a weight: nothing, its inputs, its outputs, both, or the layers.
LAYOUTS: Mapping[str, Mapping[str, P]] = {
    "whole": {},
    "fsdp": {"in": P(None, ("data", "fsdp"), None), "out": P(None, None, ("data", "fsdp"))},
    "tensor": {"in": P(None, None, "tensor"), "out": P(None, "tensor", None)},
    "fsdp and tensor": {"in": P(None, "fsdp", "tensor"), "out": P(None, "tensor", "fsdp")},
    "layers": {"in": P("fsdp", None, "tensor"), "out": P("fsdp", "tensor", None)},
}
REFUSED_BY_JAX = ("layers", "explicit")
KINDS = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}


def rules(layout: str) -> dict[str, P]:
    found = LAYOUTS[layout]
    if not found:
        return {"layers": P()}
    return {
        "attention/(query|key|value)|mlp/up": found["in"],
        "attention/out|mlp/down": found["out"],
    }


@functools.cache
def params() -> Any:
    """Returns arrays of NumPy, which are on no mesh whatever the context."""

    def scaled(*shape: int) -> np.ndarray:
        drawn = np.random.default_rng([7, *shape]).standard_normal(shape, np.float32)
        return drawn / np.float32(math.sqrt(shape[-2]))

    return {
        "embedding": scaled(VOCABULARY, EMBED),
        "layers": {
            "attention": {
                name: scaled(LAYERS, EMBED, EMBED) for name in ("query", "key", "value", "out")
            },
            "mlp": {"up": scaled(LAYERS, EMBED, HIDDEN), "down": scaled(LAYERS, HIDDEN, EMBED)},
        },
    }


TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, LENGTH))


def model(params: Any, tokens: Any, *, explicit: bool = False) -> Any:
    """Returns logits; on explicit axes it says where JAX has no rule of its own."""
    whole = {"out_sharding": P("data", None, None)} if explicit else {}

    def product(x: Any, weight: Any) -> Any:
        return jnp.einsum("bli,io->blo", x, weight, **whole)

    @jax.checkpoint
    def layer(x: Any, own: Any) -> tuple[Any, None]:
        attention = own["attention"]
        query, key, value = (
            product(x, attention[name]).reshape(BATCH, LENGTH, HEADS, -1)
            for name in ("query", "key", "value")
        )
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(EMBED))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(BATCH, LENGTH, EMBED)
        x = x + product(mixed, attention["out"])
        return x + product(jnp.tanh(product(x, own["mlp"]["up"])), own["mlp"]["down"]), None

    x = params["embedding"].at[tokens].get(**whole) if explicit else params["embedding"][tokens]
    x, _ = jax.lax.scan(layer, x, params["layers"])
    return jnp.einsum("bld,vd->blv", x, params["embedding"], **whole)


def loss_and_gradients(fn: Any, tree: Any, tokens: Any) -> Any:
    adapters, frozen = lora_jax.split(tree)

    def loss(adapters: Any) -> Any:
        return jnp.mean(jnp.square(fn(lora_jax.combine(adapters, frozen), tokens)))

    return jax.value_and_grad(loss)(adapters)


def mesh_of(kind: str, shape: tuple[int, ...] = (2, 2, 2)) -> Mesh:
    types = (KINDS[kind],) * 3
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=types, devices=devices)


def on_mesh(layout: str, mesh: Mesh) -> tuple[Any, Any]:
    """Returns the params and a batch on a mesh."""
    placed = jax.device_put(params(), sharding.of(params(), mesh, rules=rules(layout)))
    return placed, jax.device_put(TOKENS, NamedSharding(mesh, P("data")))


def wrapped(tree: Any, **options: Any) -> Any:
    return lora_jax.wrap(tree, TARGETS, rank=2, axes=AXES, **options)


@functools.cache
def alone(*, dora: bool = False) -> Any:
    """Returns what one device computes."""
    tree = as_if_trained(wrapped(params(), dora=dora))
    return jax.device_get(
        jax.jit(functools.partial(loss_and_gradients, lora_jax.adapt(model)))(tree, TOKENS)
    )


# JAX scans over no axis that is cut over an explicit mesh.
LAYOUTS_AND_KINDS = [
    (layout, kind) for layout in LAYOUTS for kind in KINDS if (layout, kind) != REFUSED_BY_JAX
]


@pytest.mark.parametrize(("layout", "kind"), LAYOUTS_AND_KINDS)
@pytest.mark.parametrize("dora", [False, True])
def test_the_step_is_that_of_one_device(layout: str, kind: str, *, dora: bool) -> None:
    """Outputs and gradients agree, and gradients are cut as their factors are."""
    mesh = mesh_of(kind)
    fn = lora_jax.adapt(
        functools.partial(model, explicit=kind == "explicit"), on_materialize="error"
    )
    with jax.set_mesh(mesh):
        placed, tokens = on_mesh(layout, mesh)
        tree = as_if_trained(wrapped(placed, dora=dora))
        shardings = lora_jax.split(sharding.of(tree))[0]
        step = jax.jit(
            functools.partial(loss_and_gradients, fn),
            out_shardings=(NamedSharding(mesh, P()), shardings),
        )
        found = step(tree, tokens)
    assert_agree(jax.device_get(found), alone(dora=dora), tolerance=2e-5 if dora else 1e-5)


def training_step(fn: Any, mesh: Any, tree: Any, tokens: Any) -> Any:
    """Returns a compiled step of Adam on what `split` says trains."""
    adapters, frozen = lora_jax.split(tree)
    shardings = lora_jax.split(sharding.of(tree, mesh))
    optimizer = optax.adam(1e-3)
    of_state = sharding.of_state(optimizer, sharding.abstract(adapters, shardings[0]))
    state = sharding.abstract(jax.eval_shape(optimizer.init, adapters), of_state)

    def step(adapters: Any, state: Any, frozen: Any, tokens: Any) -> Any:
        gradients = jax.grad(
            lambda a: jnp.mean(jnp.square(fn(lora_jax.combine(a, frozen), tokens)))
        )(adapters)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradients, state, adapters)
        return optax.apply_updates(adapters, updates), state

    arguments = (
        sharding.abstract(adapters, shardings[0]),
        state,
        sharding.abstract(frozen, shardings[1]),
        tokens,
    )
    results = (shardings[0], of_state)
    compiled = (
        jax.jit(step, donate_argnums=(0, 1), out_shardings=results).lower(*arguments).compile()
    )
    return compiled, arguments


def shapes_on(layout: str, mesh: Mesh) -> tuple[Any, Any]:
    shapes = jax.eval_shape(params)
    placed = sharding.abstract(shapes, sharding.of(shapes, mesh, rules=rules(layout)))
    where = NamedSharding(mesh, P("data"))
    return placed, jax.ShapeDtypeStruct(TOKENS.shape, jnp.int32, sharding=where)


def gathered(compiled: Any) -> dict[int, int]:
    """Returns how often arrays of so many numbers are gathered, in the text of a program."""
    found: dict[int, int] = {}
    for shape in re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", compiled.as_text()):
        size = math.prod(map(int, shape.split(",")))
        found[size] = found.get(size, 0) + 1
    return found


@pytest.mark.parametrize(
    ("layout", "kind"), [pair for pair in LAYOUTS_AND_KINDS if pair[0] != "whole"]
)
def test_no_weight_is_gathered_that_the_base_model_does_not_gather(layout: str, kind: str) -> None:
    """Against the base model's own step for the gradient of its inputs: the embedding trains."""
    mesh = mesh_of(kind)
    fn = lora_jax.adapt(functools.partial(model, explicit=kind == "explicit"))
    with jax.set_mesh(mesh):
        placed, tokens = shapes_on(layout, mesh)
        lora, _ = training_step(fn, mesh, wrapped(placed), tokens)
        only_embedding = lora_jax.wrap(placed, "embedding", rank=2)
        base, _ = training_step(fn, mesh, only_embedding, tokens)
    weights = {EMBED * EMBED, EMBED * HIDDEN, LAYERS * EMBED * EMBED, LAYERS * EMBED * HIDDEN}
    of_base, of_lora = gathered(base), gathered(lora)
    for size in weights:
        assert of_lora.get(size, 0) <= of_base.get(size, 0), (size, of_lora, of_base)


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_holds_its_part(kind: str) -> None:
    """Adapters, moments and the base: the bytes of a device are the total over the cut."""
    mesh = mesh_of(kind)
    fn = lora_jax.adapt(functools.partial(model, explicit=kind == "explicit"))
    with jax.set_mesh(mesh):
        placed, tokens = shapes_on("fsdp and tensor", mesh)
        tree = lora_jax.wrap(placed, "attention|mlp", rank=2, axes=AXES)
        compiled, arguments = training_step(fn, mesh, tree, tokens)
    adapters, state, frozen, _ = arguments
    # A factor has one of the two axes of its weight that are cut, in two.
    assert device_bytes(adapters) == total_bytes(adapters) / 2
    assert device_bytes(state[0].mu) == device_bytes(state[0].nu) == total_bytes(adapters) / 2
    assert device_bytes(frozen["layers"]) - 6 * 4 == total_bytes(params()["layers"]) / 4
    held = compiled.memory_analysis().argument_size_in_bytes
    assert held == pytest.approx(sum(map(device_bytes, arguments)), abs=64)


def device_bytes(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def total_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_more_devices_hold_less_each() -> None:
    held = []
    for shape in ((1, 1, 1), (1, 2, 1), (1, 2, 2), (1, 4, 2)):
        mesh = mesh_of("automatic", shape)
        with jax.set_mesh(mesh):
            placed, tokens = shapes_on("fsdp and tensor", mesh)
            compiled, _ = training_step(lora_jax.adapt(model), mesh, wrapped(placed), tokens)
        memory = compiled.memory_analysis()
        held.append(memory.argument_size_in_bytes)
    assert held == sorted(held, reverse=True)
    assert held[-1] < held[0] / 2


@pytest.mark.parametrize("kind", KINDS)
def test_wrapping_makes_nothing_of_the_size_of_a_weight(kind: str) -> None:
    """Factors are made where they lie: no device holds a whole one, nor a weight."""
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        placed, _ = on_mesh("fsdp and tensor", mesh)
        tree = wrapped(placed)
    node = tree["layers"]["mlp"]["up"]
    assert {shard.data.shape for shard in node.lora_A.addressable_shards} == {
        (LAYERS, EMBED // 2, 2)
    }
    assert {shard.data.shape for shard in node.lora_B.addressable_shards} == {
        (LAYERS, 2, HIDDEN // 2)
    }
    assert node.base is placed["layers"]["mlp"]["up"]


@pytest.mark.parametrize("kind", KINDS)
def test_merging_stays_in_place(kind: str) -> None:
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        placed, _ = on_mesh("fsdp and tensor", mesh)
        tree = as_if_trained(wrapped(placed))
        merged = lora_jax.merge(tree)
        program = jax.jit(lora_jax.merge).lower(tree).compile()
    for name, weight in merged["layers"]["mlp"].items():
        assert weight.sharding.is_equivalent_to(placed["layers"]["mlp"][name].sharding, 3)
    sizes = {LAYERS * EMBED * EMBED, LAYERS * EMBED * HIDDEN}
    assert not sizes & set(gathered(program))
    expected = lora_jax.merge(as_if_trained(wrapped(params())))
    assert_agree(jax.device_get(merged), jax.device_get(expected))


def test_depth_does_not_change_the_program() -> None:
    """A deeper scanned model is the same program with longer stacks."""
    mesh, counts = mesh_of("automatic"), []
    for layers in (4, 8):
        with jax.set_mesh(mesh):
            placed, tokens = shapes_on("fsdp and tensor", mesh)
            deeper = jax.tree.map(lambda leaf, n=layers: with_layers(leaf, n), placed["layers"])
            tree = lora_jax.wrap({**placed, "layers": deeper}, "attention|mlp", rank=2, axes=AXES)
            compiled, _ = training_step(lora_jax.adapt(model), mesh, tree, tokens)
        counts.append(len(re.findall(r"^  (?:ROOT )?%", compiled.as_text(), re.MULTILINE)))
    assert counts[0] == counts[1]


def with_layers(leaf: jax.ShapeDtypeStruct, count: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype, sharding=leaf.sharding)


def test_offloaded_weights_and_donated_buffers() -> None:
    """A base in host memory that the model moves layer by layer, and adapters that are reused."""
    mesh = mesh_of("automatic")

    def moving(params: Any, tokens: Any) -> Any:
        layers = jax.tree.map(
            lambda leaf: jax.device_put(leaf, jax.memory.Space.Device), params["layers"]
        )
        return model({**params, "layers": layers}, tokens)

    with jax.set_mesh(mesh):
        placed, tokens = on_mesh("fsdp and tensor", mesh)
        hosted = {**placed, "layers": jax.tree.map(on_host, placed["layers"])}
        tree = as_if_trained(wrapped(hosted))
        node = tree["layers"]["mlp"]["up"]
        assert node.base.sharding.memory_kind == "pinned_host"
        assert node.lora_A.sharding.memory_kind == "device"
        fn = lora_jax.adapt(moving, on_materialize="error")
        found = jax.jit(functools.partial(loss_and_gradients, fn))(tree, tokens)
        assert_agree(jax.device_get(found), alone())
        report = lora_jax.explain(moving, tree, tokens)
    assert not report.materialized


def on_host(leaf: jax.Array) -> jax.Array:
    return jax.device_put(leaf, leaf.sharding.with_memory_kind("pinned_host"))


def test_a_donated_step_reuses_its_buffers() -> None:
    mesh = mesh_of("automatic")
    with jax.set_mesh(mesh):
        placed, tokens = shapes_on("fsdp and tensor", mesh)
        compiled, (adapters, state, *_) = training_step(
            lora_jax.adapt(model), mesh, wrapped(placed), tokens
        )
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= device_bytes(adapters) + device_bytes(state) - 64
