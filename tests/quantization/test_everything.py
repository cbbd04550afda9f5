"""What works on a tree of arrays works on a quantised one, and gives what it gives on the arrays.

Each case is a function of params. The reference is the same call on `dequantize(params)`.
"""

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import flax.linen
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import lora_jax
from lora_jax.exchange import peft
from lora_jax.quantization import dequantize
from tests.agreement import assert_agree
from tests.arrays import random
from tests.quantization.network import (
    AXES,
    FORMATS,
    KEY,
    PARAMS,
    TARGETS,
    TOKENS,
    model,
    quantized,
    wrapped,
)
from tests.trained import as_if_trained


@jax.jit
def outputs(wrapped: Any) -> jax.Array:
    return lora_jax.adapt(model)(wrapped, TOKENS)


@jax.jit
def outputs_and_gradients(wrapped: Any) -> Any:
    adapters, frozen = lora_jax.split(wrapped)

    def loss(adapters: Any) -> tuple[jax.Array, jax.Array]:
        found = outputs(lora_jax.combine(adapters, frozen))
        return jnp.sum(found**2), found

    gradients, found = jax.grad(loss, has_aux=True)(adapters)
    return found, jax.tree.leaves(gradients)


in_batch = jax.jit(lora_jax.serving.adapt(model))


def trains(params: Any, **options: Any) -> Any:
    tree = wrapped(params, **options)
    return outputs_and_gradients(tree), lora_jax.merge(tree)


def some_layers(params: Any, **options: Any) -> Any:
    return trains(params, targets="layers/w|experts", layers=[0, 2], **options)


def with_dropout(params: Any) -> Any:
    fn = jax.jit(lora_jax.adapt(model, dropout=0.3))
    return fn(wrapped(params), TOKENS, lora_key=KEY)


def a_bank(params: Any, **options: Any) -> Any:
    """Makes a bank, changes it, and computes with its adapters in one batch and one by one."""
    serving = lora_jax.serving
    bank = serving.bank([wrapped(params, seed, **options) for seed in (1, 2)], capacity=4)
    bank, added = serving.add(bank, wrapped(params, 3, **options))
    bank = serving.replace(bank, wrapped(params, 4, **options), adapter_id=1)
    together = in_batch(bank, jnp.array([added, -1]), TOKENS)
    alone = [outputs(serving.select(bank, each)) for each in (0, 1, added)]
    removed = in_batch(serving.remove(bank, 0), jnp.array([1, added]), TOKENS)
    return together, alone, removed, lora_jax.merge(serving.select(bank, 1))


def several_at_once(params: Any) -> Any:
    bank = lora_jax.serving.bank([wrapped(params, seed) for seed in (1, 2)])
    return outputs(lora_jax.serving.activate(bank, jnp.array([0.3, 0.7])))


def blended(params: Any, method: str) -> Any:
    trees = [wrapped(params, seed) for seed in (1, 2)]
    return outputs(lora_jax.arithmetic.blend(trees, [0.4, 0.6], method))


def resized(params: Any, rank: int, **options: Any) -> Any:
    return outputs(lora_jax.arithmetic.resize(wrapped(params, **options), rank))


def extracted(params: Any) -> Any:
    tuned = lora_jax.merge(wrapped(dequantize(params)))
    return outputs(lora_jax.arithmetic.extract(params, tuned, TARGETS, rank=3, axes=AXES))


def stepped(params: Any, tx: Any) -> Any:
    """Takes two steps over the whole tree, of which only the adapters may move."""
    tree = wrapped(params, train="layers/b")
    before, tx = lora_jax.unwrap(tree), lora_jax.optimizer(tx)
    state = tx.init(tree)

    @jax.jit
    def step(tree: Any, state: Any) -> tuple[Any, Any]:
        gradient = jax.grad(lambda tree: jnp.mean(outputs(tree) ** 2), allow_int=True)(tree)
        updates, state = tx.update(gradient, state, tree)
        return optax.apply_updates(tree, updates), state

    for _ in range(2):
        tree, state = step(tree, state)
    jax.tree.map(np.testing.assert_array_equal, lora_jax.unwrap(tree), before)
    return outputs(tree)


def moments(params: Any) -> Any:
    targets = "layers/w|experts|conv|head"
    return lora_jax.init.input_moments(model, params, [TOKENS], targets=targets, axes=AXES)


