"""One training loop serves full training and adapters, at the cost that each should have."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from experiments.common.training import cross_entropy, train, training_step
from experiments.data.batches import epoch_batches
from experiments.mnist.network import NETWORK, initial_params, normalised


def batches_of(split, epochs=4):
    return epoch_batches(split, batch_size=6, epochs=epochs, random=np.random.default_rng(0))


def trained(apply_fn, params, tx, split, console):
    batches = batches_of(split)
    return train(apply_fn, params, tx, batches, console=console, description="Training")


def bytes_of(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.fixture
def params(small_network, small_split):
    return small_network.init(jax.random.key(0), small_split.inputs[:1])["params"]


def test_full_training_learns_and_leaves_the_given_params_alone(
    small_network, small_split, params, console
):
    before = bytes_of(params)
    found = trained(small_network.apply, params, optax.adam(1e-2), small_split, console)
    assert found.losses.shape == (40,)
    assert found.losses[-5:].mean() < 0.7 * found.losses[:5].mean()
    assert bytes_of(params) == before


def test_adapters_learn_and_all_else_stays_bit_for_bit(small_network, small_split, params, console):
    wrapped = lora_jax.wrap(params, "hidden_.", rank=4, train="output/bias")
    adapted, tx = lora_jax.adapt(small_network.apply), lora_jax.optimizer(optax.adam(2e-2))
    found = trained(adapted, wrapped, tx, small_split, console)
    assert found.losses[-5:].mean() < found.losses[:5].mean()
    assert bytes_of(lora_jax.unwrap(found.params)) == bytes_of(params)
    moved = jax.tree.map(
        lambda label, old, new: (label != "frozen", not np.array_equal(old, new)),
        lora_jax.labels(wrapped),
        wrapped,
        found.params,
    )
    assert all(trains == moves for trains, moves in jax.tree.leaves(moved, is_leaf=_is_pair))


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_adapters_beside_a_quantised_base_learn(small_network, small_split, params, console, name):
    quantized = lora_jax.quantize(params, "hidden_./kernel", format=name)
    wrapped = lora_jax.wrap(quantized, "hidden_./kernel", rank=4)
    adapted, tx = lora_jax.adapt(small_network.apply), lora_jax.optimizer(optax.adam(2e-2))
    found = trained(adapted, wrapped, tx, small_split, console)
    assert found.losses[-5:].mean() < found.losses[:5].mean()
    assert bytes_of(lora_jax.unwrap(found.params)) == bytes_of(quantized)


def _is_pair(node):
    return isinstance(node, tuple)


def test_the_same_batches_give_the_same_numbers(small_network, small_split, params, console):
    first, second = (
        trained(small_network.apply, params, optax.adam(1e-2), small_split, console)
        for _ in range(2)
    )
    assert bytes_of(first.params) == bytes_of(second.params)
    assert first.losses.tobytes() == second.losses.tobytes()


@pytest.fixture(scope="module")
def mnist_params():
    return initial_params(seed=0)


def compiled_costs(step, *arguments):
    """Returns the FLOPs, bytes accessed and temporary bytes of the compiled step."""
    compiled = step.lower(*arguments).compile()
    cost = compiled.cost_analysis()
    return cost["flops"], cost["bytes accessed"], compiled.memory_analysis().temp_size_in_bytes


def step_by_hand(adapters, state, params, scale, images, labels):
    """The step as one would write it for this network alone."""
    tx = optax.adam(1e-3)

    def loss_of(adapters):
        x = normalised(images)
        for name in ("hidden_1", "hidden_2", "output"):
            A, B = adapters[name]
            x = x @ params[name]["kernel"] + scale * ((x @ A) @ B) + params[name]["bias"]
            if name != "output":
                x = jax.nn.relu(x)
        return cross_entropy(x, labels)

    loss, gradients = jax.value_and_grad(loss_of)(adapters)
    updates, state = tx.update(gradients, state, adapters)
    return optax.apply_updates(adapters, updates), state, loss


def test_a_lora_step_costs_no_more_than_one_written_by_hand(mnist_params):
    images, labels = np.zeros((10, 784), np.uint8), np.zeros(10, np.int32)
    wrapped = lora_jax.wrap(mnist_params, ".*", rank=1)
    tx = lora_jax.optimizer(optax.adam(1e-3))
    step = training_step(lora_jax.adapt(NETWORK.apply), tx)
    flops, accessed, temporary = compiled_costs(step, wrapped, tx.init(wrapped), images, labels)

    adapters = {
        name: (layer["kernel"].lora_A, layer["kernel"].lora_B) for name, layer in wrapped.items()
    }
    by_hand = compiled_costs(
        jax.jit(step_by_hand, donate_argnums=(0, 1)),
        adapters,
        optax.adam(1e-3).init(adapters),
        mnist_params,
        jnp.float32(1),
        images,
        labels,
    )
    assert flops <= by_hand[0]
    assert accessed <= 1.02 * by_hand[1]
    assert temporary <= 1.05 * by_hand[2]


def test_the_frozen_weights_pass_through_in_place(mnist_params):
    images, labels = np.zeros((10, 784), np.uint8), np.zeros(10, np.int32)
    wrapped = lora_jax.wrap(mnist_params, ".*", rank=1)
    tx = lora_jax.optimizer(optax.adam(1e-3))
    step = training_step(lora_jax.adapt(NETWORK.apply), tx)
    memory = step.lower(wrapped, tx.init(wrapped), images, labels).compile().memory_analysis()
    base_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(mnist_params))
    assert memory.alias_size_in_bytes >= base_bytes
