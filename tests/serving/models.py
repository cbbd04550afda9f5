"""Small models of a batch that use their weights in different ways, and adapters of them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from tests.battery.problems import Dense
from tests.trained import as_if_trained

BATCH = 7


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A function of (params, x), where x has its batch axis in front, and what it takes."""

    name: str
    fn: Callable[[Any, jax.Array], jax.Array]
    shapes: Mapping[str, tuple[int, ...]]
    x_shape: tuple[int, ...]
    axes: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    targets: str = "W.*"
    integer_x: bool = False

    @functools.cached_property
    def params(self) -> dict[str, jax.Array]:
        random = np.random.default_rng(0)
        # They are kept, so a function that is being traced must not make tracers of them.
        with jax.ensure_compile_time_eval():
            return {
                name: jnp.asarray(random.normal(size=shape).astype(np.float32) / 3)
                for name, shape in self.shapes.items()
            }

    @functools.cached_property
    def x(self) -> jax.Array:
        random, shape = np.random.default_rng(1), (BATCH, *self.x_shape)
        with jax.ensure_compile_time_eval():
            if self.integer_x:
                return jnp.asarray(random.integers(0, 20, shape, np.int32))
            return jnp.asarray(random.normal(size=shape).astype(np.float32))

    def adapter(self, seed: int, **options: Any) -> Any:
        """Returns an adapter with numbers as if it had been trained."""
        return dict(_adapter(self, seed, **options))


# One program for all adapters of the same structure.
merged = jax.jit(lora_jax.merge)


def two_layers(params, x):
    h = x @ params["W1"]
    return jnp.tanh(h + jnp.broadcast_to(params["b"], h.shape)) @ params["W2"]


def heads(params, x):
    mixed = jnp.einsum("bte,ehd->bthd", x, params["W1"])
    return jnp.einsum("bthd,hde->bte", jnp.tanh(mixed), params["W2"])


def convolution(params, x):
    return jax.lax.conv_general_dilated(
        x, params["W"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def tied_embedding(params, ids):
    return jnp.tanh(params["W"][ids]) @ params["W"].T


def scanned(params, x):
    def layer(x, kernel):
        return jnp.tanh(x @ kernel), None

    return jax.lax.scan(layer, x, params["W"])[0]


MODELS = [
    Model("dense", two_layers, {"W1": (12, 9), "W2": (9, 8), "b": (9,)}, (12,)),
    Model(
        "heads",
        heads,
        {"W1": (12, 3, 4), "W2": (3, 4, 12)},
        (5, 12),
        {"W1": ("in", "out", "out"), "W2": ("in", "in", "out")},
    ),
    Model(
        "convolution", convolution, {"W": (3, 3, 4, 8)}, (6, 6, 4), {"W": ("in", "in", "in", "out")}
    ),
    Model("tied embedding", tied_embedding, {"W": (20, 8)}, (5,), integer_x=True),
    Model("scanned", scanned, {"W": (3, 10, 10)}, (4, 10), {"W": ("batch", "in", "out")}),
]
DENSE, HEADS, CONVOLUTION, EMBEDDING, SCANNED = MODELS


@functools.cache
def _adapter(model: Model, seed: int, **options: Any) -> Any:
    settings = {"rank": 2, "alpha": 3.0, "axes": model.axes, **options}
    # As with the params of the model, a function that is being traced may ask for it first.
    with jax.ensure_compile_time_eval():
        return as_if_trained(lora_jax.wrap(model.params, model.targets, **settings), seed)


def in_float64(tree: Any) -> Any:
    """Returns the tree with its floats in float64, where JAX is allowed that."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)) if leaf.dtype.kind == "f" else leaf,
        tree,
    )


def dense(wrapped: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the weight that each leaf stands for, computed in NumPy, in float64."""
    return {
        name: Dense.of(leaf).value
        if isinstance(leaf, lora_jax.LoRAWeight)
        else np.asarray(leaf, np.float64)
        for name, leaf in wrapped.items()
    }


@functools.cache
def _loop(model: Model) -> Callable[..., jax.Array]:
    """Returns what each row of inputs gives with its own weights: one program for all adapters."""

    def each(weights_and_row: Any) -> jax.Array:
        weights, row = weights_and_row
        return model.fn(weights, row[None])[0]

    return jax.jit(lambda weights, x: jax.lax.map(each, (weights, x)))


def one_by_one(model: Model, wrappeds: list[Any], x: jax.Array) -> np.ndarray:
    """Returns what each example's own weights give, in float64."""
    weights = jax.tree.map(lambda *leaves: np.stack(leaves), *map(dense, wrappeds))
    rows = np.asarray(x if model.integer_x else np.asarray(x, np.float64))
    with jax.enable_x64(True):
        return np.asarray(_loop(model)(weights, rows))
