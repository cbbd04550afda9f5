"""Numbers for a layout and an option, and the dense weight that they stand for, all in NumPy."""

import dataclasses
import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

import lora_jax
from lora_jax.quantization._placement import leaf_specs
from lora_jax.quantization._weight import is_quantized
from tests.battery.bases import Base
from tests.battery.layouts import Layout
from tests.battery.options import Option
from tests.battery.registry import ROWS, WIDTH
from tests.dequantized import dequantized

RANKS = {"w": 2, "v": 1}
ALPHA = 3.0
# How the second adapter of the same shapes differs from the first.
_OTHER = {"lora_A": -0.5, "lora_B": 1.5, "magnitude": 1.25}


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Two wrapped weights, two adapters for them, and two examples of activations."""

    layout: Layout
    option: Option
    adapters: tuple[Any, ...]
    frozen: Any
    xs: np.ndarray

    @property
    def stacked_adapters(self) -> Any:
        return jax.tree.map(lambda *leaves: np.stack(leaves), *self.adapters)

    def dense(self, adapter: int) -> dict[str, "Dense"]:
        """Returns what each weight stands for with one of the adapters."""
        wrapped = lora_jax.combine(self.adapters[adapter], self.frozen)
        return {name: Dense.of(node) for name, node in wrapped.items()}


@functools.cache
def problem_of(layout: Layout, option: Option, base: Base) -> Problem:
    seed = f"{layout.name} {option.name} {base.name}"
    random = np.random.default_rng(zlib.crc32(seed.encode()))
    wrapped = {
        name: weight_of(random, layout, option, base.format, dtype=option.dtype_of(name), rank=rank)
        for name, rank in RANKS.items()
    }
    wrapped |= {name: wrapped[name].base for name in base.alone}
    adapters, frozen = lora_jax.split(wrapped)
    other = jax.tree.map(
        lambda label, x: (x * np.asarray(_OTHER[label], x.dtype)) if label in _OTHER else None,
        lora_jax.labels(wrapped),
        wrapped,
    )
    # Multiples of 1/8 below 2 are the same numbers in every dtype.
    xs = random.integers(-16, 16, (2, ROWS, WIDTH)).astype(np.float32) / 8
    return Problem(layout, option, (adapters, other), frozen, xs)


def weight_of(
    random: np.random.Generator,
    layout: Layout,
    option: Option,
    name: str | None,
    *,
    dtype: Any,
    rank: int,
) -> lora_jax.LoRAWeight:
    """Returns a weight as if trained: nothing of it is zero or as it was at the start."""
    factor_dtype = dtype if option.narrow_factors else np.float32
    sizes = dict(enumerate(layout.shape))
    if option.layers is not None:
        sizes[layout.held("batch")[0]] = len(option.layers)
    batch, inputs, outputs = (
        tuple(sizes[axis] for axis in layout.held(role)) for role in ("batch", "in", "out")
    )

    def drawn(*shape: int) -> np.ndarray:
        return random.uniform(0.3, 1, shape) * random.choice([-1, 1], shape)

    base = drawn(*layout.shape)
    if option.zero_feature:
        base[tuple(0 if role == "out" else slice(None) for role in layout.axes)] = 0
    base = base.astype(dtype)
    if name is not None:
        base = quantized(base, layout, name)
    lora_A: Any = drawn(*batch, *inputs, rank).astype(factor_dtype)
    if option.rows is not None:
        rank = len(option.rows)
        lora_A = lora_jax.RowSelection(np.asarray(option.rows, np.int32), inputs[0])
    node = lora_jax.LoRAWeight(
        base=base,
        lora_A=lora_A,
        lora_B=drawn(*batch, rank, *outputs).astype(factor_dtype),
        scale=np.asarray(ALPHA / rank, factor_dtype),
        axes=layout.axes,
        layers=option.layers,
        frozen=() if option.rows is None else ("lora_A",),
    )
    if not option.dora:
        return node
    norms = _sum_of_squares(_taken(_dense(base), layout.axes, option.layers), layout)
    return dataclasses.replace(
        node,
        magnitude=random.uniform(0.5, 1.5, norms.shape).astype(factor_dtype),
        squared_norm=norms.astype(factor_dtype),
    )


def quantized(base: np.ndarray, layout: Layout, name: str) -> lora_jax.QuantizedWeight:
    """Returns a weight quantised along its inputs, in blocks of which the last one is short."""
    params = {"w": jnp.asarray(base)}
    axes = {"w": layout.axes}
    codes = lora_jax.quantize(params, "w", format=name, block=_BLOCK, axes=axes)["w"]
    return jax.device_get(codes)


# Some inputs have 4, 6 or 8 weights, or the product of two of these.
_BLOCK = 5


def _dense(base: Any) -> np.ndarray:
    is_quantized = isinstance(base, lora_jax.QuantizedWeight)
    return dequantized(base) if is_quantized else np.asarray(base, np.float64)


def _factor_A(node: lora_jax.LoRAWeight) -> np.ndarray:
    """Returns lora_A as an array; that of rows is the same for each place of a batch axis."""
    if not isinstance(node.lora_A, lora_jax.RowSelection):
        return node.lora_A
    one_hot = np.eye(node.lora_A.size)[:, node.lora_A.rows]
    batch = [node.shape[axis] for axis, role in enumerate(node.axes) if role == "batch"]
    return np.broadcast_to(one_hot, (*batch, *one_hot.shape))


@dataclasses.dataclass(frozen=True, eq=False)
class Dense:
    """A weight in float64, and what its gradient is for the adapter that it is made of."""

    value: np.ndarray
    sum: np.ndarray
    gain: np.ndarray | None
    norm: np.ndarray | None
    node: Any
    layout: Layout

    @classmethod
    def of(cls, node: Any) -> "Dense":
        if isinstance(node, lora_jax.QuantizedWeight):
            value = dequantized(node)
            return cls(value, value, None, None, None, Layout((), node.shape))
        layout = Layout(node.axes, node.shape)
        node = dataclasses.replace(node, base=_dense(node.base), lora_A=_factor_A(node))
        node = jax.tree.map(lambda x: np.asarray(x, np.float64), node)
        change = np.einsum(f"{_A(layout)},{_B(layout)}->{_W(layout)}", node.lora_A, node.lora_B)
        total = _taken(node.base, node.axes, node.layers) + node.scale * change
        part, gain, norm = total, None, None
        if node.magnitude is not None:
            norm = np.sqrt(_sum_of_squares(total, layout))
            gain = _spread(node.magnitude / norm, layout)
            part = total * gain
        value = part
        if node.layers is not None:
            value = node.base.copy()
            np.moveaxis(value, node.axes.index("batch"), 0)[list(node.layers)] = np.moveaxis(
                part, node.axes.index("batch"), 0
            )
        return cls(value, total, gain, norm, node, layout)

    @property
    def cancellation(self) -> float:
        """How many times its own rounding error a squared norm may have.

        The library never builds W + s A B for it: it adds ‖W‖², 2s⟨W, AB⟩ and s²‖AB‖², whose errors
        stay where their sum is small. A feature of two inputs may cancel by chance.
        """
        if self.norm is None:
            return 1.0
        weight = _taken(self.node.base, self.node.axes, self.node.layers)
        parts = (_sum_of_squares(part, self.layout) for part in (weight, self.sum - weight))
        return float(np.max(sum(parts) / self.norm**2))

    def gradient(self, of_value: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the gradient of the adapter, by the chain rule; a norm is a constant in it."""
        layout, node = self.layout, self.node
        if node is None:
            return {}
        part = _taken(of_value, node.axes, node.layers)
        gradient = {}
        if self.gain is not None:
            along_features = _sum_over_inputs(part * self.sum, layout)
            gradient["magnitude"] = along_features / self.norm
            part = part * self.gain
        scaled = node.scale * part
        gradient |= {
            "lora_A": np.einsum(f"{_W(layout)},{_B(layout)}->{_A(layout)}", scaled, node.lora_B),
            "lora_B": np.einsum(f"{_W(layout)},{_A(layout)}->{_B(layout)}", scaled, node.lora_A),
        }
        return {name: each for name, each in gradient.items() if name not in node.frozen}


