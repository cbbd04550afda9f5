"""Wrapped trees in files that others write: exported functions, Flax's msgpack, Orbax."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState

import lora_jax
from tests.agreement import assert_identical


def array(*shape: int, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {
    "kernel": array(6, 4, seed=0),
    "stack": [array(3, 4, 4, seed=1)],
    "head": (array(4, 2, seed=2), array(2, seed=3)),
}
X = array(5, 6, seed=4)


def apply(params: Any, x: jax.Array) -> jax.Array:
    x = x @ params["kernel"]
    x, _ = jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, params["stack"][0])
    weight, bias = params["head"]
    return x @ weight + bias[None]


SETTINGS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DoRA": {"dora": True},
    "an initialiser that moves the base": {"init": "pissa"},
    "a frozen factor": {"freeze": "lora_A"},
    "bfloat16": {"dtype": jnp.bfloat16},
}


def wrapped_params(**options: Any) -> Any:
    targets = {"kernel": {}, "stack": {"layers": (0, 2)}}
    axes = {"stack/0": ("batch", "in", "out")}
    return lora_jax.wrap(PARAMS, targets, rank=2, axes=axes, train="head/1", **options)


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS)
def wrapped(request: pytest.FixtureRequest) -> Any:
    return wrapped_params(**request.param)


# --- exported functions ------------------------------------------------------------------------


def test_an_exported_function_takes_a_wrapped_tree(wrapped: Any) -> None:
    function = jax.jit(lora_jax.adapt(apply))
    written = jax.export.export(function)(wrapped, X).serialize()
    read = jax.export.deserialize(written)
    assert read.in_tree == jax.tree.structure(((wrapped, X), {}))
    np.testing.assert_array_equal(read.call(wrapped, X), function(wrapped, X))


def test_an_exported_step_for_any_batch_returns_a_wrapped_tree() -> None:
    wrapped, tx = wrapped_params(), lora_jax.optimizer(optax.sgd(0.1, momentum=0.9))

    def step(wrapped: Any, x: jax.Array) -> Any:
        gradients = jax.grad(lambda wrapped: jnp.sum(lora_jax.adapt(apply)(wrapped, x)))(wrapped)
        updates, _ = tx.update(gradients, tx.init(wrapped), wrapped)
        return optax.apply_updates(wrapped, updates)

    (size,) = jax.export.symbolic_shape("n")
    batch = jax.ShapeDtypeStruct((size, 6), jnp.float32)
    exported = jax.export.export(jax.jit(step))(wrapped, batch)
    read = jax.export.deserialize(exported.serialize())
    assert_identical(read.call(wrapped, X), exported.call(wrapped, X))


# --- Flax ---------------------------------------------------------------------------------------


def test_flax_reads_the_bytes_that_it_wrote(wrapped: Any) -> None:
    written = flax.serialization.to_bytes(wrapped)
    target = jax.tree.map(jnp.zeros_like, wrapped)
    assert_identical(flax.serialization.from_bytes(target, written), wrapped)


def test_flax_names_the_leaves_as_their_paths_do() -> None:
    state = flax.serialization.to_state_dict(wrapped_params())
    assert set(state["kernel"]) == {"base", "lora_A", "lora_B", "scale"}
    assert set(state["head"]["1"]) == {"base", "value"}


def test_either_half_by_itself() -> None:
    for half in lora_jax.split(wrapped_params()):
        written = flax.serialization.to_bytes(half)
        assert_identical(
            flax.serialization.from_bytes(jax.tree.map(jnp.zeros_like, half), written), half
        )


def test_a_train_state() -> None:
    tx = lora_jax.optimizer(optax.sgd(0.1, momentum=0.9))
    state = TrainState.create(apply_fn=lora_jax.adapt(apply), params=wrapped_params(), tx=tx)
    state = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, state.params))
    target = TrainState.create(apply_fn=state.apply_fn, params=wrapped_params(), tx=tx)
    read = flax.serialization.from_bytes(target, flax.serialization.to_bytes(state))
    assert_identical((read.params, read.opt_state), (state.params, state.opt_state))


def test_a_target_of_other_settings_raises() -> None:
    written = flax.serialization.to_bytes(wrapped_params(dora=True))
    with pytest.raises(ValueError, match=r"LoRAWeight at '\./kernel'.* read has .*'magnitude'"):
        flax.serialization.from_bytes(wrapped_params(), written)


def test_flax_may_be_imported_after_the_library() -> None:
    code = """
import jax, jax.numpy as jnp, lora_jax, sys
wrapped = lora_jax.wrap({"kernel": jnp.ones((4, 3))}, "kernel", rank=2)
assert "flax" not in sys.modules
from flax import serialization
wrapped = jax.tree.map(lambda x: x + 1, wrapped)
read = serialization.from_bytes(wrapped, serialization.to_bytes(wrapped))
assert (read["kernel"].base == 2).all()
"""
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root
    )
    assert done.returncode == 0, done.stderr


def test_moments_of_inputs() -> None:
    moments = lora_jax.init.input_moments(apply, PARAMS, [X], targets="kernel")
    target = jax.tree.map(jnp.zeros_like, moments)
    written = flax.serialization.to_bytes(moments)
    assert_identical(flax.serialization.from_bytes(target, written), moments)
    doubled = jax.jit(lambda moments: jax.tree.map(lambda x: 2 * x, moments))
    read = jax.export.deserialize(jax.export.export(doubled)(moments).serialize())
    assert_identical(read.call(moments), doubled(moments))


# --- Orbax --------------------------------------------------------------------------------------


def test_orbax_keeps_a_whole_tree(wrapped: Any, tmp_path: Path) -> None:
    """Files of everything, beside those of `lora_jax.save`, which hold the adapters alone."""
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, wrapped)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "tree", wrapped)
        checkpointer.wait_until_finished()
        assert_identical(checkpointer.restore(tmp_path / "tree", abstract), wrapped)
