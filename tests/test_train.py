"""Labels, the two halves of a wrapped tree, and the optimiser."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import lora_jax

KEY = jax.random.key(2)
FROZEN = "frozen"


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(KEY, seed), shape)


@pytest.fixture(autouse=True)
def standard_promotion() -> Iterator[None]:
    """Optax raises a rate to the power of an integer count, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


PARAMS = {
    "first": {"kernel": random(8, 8), "bias": random(8, seed=1)},
    "second": {"kernel": random(8, 3, seed=2), "bias": random(3, seed=3)},
}
X, Y = random(16, 8, seed=4), random(16, 3, seed=5)


def model(params: Any, x: jax.Array) -> jax.Array:
    h = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    return h @ params["second"]["kernel"] + params["second"]["bias"]


def loss(wrapped: Any) -> jax.Array:
    return jnp.mean((lora_jax.adapt(model)(wrapped, X) - Y) ** 2)


def wrapped_params(**options: Any) -> Any:
    return lora_jax.wrap(PARAMS, "kernel", rank=2, train="second/bias", key=KEY, **options)


def test_labels_of_every_kind_of_node() -> None:
    found = lora_jax.labels({**wrapped_params(), "none": None, "step": jnp.ones((), jnp.int32)})
    assert found["first"]["kernel"] == lora_jax.LoRAWeight(
        base=FROZEN, lora_A="lora_A", lora_B="lora_B", scale=FROZEN, axes=("in", "out")
    )
    assert found["second"]["bias"] == lora_jax.FullWeight(base=FROZEN, value="full")
    assert (found["first"]["bias"], found["none"], found["step"]) == (FROZEN, None, FROZEN)


def test_labels_have_the_structure_of_the_tree() -> None:
    wrapped = wrapped_params()
    assert jax.tree.structure(lora_jax.labels(wrapped)) == jax.tree.structure(wrapped)


def test_plain_params_are_frozen() -> None:
    assert set(jax.tree.leaves(lora_jax.labels(PARAMS))) == {FROZEN}


# --- the two halves ----------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: Any
    bias: Any


TREES: dict[str, Callable[[], Any]] = {
    "dict": wrapped_params,
    "None leaves": lambda: {**wrapped_params(), "none": None, "deep": {"none": [None, None]}},
    "integers": lambda: {**wrapped_params(), "step": jnp.ones((), jnp.int32), "size": 3},
    "keys": lambda: {**wrapped_params(), "key": KEY},
    "list and tuple": lambda: [wrapped_params(), (PARAMS, wrapped_params())],
    "dataclass": lambda: lora_jax.wrap(Layer(random(4, 4), None), "kernel", rank=2),
    "one node": lambda: lora_jax.wrap(random(4, 4), lambda path, leaf: True, rank=2),
    "nothing trains": lambda: PARAMS,
    "empty": dict,
}


@pytest.fixture(params=TREES.values(), ids=TREES)
def tree(request: pytest.FixtureRequest) -> Any:
    return request.param()


def test_combining_the_halves_gives_the_tree(tree: Any) -> None:
    combined = lora_jax.combine(*lora_jax.split(tree))
    assert jax.tree.structure(combined) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(combined), jax.tree.leaves(tree), strict=True):
        assert a is b


def test_the_halves_share_no_leaf(tree: Any) -> None:
    adapters, frozen = lora_jax.split(tree)
    labels = jax.tree.leaves(lora_jax.labels(tree))
    trainable = [
        x for x, label in zip(jax.tree.leaves(tree), labels, strict=True) if label != FROZEN
    ]
    assert [id(x) for x in jax.tree.leaves(adapters)] == [id(x) for x in trainable]
    assert len(jax.tree.leaves(frozen)) == len(labels) - len(trainable)


def other_axes() -> Any:
    axes = {"kernel": ("out", "in")}
    return lora_jax.wrap(PARAMS, "kernel", rank=2, axes=axes, train="second/bias")


@pytest.mark.parametrize(
    "halves",
    [
        lambda a, f: (a, lora_jax.split({"other": PARAMS})[1]),
        lambda a, f: (a, lora_jax.split(PARAMS)[1]),
        lambda a, f: (a, lora_jax.split(other_axes())[1]),
        lambda a, f: (a, a),
        lambda a, f: (f, f),
    ],
    ids=["another tree", "plain", "other axes", "adapters twice", "frozen twice"],
)
def test_what_are_no_halves_of_one_tree_raises(halves: Callable[[Any, Any], Any]) -> None:
    with pytest.raises(ValueError, match=r"(?s)`adapters`.*`frozen`"):
        lora_jax.combine(*halves(*lora_jax.split(wrapped_params())))


# --- the optimiser -----------------------------------------------------------------------------


def trained(tx: optax.GradientTransformation, wrapped: Any, steps: int = 3) -> tuple[Any, Any]:
    @jax.jit
    def step(wrapped: Any, state: Any) -> tuple[Any, Any]:
        updates, state = tx.update(jax.grad(loss)(wrapped), state, wrapped)
        return optax.apply_updates(wrapped, updates), state

    state = tx.init(wrapped)
    for _ in range(steps):
        wrapped, state = step(wrapped, state)
    return wrapped, state


def same_bits(a: Any, b: Any) -> bool:
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def changed(before: Any, after: Any) -> set[str]:
    """Returns the labels of the leaves that are not what they were."""
    different = jax.tree.map(lambda a, b: not same_bits(a, b), before, after)
    pairs = zip(jax.tree.leaves(lora_jax.labels(before)), jax.tree.leaves(different), strict=True)
    return {label for label, is_different in pairs if is_different}


def schedule() -> Any:
    return optax.warmup_cosine_decay_schedule(1e-3, 1e-2, 2, 10)


