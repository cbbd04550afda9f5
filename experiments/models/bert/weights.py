"""The weights in Hugging Face's file, as parameters of the Flax modules."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PRNGKeyArray
from numpy.typing import NDArray

from experiments.common.errors import InputError, needed_module
from experiments.models.bert.config import BertConfig
from experiments.models.bert.model import BertEncoder
from lora_jax.exchange.peft import ready_rules

Params = dict[str, Any]

_RULES = ready_rules("bert", "lora_jax")
# What checkpoints converted from TensorFlow call the weight and the bias of a norm.
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_PREFIX = "bert."
# Parts of Hugging Face's encoder that mean pooling does not need.
_UNUSED = ("pooler.", "embeddings.position_ids")
_NAMES_SHOWN = 3


def huggingface_modules(config: BertConfig) -> dict[str, str]:
    """Returns the name in Hugging Face's encoder of each module with weights, by its path."""
    return {
        "/".join(leaf[:-1]): _huggingface_name(leaf).rpartition(".")[0]
        for leaf in _expected_shapes(config)
    }


def encoder_params(path: Path, config: BertConfig) -> Params:
    """Returns the parameters of `BertEncoder(config)` in a safetensors file, as float32.

    Names may have the prefix `bert.`; tensors without it are then the head of some other task.

    Raises:
      InputError: a tensor is missing, unexpected or of another shape; it is named.
    """
    tensors = _read_tensors(path)
    expected = _expected_shapes(config)
    names = {leaf: _huggingface_name(leaf) for leaf in expected}
    _check_names(path, tensors, names.values())
    return unflatten_dict(
        {
            leaf: _parameter(path, name, tensors[name], leaf[-1], expected[leaf])
            for leaf, name in names.items()
        }
    )


def with_new_head(
    encoder: Params, config: BertConfig, classes: int, *, key: PRNGKeyArray
) -> Params:
    """Returns the parameters of `BertClassifier(config, classes)` with an untrained head."""
    shape = (config.hidden_size, classes)
    kernel = config.initializer_range * jax.random.normal(key, shape, jnp.float32)
    return {"encoder": encoder, "classifier": {"kernel": kernel, "bias": jnp.zeros(classes)}}


def _huggingface_name(leaf: tuple[str, ...]) -> str:
    path = "/".join(leaf)
    found = ((rule, rule.fields_of(path)) for rule in _RULES)
    return next(rule.named(fields) for rule, fields in found if fields is not None)


def _expected_shapes(config: BertConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Returns the shape of each parameter of the encoder, by its path."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 1), jnp.bool_)
    variables = jax.eval_shape(BertEncoder(config).init, jax.random.key(0), tokens, mask)
    leaves = flatten_dict(variables["params"])
    return {leaf: array.shape for leaf, array in leaves.items()}


def _read_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """Returns the encoder's tensors, under the names that files have today."""
    safetensors = needed_module("safetensors", "lora-jax[text]")
    reader = needed_module("safetensors.numpy", "lora-jax[text]")
    try:
        stored = reader.load_file(path)
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is damaged or is not a safetensors file ({error})") from error
    if any(name.startswith(_PREFIX) for name in stored):
        stored = {
            name.removeprefix(_PREFIX): tensor
            for name, tensor in stored.items()
            if name.startswith(_PREFIX)
        }
    return {
        _todays_name(name): tensor
        for name, tensor in stored.items()
        if not name.startswith(_UNUSED)
    }


def _todays_name(name: str) -> str:
    for old, new in _OLD_NAMES.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _check_names(path: Path, tensors: Mapping[str, Any], names: Iterable[str]) -> None:
    missing = sorted(set(names) - set(tensors))
    if missing:
        raise InputError(
            f"{path} lacks {_listed(missing)}, which config.json calls for; expected the weights "
            "of a BERT encoder, their names with or without the prefix `bert.`"
        )
    unexpected = sorted(set(tensors) - set(names))
    if unexpected:
        raise InputError(
            f"{path} has {_listed(unexpected)}, which is not part of the encoder in config.json; "
            "expected the weights of that encoder and nothing else"
        )


def _parameter(
    path: Path, name: str, tensor: NDArray[Any], leaf: str, expected: tuple[int, ...]
) -> NDArray[np.float32]:
    """Returns the tensor as the parameter of this shape: a kernel is (in, out), not (out, in)."""
    is_kernel = leaf == "kernel"
    shape = expected[::-1] if is_kernel else expected
    if tensor.shape != shape:
        raise InputError(
            f"{path}: {name} has shape {tensor.shape}, expected {shape} by config.json"
        )
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise InputError(f"{path}: {name} is {tensor.dtype}, expected floating-point numbers")
    return np.ascontiguousarray(tensor.T if is_kernel else tensor, np.float32)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    more = len(names) - _NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
