"""Adapters as files: made by hand, and read as they are."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax
from lora_jax import CheckpointError
from lora_jax.exchange.peft import Rule, load

PREFIX = "base_model.model."
NAMES = [
    Rule("{module}.weight", "{module:.+}/kernel"),
    Rule("{module}.bias", "{module:.+}/bias"),
]
KERNEL_A, KERNEL_B = "a.q.lora_A.weight", "a.q.lora_B.weight"


def numbers(*shape, start=0):
    """Returns the numbers from `start` on, so that each is another."""
    return np.arange(start, start + np.prod(shape), dtype=np.float32).reshape(shape)


def random_factors(key, weight2d, rank, scale):
    """Initialises both factors at random, and leaves the base alone."""
    inputs, outputs = weight2d.shape
    keys = jax.random.split(key)
    lora_A, lora_B = (
        jax.random.normal(one, shape)
        for one, shape in zip(keys, ((inputs, rank), (rank, outputs)), strict=True)
    )
    return weight2d, lora_A, lora_B


def tensors_of(folder):
    """Returns the tensors of an adapter, without the prefix of their keys."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}


def write_adapter(folder, tensors, **config):
    """Writes an adapter by hand, and returns its folder."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    named = {f"{PREFIX}{key}": np.asarray(tensor, order="C") for key, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return folder


TENSORS = {KERNEL_A: numbers(2, 3), KERNEL_B: numbers(4, 2)}


def params():
    """Returns params that the small adapter of TENSORS fits."""
    return {"a": {"q": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}}


def wrapped(**settings):
    """Returns the params of the small adapter, wrapped."""
    return lora_jax.wrap(params(), "kernel", **{"rank": 2, **settings})


def refused(folder, match, tree=None, names=NAMES, **options):
    """Asserts that `load` raises an error that matches."""
    with pytest.raises(CheckpointError, match=match):
        load(folder, params() if tree is None else tree, names=names, **options)