def with_data(params: Any, name: str) -> Any:
    init = getattr(lora_jax.init, name)
    data = gradient_of_all(dequantize(params)) if name == "lora_ga" else moments(params)
    targets = "layers/w|experts|conv" if name == "lora_ga" else list(data)
    tree = lora_jax.wrap(params, targets, axes=AXES, rank=3, init=init(data))
    # Singular vectors have signs; the product of the factors has none.
    return [jnp.abs(node.lora_A).sum(-2) for node in nodes(tree)]


@jax.jit
def gradient_of_all(params: Any) -> Any:
    return jax.grad(lambda params: jnp.sum(model(params, TOKENS) ** 2))(params)


def nodes(tree: Any) -> list[lora_jax.LoRAWeight]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, lora_jax.LoRAWeight))
    return [leaf for leaf in leaves if isinstance(leaf, lora_jax.LoRAWeight)]


def exported(params: Any) -> Any:
    tree = wrapped(params)
    written = jax.export.export(jax.jit(lora_jax.adapt(model)))(tree, TOKENS).serialize()
    return jax.export.deserialize(written).call(tree, TOKENS)


def counts(params: Any) -> Any:
    found = lora_jax.count_parameters(wrapped(params, train="layers/b"))
    return np.array([found.original, found.added, found.trainable, found.total])


CASES: dict[str, Callable[[Any], Any]] = {
    "no adapter": outputs,
    "lora": trains,
    "dora": functools.partial(trains, dora=True),
    "mica": functools.partial(trains, init="mica"),
    "some layers": some_layers,
    "some layers, dora": functools.partial(some_layers, dora=True),
    "beside what trains": functools.partial(trains, targets="head|conv", train="layers/b"),
    "dropout": with_dropout,
    "bank": a_bank,
    "bank, dora": functools.partial(a_bank, dora=True),
    "several at once": several_at_once,
    "blend cat": functools.partial(blended, method="cat"),
    "blend svd": functools.partial(blended, method="svd"),
    "blend linear": functools.partial(blended, method="linear"),
    "resize up": functools.partial(resized, rank=5),
    "resize up, dora": functools.partial(resized, rank=5, dora=True),
    "resize down": functools.partial(resized, rank=2),
    "extract": extracted,
    "adam": functools.partial(stepped, tx=optax.sgd(0.1, momentum=0.9)),
    "riemannian": functools.partial(
        stepped, tx=optax.chain(lora_jax.updates.riemannian(), optax.sgd(0.1))
    ),
    "lora_plus": functools.partial(
        stepped, tx=optax.chain(optax.sgd(0.01), lora_jax.updates.lora_plus())
    ),
    "lora_fa": functools.partial(stepped, tx=lora_jax.updates.lora_fa(optax.sgd(0.1))),
    "moments": moments,
    "eva": functools.partial(with_data, name="eva"),
    "corda": functools.partial(with_data, name="corda"),
    "export": exported,
    "counts": counts,
}
# Eigenvectors and decompositions of products that nearly cancel.
LOOSE = {"eva": 1e-3, "corda": 5e-2, "resize down": 1e-4, "extract": 1e-3, "blend svd": 1e-4}


# The battery runs every op with every format; here one format shows what a task does with codes.
OTHER_FORMATS = [(form, "lora") for form in FORMATS[1:]] + [("int8", "dora"), ("int8", "bank")]


@pytest.mark.parametrize(("form", "name"), [*(("nf4", name) for name in CASES), *OTHER_FORMATS])
def test_it_is_what_it_is_on_arrays(form: str, name: str) -> None:
    params = quantized(form)
    expected = dequantize(CASES[name](dequantize(params)))
    assert_agree(dequantize(CASES[name](params)), expected, tolerance=LOOSE.get(name, 2e-5))