def multi_steps() -> Any:
    return optax.MultiSteps(optax.sgd(1e-1), 2).gradient_transformation()


TRANSFORMATIONS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: optax.sgd(1e-1),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "schedule": lambda: optax.adam(schedule()),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.sgd)(learning_rate=1e-1),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0)),
    "MultiSteps": multi_steps,
}


@pytest.mark.parametrize("make", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
def test_adapters_train_and_frozen_bits_stay(make: Callable[[], Any]) -> None:
    wrapped = wrapped_params()
    after, _ = trained(lora_jax.optimizer(make()), wrapped, steps=4)
    assert changed(wrapped, after) == {"lora_A", "lora_B", "full"}
    assert loss(after) < loss(wrapped)


def test_the_whole_transformation_in_multi_steps() -> None:
    wrapped = wrapped_params()
    tx = optax.MultiSteps(lora_jax.optimizer(optax.sgd(1e-1)), 2).gradient_transformation()
    assert changed(wrapped, trained(tx, wrapped, steps=1)[0]) == set()
    assert changed(wrapped, trained(tx, wrapped, steps=4)[0]) == {"lora_A", "lora_B", "full"}


def array_bytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree) if x.ndim)


def test_the_state_is_for_what_trains() -> None:
    wrapped = wrapped_params()
    state = lora_jax.optimizer(optax.adam(1e-3)).init(wrapped)
    assert array_bytes(state) == 2 * lora_jax.count_parameters(wrapped).trainable_bytes


@pytest.mark.parametrize(
    "tx", [optax.adam(1e-3), {"lora_A": optax.adam(1e-3)}, {}], ids=["one", "mapping", "none"]
)
def test_a_tree_in_which_nothing_trains_raises(tx: Any) -> None:
    with pytest.raises(ValueError, match="nothing trains.*not with plain params"):
        lora_jax.optimizer(tx).init(PARAMS)


def test_each_label_may_have_a_rate_of_its_own() -> None:
    wrapped = wrapped_params(init="gaussian")
    tx = lora_jax.optimizer({"lora_A": optax.sgd(1.0), "lora_B": optax.sgd(16.0)})
    gradients = jax.tree.map(jnp.ones_like, wrapped)
    updates, _ = tx.update(gradients, tx.init(wrapped), wrapped)
    expected = {"lora_A": -1.0, "lora_B": -16.0, "full": 0.0, FROZEN: 0.0}
    jax.tree.map(
        lambda label, update: np.testing.assert_array_equal(update, expected[label]),
        lora_jax.labels(wrapped),
        updates,
    )
    # No state for what the mapping leaves out.
    assert array_bytes(lora_jax.optimizer({"lora_A": optax.adam(1.0)}).init(wrapped)) == sum(
        2 * wrapped[layer]["kernel"].lora_A.nbytes for layer in ("first", "second")
    )


@pytest.mark.parametrize("label", [FROZEN, "lora_C", "trainable", "base"])
def test_an_unknown_label_raises(label: str) -> None:
    with pytest.raises(ValueError, match=f"`tx` has the labels '{label}'; expected 'lora_A'"):
        lora_jax.optimizer({"lora_A": optax.sgd(1.0), label: optax.sgd(1.0)})


@pytest.mark.parametrize("tx", [1e-3, None, "adam"])
def test_what_is_no_transformation_raises(tx: Any) -> None:
    with pytest.raises(TypeError, match="`tx` is"):
        lora_jax.optimizer(tx)


def test_a_global_norm_is_over_all_that_trains_and_nothing_else() -> None:
    wrapped = wrapped_params()
    tx = lora_jax.optimizer(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)))
    gradients = jax.tree.map(lambda x: 10 * jnp.ones_like(x), wrapped)
    updates, _ = tx.update(gradients, tx.init(wrapped), wrapped)
    count = lora_jax.count_parameters(wrapped).trainable
    for update in jax.tree.leaves(lora_jax.split(updates)[0]):
        np.testing.assert_allclose(update, -1 / np.sqrt(count), rtol=1e-5)


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3)(nn.relu(nn.Dense(8)(x)))


def test_a_flax_train_state() -> None:
    network = Mlp()
    params = network.init(KEY, X)["params"]
    wrapped = lora_jax.wrap(params, "kernel", rank=2)
    state = TrainState.create(
        apply_fn=lora_jax.adapt(network.apply),
        params=wrapped,
        tx=lora_jax.optimizer(optax.adam(1e-2)),
    )

    @jax.jit
    def step(state: TrainState) -> tuple[TrainState, jax.Array]:
        def loss_of(params: Any) -> jax.Array:
            return jnp.mean((state.apply_fn({"params": params}, X) - Y) ** 2)

        value, gradients = jax.value_and_grad(loss_of)(state.params)
        return state.apply_gradients(grads=gradients), value

    losses = []
    for _ in range(20):
        state, value = step(state)
        losses.append(float(value))
    assert losses[-1] < 0.95 * losses[0]
    assert changed(wrapped, state.params) == {"lora_A", "lora_B"}
    assert int(state.step) == 20


def test_any_optimiser_on_the_adapters_alone() -> None:
    """With `split`, a transformation that knows nothing of adapters is safe."""
    adapters, frozen = lora_jax.split(wrapped_params())
    tx = optax.adamw(1e-2, weight_decay=1.0)
    gradients = jax.grad(lambda a: loss(lora_jax.combine(a, frozen)))(adapters)
    updates, _ = tx.update(gradients, tx.init(adapters), adapters)
    after = lora_jax.combine(optax.apply_updates(adapters, updates), frozen)
    assert changed(wrapped_params(), after) <= {"lora_A", "lora_B", "full"}