def _W(layout: Layout) -> str:
    return "abcdefgh"[: len(layout.axes)]


def _A(layout: Layout) -> str:
    return "".join(_W(layout)[axis] for axis in layout.held("batch", "in")) + "r"


def _B(layout: Layout) -> str:
    batch, outputs = (
        "".join(_W(layout)[axis] for axis in layout.held(role)) for role in ("batch", "out")
    )
    return f"{batch}r{outputs}"


def _features(layout: Layout) -> str:
    return _B(layout).replace("r", "")


def _sum_over_inputs(weight: np.ndarray, layout: Layout) -> np.ndarray:
    return np.einsum(f"{_W(layout)}->{_features(layout)}", weight)


def _sum_of_squares(weight: np.ndarray, layout: Layout) -> np.ndarray:
    return _sum_over_inputs(weight**2, layout)


def _spread(features: np.ndarray, layout: Layout) -> np.ndarray:
    """Returns an array of one number for each output feature with the axes of the weight."""
    order = sorted(range(features.ndim), key=lambda i: _features(layout)[i])
    inputs = tuple(layout.held("in"))
    return np.expand_dims(features.transpose(order), inputs)


def _taken(weight: np.ndarray, axes: tuple[str, ...], layers: Any) -> np.ndarray:
    return weight if layers is None else np.take(weight, layers, axis=axes.index("batch"))


def shapes_of(problem: Problem, mesh: jax.sharding.Mesh | None) -> tuple[Any, Any, Any]:
    """Returns the shapes of stacked adapters, frozen leaves and examples.

    On a mesh, each weight is cut along its last axis, and what has that axis too is cut with it.
    """
    last = len(problem.layout.axes) - 1
    batch, inputs, outputs = (problem.layout.held(role) for role in ("batch", "in", "out"))
    held = {
        "base": range(last + 1),
        "lora_A": (*batch, *inputs, None),
        "rows": (None,),
        "lora_B": (*batch, None, *outputs),
        "magnitude": (*batch, *outputs),
        "squared_norm": (*batch, *outputs),
        "scale": (),
    }

    def shape(leaf: Any, spec: Any) -> jax.ShapeDtypeStruct:
        sharding = None if mesh is None else jax.NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def quantized_shapes(weight: Any) -> Any:
        if weight.codes is None:
            return weight
        specs = leaf_specs(weight, (*(None,) * last, "d"), {"d": 2})
        return jax.tree.map(lambda leaf, spec: shape(leaf, tuple(spec)), weight, specs)

    def shapes(tree: Any, *, stacked: bool = False) -> Any:
        front = (None,) if stacked else ()

        def of(key_path: Any, leaf: Any) -> Any:
            if is_quantized(leaf):
                return quantized_shapes(leaf)
            cuts = ("d" if axis == last else None for axis in held[key_path[-1].name])
            return shape(leaf, (*front, *cuts))

        return jax.tree_util.tree_map_with_path(of, tree, is_leaf=is_quantized)

    return (
        shapes(problem.stacked_adapters, stacked=True),
        shapes(problem.frozen),
        shape(problem.xs, ()),
    )
