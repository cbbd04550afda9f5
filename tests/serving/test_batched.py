"""`serving.adapt`: each example with its own adapter equals a loop, at the cost of one base."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from benchmarks.models import MLP, SCANNED_TRANSFORMER
from benchmarks.programs import Cost, base_function, wrapped_params
from tests.agreement import assert_agree
from tests.arrays import random
from tests.jaxprs import equations
from tests.serving.models import (
    BATCH,
    CONVOLUTION,
    DENSE,
    HEADS,
    MODELS,
    SCANNED,
    Model,
    as_if_trained,
    one_by_one,
)

IDS = [0, 2, -1, 1, 1, 2, -1]
KINDS: dict[str, list[dict[str, Any]]] = {
    "ranks and scales": [{"rank": 1}, {"rank": 3, "alpha": 1.0}, {"rank": 2, "rslora": True}],
    "dora": [{"dora": True}, {"dora": True, "rank": 1}, {"dora": True, "alpha": 9.0}],
    "changed bases": [{}, {"init": "pissa"}, {"init": "olora", "rank": 1}],
    "dora on a changed base": [{"dora": True, "init": "pissa"}] * 3,
}


def of(wrappeds: list[Any], params: Any, ids: list[int]) -> list[Any]:
    """Returns each example's adapter, which is none for -1."""
    return [params if place == -1 else wrappeds[place] for place in ids]