@pytest.mark.parametrize("init", ["pissa", "olora", "lora_ga", "corda"])
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_the_residual_is_quantised_again(form: str, init: str) -> None:
    """An initialiser that moves a part P of the weight leaves q(W - P), and starts at the sum."""
    params = quantized(form)
    made: Any = init
    if init == "lora_ga":
        made = lora_jax.init.lora_ga(gradient_of_all(dequantize(params)), gamma=1.0)
    elif init == "corda":
        made = lora_jax.init.corda(moments(params))
    targets = "layers/w|experts|conv"
    tree = lora_jax.wrap(params, targets, axes=AXES, rank=3, init=made)
    merged = lora_jax.merge(tree)
    for path, weight in (
        ("conv", params["conv"]),
        ("experts", params["experts"]),
        ("layers/w", params["layers"]["w"]),
    ):
        node = tree["layers"]["w"] if path == "layers/w" else tree[path]
        original = np.asarray(weight.dequantize(), np.float64)
        moved = np.asarray(node.initial_A, np.float64) @ flat(node.initial_B)
        left = jnp.asarray(original - moved.reshape(original.shape), jnp.float32)
        again = lora_jax.quantize({"w": left}, "w", format=form, axes={"w": AXES[path]})["w"]
        assert jax.tree.structure(node.base) == jax.tree.structure(weight)
        # What lies between two codes may get either.
        assert_agree(node.base.dequantize(), again.dequantize(), tolerance=2e-2)
        value = merged["layers"]["w"] if path == "layers/w" else merged[path]
        start = np.asarray(node.base.dequantize(), np.float64) + moved.reshape(original.shape)
        assert_agree(value, start)
        back = lora_jax.unwrap(tree)
        found = back["layers"]["w"] if path == "layers/w" else back[path]
        assert jax.tree.structure(found) == jax.tree.structure(weight)


def flat(lora_B: Any) -> np.ndarray:
    return np.asarray(lora_B, np.float64)


def test_what_the_function_does_with_them_is_seen() -> None:
    params = quantized()
    arrays = lora_jax.infer_axes(model, dequantize(params), TOKENS)
    for tree in (params, jax.eval_shape(lambda: params)):
        inferred = lora_jax.infer_axes(model, tree, TOKENS)
        assert dict(inferred) == dict(arrays)
        assert inferred.uses == arrays.uses
    everything = lora_jax.wrap(params, "all-linear", axes=arrays, rank=2)
    assert isinstance(everything["head"], lora_jax.LoRAWeight)
    tree = wrapped(params)
    report, of_arrays = (
        lora_jax.explain(model, each, TOKENS) for each in (tree, wrapped(dequantize(params)))
    )
    assert {target.format for target in report.targets} == {"nf4"}
    assert {target.format for target in of_arrays.targets} == {None}
    assert "(8, 5) nf4" in str(report)
    assert report.added_flops == of_arrays.added_flops


@pytest.mark.parametrize("form", FORMATS)
def test_numbers_count_weights_and_bytes_count_codes(form: str) -> None:
    params = lora_jax.quantize({"w": random(640, 64)}, "w", format=form)
    tree = lora_jax.wrap(params, "w", rank=1)
    found = lora_jax.count_parameters(tree)
    assert (found.original, found.added) == (640 * 64, 640 + 64)
    bits = {"nf4": 4 + (8 + 32 / 256) / 64, "int8": 8 + 32 / 64, "int4": 4 + 32 / 64}
    expected = bits.get(form, 8 + 32 / 640)
    stored = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(params))
    # The mean that is taken out of the scales is 32 bits for the whole weight.
    assert stored == pytest.approx(expected * 640 * 64 / 8, abs=8)
    assert found.total_bytes == stored + 4 * (640 + 64)
    assert f"{form}, {8 * stored / (640 * 64):.2f} bits" in lora_jax.summary(tree)
    assert "bits" not in lora_jax.summary(lora_jax.wrap(dequantize(params), "w", rank=1))


def test_training_a_quantised_weight_in_full_is_refused() -> None:
    with pytest.raises(ValueError, match=r"it is quantised as nf4, and steps are smaller"):
        lora_jax.wrap(quantized(), "head", rank=2, train="embed")
    tree = lora_jax.wrap(quantized(), "head", rank=2, train="layers")
    assert isinstance(tree["layers"]["b"], lora_jax.FullWeight)
    assert isinstance(tree["layers"]["w"], lora_jax.QuantizedWeight)


SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
    "some layers": {"targets": "layers/w", "layers": [1]},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_checkpoints_of_adapters(tmp_path: Any, name: str) -> None:
    params = quantized()
    tree = wrapped(params, **SETTINGS[name])
    lora_jax.save(tmp_path / "saved", tree)
    restored = lora_jax.restore(tmp_path / "saved", params)
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, restored, tree)
    other = quantized(params=jax.tree.map(lambda leaf: leaf * 1.5, PARAMS))
    with pytest.raises(lora_jax.CheckpointError, match="belongs to another base"):
        lora_jax.restore(tmp_path / "saved", other)
    for recast, came in ((quantized("int8"), "int8"), (PARAMS, "float32")):
        with pytest.warns(lora_jax.BaseMismatchWarning, match=f"in nf4, and `params` has {came}"):
            lora_jax.restore(tmp_path / "saved", recast)


