"""The tree that tests of saved adapters share."""

import pytest

import lora_jax
from tests.checkpoint.trees import a_dict
from tests.trained import as_if_trained


@pytest.fixture
def params():
    return a_dict()


@pytest.fixture
def wrapped(params):
    return as_if_trained(lora_jax.wrap(params, "kernel", rank=2, alpha=6))


@pytest.fixture
def saved(tmp_path, wrapped):
    lora_jax.save(tmp_path / "adapters", wrapped)
    return tmp_path / "adapters"
