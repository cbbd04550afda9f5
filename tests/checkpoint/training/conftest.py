"""The run that tests of training checkpoints share."""

import jax.numpy as jnp
import optax
import pytest

import lora_jax
from lora_jax.checkpoint import TrainingCheckpoints
from tests.checkpoint.training.running import trained_state
from tests.trained import as_if_trained


@pytest.fixture
def params():
    return {
        "encoder": [
            {"kernel": jnp.ones((6, 4)), "bias": jnp.zeros(4)},
            {"kernel": jnp.full((4, 5), 2, jnp.bfloat16), "bias": jnp.ones(5)},
        ],
        "head": jnp.ones((5, 3)),
    }


@pytest.fixture
def fresh(params):
    return lora_jax.wrap(params, "kernel", rank=2, alpha=6, train="head")


@pytest.fixture
def tx():
    return lora_jax.optimizer(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1, 0.9)))


@pytest.fixture
def wrapped(fresh):
    return as_if_trained(fresh)


@pytest.fixture
def state(tx, wrapped):
    return trained_state(tx.init(wrapped))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def saved(folder, wrapped, state):
    """A folder with the steps 2 and 4."""
    with TrainingCheckpoints(folder) as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, wrapped, state, data_position=step)
    return folder