def adapters(model: Model, kind: str) -> list[Any]:
    return [model.adapter(seed, **options) for seed, options in enumerate(KINDS[kind])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_batch_is_a_loop(model: Model, kind: str) -> None:
    wrappeds = adapters(model, kind)
    bank = lora_jax.serving.bank(wrappeds, capacity=5)
    serve = jax.jit(lora_jax.serving.adapt(model.fn, on_materialize="error"))
    actual = serve(bank, jnp.array(IDS), model.x)
    expected = one_by_one(model, of(wrappeds, model.params, IDS), model.x)
    assert_agree(actual, expected)


@pytest.mark.parametrize(
    "choices", [[(0,), (2,), (0, 2)], [None, (1,), (0, 1)], [(1,), (1,), (1,)]], ids=str
)
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_of_some_layers(choices: list[Any], dora: bool) -> None:
    wrappeds = [
        SCANNED.adapter(seed, layers=layers, dora=dora) for seed, layers in enumerate(choices)
    ]
    bank = lora_jax.serving.bank(wrappeds)
    union = {layer for layers in choices for layer in layers or range(3)}
    assert bank["W"].lora_A.shape == (3, len(union), 10, 2)
    actual = jax.jit(lora_jax.serving.adapt(SCANNED.fn))(bank, jnp.array(IDS), SCANNED.x)
    expected = one_by_one(SCANNED, of(wrappeds, SCANNED.params, IDS), SCANNED.x)
    assert_agree(actual, expected)


@pytest.mark.parametrize("kind", ["ranks and scales", "dora"])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_minus_one_and_unknown_ids_are_the_base(model: Model, kind: str) -> None:
    bank = lora_jax.serving.bank(adapters(model, kind), capacity=4)
    ids = jnp.array([-1, -2, 3, 4, 5, 1000, -1000])
    serve = jax.jit(lora_jax.serving.adapt(model.fn))
    actual = serve(bank, ids, model.x)
    np.testing.assert_array_equal(actual, serve(bank, jnp.full(BATCH, -1), model.x))
    assert_agree(actual, model.fn(model.params, model.x))


def test_what_one_adapter_diverged_to_reaches_no_other_example() -> None:
    bank = lora_jax.serving.bank([DENSE.adapter(0), DENSE.adapter(1)])
    serve = jax.jit(lora_jax.serving.adapt(DENSE.fn))
    expected = serve(bank, jnp.array(IDS) % 2 - 1, DENSE.x)
    poisoned = jax.tree.map(
        lambda label, leaf: leaf.at[1].set(jnp.nan) if label == "lora_B" else leaf,
        lora_jax.labels(bank),
        bank,
    )
    np.testing.assert_array_equal(serve(poisoned, jnp.array(IDS) % 2 - 1, DENSE.x), expected)


@pytest.mark.parametrize("base", [jnp.bfloat16, jnp.float16])
def test_half_precision_bases_keep_their_dtype(base: Any) -> None:
    params = {name: leaf.astype(base) for name, leaf in DENSE.params.items()}
    wrapped = lora_jax.wrap(params, "W.*", rank=2)
    wrappeds = [as_if_trained(wrapped, seed) for seed in range(2)]
    x = DENSE.x[:3].astype(base)
    outputs = jax.jit(lora_jax.serving.adapt(DENSE.fn))(
        lora_jax.serving.bank(wrappeds), [0, 1, -1], x
    )
    assert outputs.dtype == base
    expected = one_by_one(DENSE, [*wrappeds, params], x)
    assert_agree(outputs, expected, tolerance=4 * float(jnp.finfo(base).eps))


def test_arguments_axes_flags_and_keywords() -> None:
    def fn(params, inputs, mode, *, temperature):
        assert mode == "sum"
        time_first = inputs["x"] @ params["W1"]
        return {"y": time_first / temperature + inputs["offset"]}

    wrappeds = [DENSE.adapter(seed) for seed in range(2)]
    bank = lora_jax.serving.bank(wrappeds)
    inputs = {
        "x": random(4, 3, 12, seed=1),
        "offset": jnp.arange(27.0).reshape(1, 3, 9),
    }
    batched = lora_jax.serving.adapt(fn, in_axes=1, out_axes=1)
    outputs = batched(bank, np.array([1, 0, -1]), inputs, "sum", temperature=2.0)["y"]
    assert outputs.shape == (4, 3, 9)
    for place, tree in enumerate([wrappeds[1], wrappeds[0], DENSE.params]):
        single = jax.tree.map(lambda leaf, place=place: leaf[:, place : place + 1], inputs)
        expected = fn(lora_jax.merge(tree), single, "sum", temperature=2.0)["y"][:, 0]
        assert_agree(outputs[:, place], expected)


def test_an_argument_that_all_examples_share() -> None:
    bank = lora_jax.serving.bank([DENSE.adapter(0)])
    batched = lora_jax.serving.adapt(
        lambda params, x, shift: DENSE.fn(params, x + jnp.broadcast_to(shift, x.shape)),
        in_axes=(0, None),
    )
    shift = jnp.arange(12.0)
    actual = batched(bank, [0] * BATCH, DENSE.x, shift)
    expected = lora_jax.serving.adapt(DENSE.fn)(bank, [0] * BATCH, DENSE.x + shift[None])
    assert_agree(actual, expected)


# --- what it costs -----------------------------------------------------------------------------


def stacked_shapes(model: Any, count: int) -> Any:
    """Returns the shapes of a bank of adapters of a model of which there are shapes only."""

    def in_slots(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype)

    def bank_of(node: Any) -> Any:
        if not isinstance(node, lora_jax.LoRAWeight):
            return node
        numbers = {name: in_slots(getattr(node, name)) for name in ("lora_A", "lora_B", "scale")}
        return lora_jax.LoRABank(base=node.base, axes=node.axes, **numbers)

    return jax.tree.map(
        bank_of,
        wrapped_params(model),
        is_leaf=lambda node: isinstance(node, lora_jax.LoRAWeight),
    )


def factor_flops(bank: Any, examples: int, uses: int) -> float:
    """Returns the operations on factors when each is applied to `uses` rows of each example."""
    nodes = jax.tree.leaves(bank, is_leaf=lambda node: isinstance(node, lora_jax.LoRABank))
    sizes = [
        node.lora_A.size / node.scale.size + node.lora_B.size / node.scale.size
        for node in nodes
        if isinstance(node, lora_jax.LoRABank)
    ]
    return 2.0 * examples * uses * sum(sizes)


@pytest.mark.parametrize("count", [1, 8, 64])
@pytest.mark.usefixtures("optimised", "promoted_ranks")
def test_the_base_is_multiplied_once_for_the_whole_batch(count: int) -> None:
    examples = 64
    x = jax.ShapeDtypeStruct((examples, 784), jnp.float32)
    bank, ids = stacked_shapes(MLP, count), jax.ShapeDtypeStruct((examples,), jnp.int32)
    serve = lora_jax.serving.adapt(base_function(MLP), on_materialize="error")
    lowered = jax.jit(serve).lower(bank, ids, x)
    for shape in ("784x1000", "1000x2000", "2000x10"):
        assert len(re.findall(rf"dot_general.*tensor<{shape}xf32>\) ->", lowered.as_text())) == 1
        assert f"tensor<{examples}x{shape}xf32>" not in lowered.as_text()
    base = Cost.of(jax.jit(base_function(MLP)).lower(MLP.params, x).compile()).flops
    flops = Cost.of(lowered.compile()).flops
    # The factors' products, and choosing them by id, which counts as one operation a number.
    assert flops <= base + 3 * factor_flops(bank, examples, 1)
    assert flops <= 1.02 * base


def test_no_example_has_a_weight_of_its_own() -> None:
    """However many rows an example has, the weight is not built for each adapter."""
    rows, examples = jax.ShapeDtypeStruct((4, 512, 24), jnp.float32), 4

    def fn(params: Any, x: Any) -> Any:
        return x @ params["W"]

    shapes = {"W": jax.ShapeDtypeStruct((24, 20), jnp.float32)}
    wrapped = lora_jax.wrap(shapes, "W", rank=2)
    alone = lora_jax.explain(fn, wrapped, rows)
    assert [use.how for target in alone.targets for use in target.uses] == ["merged"]
    bank = jax.eval_shape(lambda tree: lora_jax.serving.bank([tree] * 3), wrapped)
    ids = jax.ShapeDtypeStruct((examples,), jnp.int32)
    text = jax.jit(lora_jax.serving.adapt(fn)).lower(bank, ids, rows).as_text()
    assert f"tensor<{examples}x24x20xf32>" not in text


@pytest.mark.usefixtures("optimised", "promoted_ranks")
def test_the_base_of_a_scanned_transformer_is_multiplied_once() -> None:
    model = SCANNED_TRANSFORMER
    bank = stacked_shapes(model, 8)
    ids = jax.ShapeDtypeStruct(model.inputs.shape[:1], jnp.int32)
    serve = lora_jax.serving.adapt(base_function(model), on_materialize="error")
    compiled = jax.jit(serve).lower(bank, ids, model.inputs).compile()
    adapted = lora_jax.adapt(base_function(model))
    single = jax.jit(adapted).lower(wrapped_params(model), model.inputs).compile()
    assert Cost.of(compiled).flops <= 1.02 * Cost.of(single).flops


def tanh_layers(params: Any, x: jax.Array) -> jax.Array:
    def layer(h: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(h @ weight), None

    return jax.lax.scan(layer, x, params["W"])[0]


def stack_of_layers(count: int) -> tuple[Any, jax.Array, int]:
    """Returns a bank of a stack of layers, ids, and the bytes of a batch's factors in one layer."""
    shapes = {"W": jax.ShapeDtypeStruct((count, 256, 256), jnp.float32)}
    wrapped = lora_jax.wrap(shapes, "W", rank=8, axes={"W": ("batch", "in", "out")})
    bank = jax.eval_shape(lambda tree: lora_jax.serving.bank([tree] * 16), wrapped)
    ids = jnp.arange(16)
    return bank, ids, len(ids) * 2 * 256 * 8 * 4


@pytest.mark.usefixtures("optimised")
def test_a_loop_reads_the_factors_of_one_layer_at_a_time() -> None:
    x = jax.ShapeDtypeStruct((16, 4, 256), jnp.float32)
    bank, ids, layer_bytes = stack_of_layers(12)
    served = jax.jit(lora_jax.serving.adapt(tanh_layers)).lower(bank, ids, x).compile()
    base = jax.jit(tanh_layers).lower({"W": bank["W"].base}, x).compile()
    more = Cost.of(served).temporary_bytes - Cost.of(base).temporary_bytes
    assert more <= 2.5 * layer_bytes


def test_the_gradient_of_a_bank_is_made_once_for_all_layers() -> None:
    """A loop that added to the gradient of the bank would read all of it for each layer."""
    bank, ids, _ = stack_of_layers(12)
    adapters, frozen = lora_jax.split(bank)

    def loss(adapters: Any, x: jax.Array) -> jax.Array:
        served = lora_jax.serving.adapt(tanh_layers)
        return jnp.sum(served(lora_jax.combine(adapters, frozen), ids, x))

    x = jax.ShapeDtypeStruct((16, 4, 256), jnp.float32)
    gradient = jax.make_jaxpr(jax.grad(loss))(adapters, x)
    loops = list(equations(gradient.jaxpr, "scan"))
    assert len(loops) == 2
    inside = [
        output.aval.size
        for loop in loops
        for equation in equations(loop.params["jaxpr"].jaxpr)
        for output in equation.outvars
    ]
    assert max(inside) < bank["W"].lora_A.size


@pytest.mark.usefixtures("optimised", "promoted_ranks")
def test_norms_of_dora_are_not_computed_in_the_call() -> None:
    params = {"W1": jnp.ones((256, 256)), "W2": jnp.ones((256, 256)), "b": jnp.zeros(256)}
    x = jnp.ones((32, 256))
    ids = jnp.zeros(32, jnp.int32)
    flops = [
        Cost.of(
            jax.jit(lora_jax.serving.adapt(DENSE.fn))
            .lower(lora_jax.serving.bank([lora_jax.wrap(params, "W.*", rank=4, dora=dora)]), ids, x)
            .compile()
        ).flops
        for dora in (False, True)
    ]
    assert flops[1] <= 1.05 * flops[0]


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [[0, 1, 7], [0, -2, 1], [0, 1, 2]], ids=str)
def test_unknown_ids_are_errors_where_they_can_be_seen(ids: list[int]) -> None:
    bank = lora_jax.serving.bank([DENSE.adapter(0), DENSE.adapter(1)], capacity=3)
    unknown = next(each for each in ids if each not in (0, 1))
    with pytest.raises(
        ValueError, match=rf"no adapter with the id {unknown}; expected one of 0, 1"
    ):
        lora_jax.serving.adapt(DENSE.fn)(bank, ids, DENSE.x[:3])


def test_ids_that_are_no_ids() -> None:
    bank = lora_jax.serving.bank([DENSE.adapter(0)])
    batched = lora_jax.serving.adapt(DENSE.fn)
    with pytest.raises(TypeError, match="`ids` has the dtype float32; expected whole numbers"):
        batched(bank, jnp.zeros(BATCH), DENSE.x)
    with pytest.raises(ValueError, match=r"`ids` has the shape \(\); .*select"):
        batched(bank, 0, DENSE.x)


def test_arguments_that_do_not_fit() -> None:
    bank = lora_jax.serving.bank([DENSE.adapter(0)])
    with pytest.raises(ValueError, match=r"args\[0\] after `ids` has the shape \(7, 12\); .*2 ex"):
        lora_jax.serving.adapt(DENSE.fn)(bank, [0, 0], DENSE.x)
    with pytest.raises(ValueError, match="`in_axes` has 2 entries, and 1 arguments"):
        lora_jax.serving.adapt(DENSE.fn, in_axes=(0, 0))(bank, [0] * BATCH, DENSE.x)
    with pytest.raises(ValueError, match=r"`fn` returned an array of shape \(\)"):
        lora_jax.serving.adapt(lambda params, x: jnp.sum(x @ params["W1"]))(
            bank, [0] * BATCH, DENSE.x
        )


def test_one_adapter_is_not_a_bank_and_a_bank_is_not_one() -> None:
    wrapped = HEADS.adapter(0)
    with pytest.raises(ValueError, match="`bank` is not a bank of adapters"):
        lora_jax.serving.adapt(HEADS.fn)(wrapped, [0] * BATCH, HEADS.x)
    with pytest.raises(ValueError, match="`bank` is not a bank of adapters"):
        lora_jax.serving.adapt(HEADS.fn)(HEADS.params, [0] * BATCH, HEADS.x)
    with pytest.raises(ValueError, match="'W1' holds 2 adapters; expected one. serving.adapt"):
        lora_jax.adapt(HEADS.fn)(lora_jax.serving.bank([wrapped] * 2), HEADS.x)


def test_what_builds_the_weight_says_so() -> None:
    bank = lora_jax.serving.bank([CONVOLUTION.adapter(0)])
    fn = lambda params, x: CONVOLUTION.fn({"W": jnp.sin(params["W"])}, x)  # noqa: E731
    with pytest.warns(lora_jax.MaterializationWarning, match="'W'|W"):
        lora_jax.serving.adapt(fn)(bank, [0] * BATCH, CONVOLUTION.x)
    with pytest.raises(lora_jax.MaterializationError):
        lora_jax.serving.adapt(fn, on_materialize="error")(bank, [0] * BATCH, CONVOLUTION.x)
