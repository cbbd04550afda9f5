"""A small network with every kind of weight, for tests of what works on quantised trees."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from tests.arrays import random
from tests.trained import as_if_trained

FORMATS = ("nf4", "int8", "int4", "fp8_e4m3")
TARGETS = "embed|layers/w|experts|conv|head"
AXES: dict[str, tuple[str, ...]] = {
    "conv": ("in", "in", "in", "out"),
    "embed": ("in", "out"),
    "experts": ("batch", "in", "out"),
    "head": ("in", "out"),
    "layers/w": ("batch", "in", "out"),
}
PARAMS = {
    "embed": random(20, 30),
    "layers": {"w": random(3, 30, 30), "b": random(3, 30)},
    "experts": random(4, 30, 12),
    "conv": random(3, 3, 12, 8),
    "head": random(8, 5),
}
TOKENS = np.random.default_rng(0).integers(0, 20, (2, 4))
KEY = jax.random.key(7)


def model(params: Any, tokens: Any) -> jax.Array:
    """An embedding that is tied, a scan, experts, a convolution and a head."""

    def layer(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        return jnp.tanh(x @ layer["w"] + layer["b"][None, None]), None

    x, _ = jax.lax.scan(layer, params["embed"][tokens], params["layers"])
    mixed = jnp.einsum("btd,edh->ebth", x, params["experts"]).mean(0)
    images = mixed.reshape(-1, 2, 2, 12)
    numbers = ("NHWC", "HWIO", "NHWC")
    seen = jax.lax.conv_general_dilated(
        images, params["conv"], (1, 1), "SAME", dimension_numbers=numbers
    )
    tied = x.mean(1) @ params["embed"].T
    return jnp.tanh(seen).mean((1, 2)) @ params["head"] + tied[:, :5]


def quantized(form: str = "nf4", params: Any = PARAMS) -> Any:
    return lora_jax.quantize(params, TARGETS, format=form, axes=AXES)


def wrapped(params: Any, seed: int = 13, **options: Any) -> Any:
    settings = {"targets": TARGETS, "axes": AXES, "rank": 3, **options}
    return as_if_trained(lora_jax.wrap(params, settings.pop("targets"), **settings), seed)