@pytest.mark.parametrize("init", ["kaiming", "pissa", "loftq", lora_jax.init.loftq(steps=2)])
def test_checkpoints_of_training(tmp_path: Any, init: Any) -> None:
    params = quantized() if init in ("kaiming", "pissa") else PARAMS
    fresh = lora_jax.wrap(params, TARGETS, axes=AXES, rank=3, init=init)
    tree, tx = as_if_trained(fresh), lora_jax.optimizer(optax.sgd(0.1, momentum=0.9))
    state = jax.tree.map(lambda leaf: leaf + 1, tx.init(tree))
    with lora_jax.checkpoint.TrainingCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree, state)
        restored = checkpoints.restore(fresh, tx.init(fresh))
        jax.tree.map(np.testing.assert_array_equal, restored.wrapped, tree)
        jax.tree.map(np.testing.assert_array_equal, restored.optimizer_state, state)
        others = quantized(params=jax.tree.map(lambda leaf: leaf * 1.5, PARAMS))
        other = lora_jax.wrap(others, TARGETS, axes=AXES, rank=3)
        with pytest.raises(lora_jax.CheckpointError):
            checkpoints.restore(other, tx.init(other))


@pytest.mark.parametrize("settings", [{}, {"dora": True}])
def test_files_of_peft(tmp_path: Any, settings: dict[str, Any]) -> None:
    params = {"a": {"kernel": random(64, 12)}, "b": {"kernel": random(12, 20)}}
    params = lora_jax.quantize(params, "kernel")
    tree = as_if_trained(lora_jax.wrap(params, "kernel", rank=3, **settings))
    rules = [peft.Rule("{module:.+}.weight", "{module:.+}/kernel")]
    peft.save(tmp_path / "adapter", tree, names=rules)
    loaded = peft.load(tmp_path / "adapter", params, names=rules)
    for path in params:
        for name in ("lora_A", "lora_B", "magnitude"):
            left, right = (getattr(each[path]["kernel"], name) for each in (loaded, tree))
            if left is not None:
                np.testing.assert_array_equal(left, right)
        assert_agree(lora_jax.merge(loaded)[path], lora_jax.merge(tree)[path], tolerance=1e-6)


def test_they_are_written_and_copied_like_any_tree() -> None:
    params = quantized()
    tree = wrapped(params)
    for again in (pickle.loads(pickle.dumps(tree)), copy.deepcopy(tree)):
        assert jax.tree.structure(again) == jax.tree.structure(tree)
        jax.tree.map(np.testing.assert_array_equal, again, tree)
    assert copy.copy(params["head"]).codes is params["head"].codes
    tx = lora_jax.optimizer(optax.sgd(0.1, momentum=0.9))
    state = TrainState.create(apply_fn=lora_jax.adapt(model), params=tree, tx=tx)
    read = flax.serialization.from_bytes(state, flax.serialization.to_bytes(state))
    jax.tree.map(np.testing.assert_array_equal, read.params, tree)


def test_containers_of_libraries() -> None:
    import equinox
    from flax import nnx

    x = random(2, 12)

    class Network(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.layer = nnx.Linear(12, 5, use_bias=False, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.layer(x)

    graph, state = nnx.split(Network(nnx.Rngs(0)))
    linen = flax.linen.Dense(5, use_bias=False)
    module = equinox.nn.Linear(12, 5, use_bias=False, key=KEY)
    axes = {"weight": ("out", "in")}
    for fn, params, targets, roles in (
        (lambda state, x: nnx.merge(graph, state)(x), state, "kernel", None),
        (linen.apply, linen.init(KEY, x), "kernel", None),
        (lambda module, x: jax.vmap(module)(x), module, "weight", axes),
    ):
        tree = lora_jax.quantize(params, targets, axes=roles)
        assert_agree(lora_jax.adapt(fn)(tree, x), fn(dequantize(tree), x))
        adapted = as_if_trained(lora_jax.wrap(tree, targets, axes=roles, rank=2))
        assert_agree(lora_jax.adapt(fn)(adapted, x), fn(lora_jax.merge(adapted), x))
        again = lora_jax.unwrap(adapted)
        assert jax.tree.structure(again) == jax.tree.structure(tree)
