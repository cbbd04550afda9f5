"""DoRA beside Hugging Face PEFT's: outputs and gradients, from the same numbers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.agreement import assert_agree

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

RANK, ALPHA = 3, 6.0


@dataclasses.dataclass(frozen=True)
class Layer:
    """One kind of layer in both libraries.

    Attributes:
      module: makes PyTorch's layer.
      fn: the same layer of (params, x) here.
      to_kernel: from PyTorch's weight to ours, for the base.
      to_A: from PEFT's lora_A to ours.
      to_B: from PEFT's lora_B to ours.
      axes: the axes of our weight.
      x: an input for PyTorch, and how it is turned into ours.
    """

    module: Callable[[], Any]
    fn: Callable[[Any, jax.Array], jax.Array]
    to_kernel: tuple[int, ...]
    to_A: tuple[int, ...]
    to_B: tuple[int, ...]
    axes: tuple[str, ...]
    x: np.ndarray
    embeds: bool = False


def convolved(params: Any, x: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, params["W"], (2, 2), "VALID", dimension_numbers=("NCHW", "HWIO", "NCHW")
    )


RANDOM = np.random.default_rng(0)
LAYERS = {
    "linear": Layer(
        lambda: torch.nn.Linear(7, 5, bias=False),
        lambda params, x: x @ params["W"],
        (1, 0),
        (1, 0),
        (1, 0),
        ("in", "out"),
        RANDOM.normal(size=(4, 7)).astype(np.float32),
    ),
    "convolution": Layer(
        lambda: torch.nn.Conv2d(4, 6, (3, 2), stride=2, bias=False),
        convolved,
        (2, 3, 1, 0),
        (2, 3, 1, 0),
        (1, 0, 2, 3),
        ("in", "in", "in", "out"),
        RANDOM.normal(size=(2, 4, 7, 6)).astype(np.float32),
    ),
    "embedding": Layer(
        lambda: torch.nn.Embedding(9, 5),
        lambda params, ids: params["W"][ids],
        (0, 1),
        (1, 0),
        (1, 0),
        ("in", "out"),
        RANDOM.integers(0, 9, size=(4, 3)),
        embeds=True,
    ),
}


def peft_model(layer: Layer) -> Any:
    """Returns a PEFT model of one layer with DoRA, all of its numbers drawn at random."""
    torch.manual_seed(0)
    model = peft.get_peft_model(
        torch.nn.Sequential(layer.module()),
        peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], use_dora=True),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
                if not parameter.any():
                    parameter.normal_()
    return model


def peft_parameters(model: Any, layer: Layer) -> tuple[Any, Any, Any, Any]:
    """Returns the base weight, lora_A, lora_B and the magnitude as PEFT holds them."""
    adapted = model.base_model.model[0]
    magnitude = adapted.lora_magnitude_vector["default"].weight
    if layer.embeds:
        factors = adapted.lora_embedding_A["default"], adapted.lora_embedding_B["default"]
    else:
        factors = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    return adapted.base_layer.weight, *factors, magnitude


def wrapped_like(layer: Layer, parameters: tuple[Any, ...]) -> Any:
    base, lora_A, lora_B, magnitude = (np.asarray(each.detach()) for each in parameters)
    wrapped = lora_jax.wrap(
        {"W": jnp.asarray(base.transpose(layer.to_kernel))},
        "W",
        rank=RANK,
        alpha=ALPHA,
        dora=True,
        axes={"W": layer.axes},
    )
    node = wrapped["W"]
    node = dataclasses.replace(
        node,
        lora_A=jnp.asarray(lora_A.transpose(layer.to_A).reshape(node.lora_A.shape)),
        lora_B=jnp.asarray(lora_B.transpose(layer.to_B).reshape(node.lora_B.shape)),
        magnitude=jnp.asarray(magnitude.reshape(node.magnitude.shape)),
    )
    return {"W": node}


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_those_of_peft(name: str) -> None:
    layer = LAYERS[name]
    model = peft_model(layer)
    parameters = peft_parameters(model, layer)
    theirs = model(torch.tensor(layer.x))
    torch.sin(theirs).sum().backward()

    wrapped = wrapped_like(layer, parameters)
    adapted = lora_jax.adapt(layer.fn)
    x = jnp.asarray(layer.x)
    assert_agree(adapted(wrapped, x), np.asarray(theirs.detach()))
    gradient = jax.grad(lambda wrapped: jnp.sum(jnp.sin(adapted(wrapped, x))))(wrapped)["W"]
    expected = wrapped_like(layer, (parameters[0], *(each.grad for each in parameters[1:])))["W"]
    for leaf in ("lora_A", "lora_B", "magnitude"):
        assert_agree(getattr(gradient, leaf), getattr(expected, leaf))


@pytest.mark.parametrize("name", LAYERS)
def test_magnitudes_start_alike(name: str) -> None:
    layer = LAYERS[name]
    torch.manual_seed(0)
    model = peft.get_peft_model(
        torch.nn.Sequential(layer.module()),
        peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], use_dora=True),
    )
    base, *_, magnitude = (np.asarray(x.detach()) for x in peft_parameters(model, layer))
    wrapped = lora_jax.wrap(
        {"W": jnp.asarray(base.transpose(layer.to_kernel))},
        "W",
        rank=RANK,
        dora=True,
        axes={"W": layer.axes},
    )
    assert_agree(wrapped["W"].magnitude, magnitude.ravel())
