"""How PyTorch and PEFT lay out a weight and its factors, and how a parameter tree does.

PEFT adapts a parameter as such (`target_parameters`) by a change B · A of each of its matrices, as
it is stored: A multiplies its last axis or the one before, B the other. Which of them has changed:

- of a parameter of one matrix, A always multiplies the last axis;
- of a stack of experts, up to 0.18 A multiplies the axis before;
- in 0.19.0 too, except where the module says `is_transposed`, which means that its experts are
  stored (experts, in, out): there A multiplies the last axis;
- from 0.19.1 on it is the reverse of that, so that A always multiplies the inputs.

No file says which of these it is. The shapes do where inputs and outputs differ in number;
otherwise the version of PEFT does, which configs name from 0.18.0 on. PEFT itself looks at neither,
and computes with the square experts of an earlier version the wrong way round.

Source: peft.tuners.lora.layer.ParamWrapper, `update_layer` and `get_delta_weight`, of 0.17.0,
0.18.1, 0.19.0, 0.19.1 and 0.21.2.
"""

import dataclasses
import math
import re
from typing import Any, TypeVar

import numpy as np

from lora_jax._shapes import Axes, AxisRole, factor_shapes, positions, sizes
from lora_jax.exchange.peft._rules import Kind

# The first version that reads the layout written here.
WRITTEN_AS = "0.19.1"

Shape = tuple[int, ...]
Weight = TypeVar("Weight", np.ndarray, Any)
_Release = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Layout:
    r"""One PyTorch parameter: a leaf of a tree, or one place of a stack.

    With E experts (1 for all else), I inputs and O outputs, flat and in the tree's order, PEFT has
    $\Delta W = s \cdot B A$ with A (r, I) and B (O, r). It keeps the experts' A one after another
    and interleaves their B: $A_{er,i}$ and $B_{o,re}$. A convolution's A is a convolution
    (r, channels, \*window) and its B one of width 1.

    Attributes:
      kind: what it is in PyTorch.
      transposed: whether PyTorch stores it the other way round.
      shape: its shape in the tree.
      axes: the role of each of these axes; a batch axis is one of experts.
      swapped: whether PEFT's A belongs to the outputs and its B to the inputs, as it does in some
        files of parameters: the change of the weight is then (B A)ᵀ.

    Source: peft.tuners.lora.layer: `Linear`, `Embedding`, `_ConvNd` and `ParamWrapper`, whose
    `get_delta_weight` reads A as (experts, r, in) and B as (out, r, experts).
    """

    kind: Kind
    transposed: bool
    shape: Shape
    axes: Axes
    swapped: bool = False

    @property
    def experts(self) -> int:
        """E, the number of experts."""
        return math.prod(sizes(self.shape, self.axes, "batch"))

    @property
    def inputs(self) -> int:
        """I, the number of inputs."""
        return math.prod(sizes(self.shape, self.axes, "in"))

    @property
    def outputs(self) -> int:
        """O, the number of outputs."""
        return math.prod(sizes(self.shape, self.axes, "out"))

    def rank(self, A_shape: Shape) -> int:
        """Returns the rank of a file's A."""
        return A_shape[0] // self.experts if A_shape else 0

    def file_shapes(self, rank: int) -> dict[str, Shape]:
        """Returns the shapes that a file's A, B and magnitude have."""
        if self.kind == "conv":
            _, channels, *window = self.weight_shape
            ones = (1,) * len(window)
            return {
                "lora_A": (rank, channels, *window),
                "lora_B": (self.outputs, rank, *ones),
                "magnitude": (1, self.outputs, *ones),
            }
        A_size, B_size = self.inputs, self.outputs
        if self.swapped:
            A_size, B_size = B_size, A_size
        return {
            "lora_A": (rank * self.experts, A_size),
            "lora_B": (B_size, rank * self.experts),
            "magnitude": (self.outputs,),
        }

    def file_factors(self, lora_A: np.ndarray, lora_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns A and B as PEFT has them."""
        rank = lora_A.shape[-1]
        shapes = self.file_shapes(rank)
        outer = lora_B.reshape(self.experts, rank, self.outputs)
        if self.kind == "conv":
            A = np.moveaxis(np.moveaxis(lora_A, -1, 0), 1 + self._channel_place, 1)
            return A, outer.transpose(2, 1, 0).reshape(shapes["lora_B"])
        inner = lora_A.reshape(self.experts, self.inputs, rank)
        if self.swapped:
            inner, outer = outer.swapaxes(1, 2), inner.swapaxes(1, 2)
        A, B = inner.transpose(0, 2, 1), outer.transpose(2, 1, 0)
        return A.reshape(shapes["lora_A"]), B.reshape(shapes["lora_B"])

    def tree_factors(self, A: np.ndarray, B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns `lora_A` and `lora_B` of a file's A and B."""
        rank = self.rank(A.shape)
        A_shape, B_shape = factor_shapes(self.shape, self.axes, rank)
        outer = B.reshape(-1, rank, self.experts).transpose(2, 1, 0)
        if self.kind == "conv":
            lora_A = np.moveaxis(np.moveaxis(A, 1, 1 + self._channel_place), 0, -1)
            return lora_A, outer.reshape(B_shape)
        inner = A.reshape(self.experts, rank, -1).transpose(0, 2, 1)
        if self.swapped:
            inner, outer = outer.swapaxes(1, 2), inner.swapaxes(1, 2)
        return inner.reshape(A_shape), outer.reshape(B_shape)

    def tree_magnitude(self, magnitude: np.ndarray) -> np.ndarray:
        """Returns DoRA's magnitudes as the tree has them."""
        return magnitude.reshape(sizes(self.shape, self.axes, "batch", "out"))

    @property
    def weight_shape(self) -> Shape:
        """The shape that the weight itself has in PyTorch."""
        if self.kind in {"array", "conv"}:
            return tuple(self.shape[axis] for axis in self._weight_order)
        batch = sizes(self.shape, self.axes, "batch")
        if "in" not in self.axes:
            return (*batch, self.outputs)
        sides = (self.inputs, self.outputs)
        return (*batch, *(sides if self._has_inputs_first else reversed(sides)))

    def file_weight(self, weight: np.ndarray) -> np.ndarray:
        """Returns the weight itself as PyTorch has it."""
        return weight.transpose(self._weight_order).reshape(self.weight_shape)

    def tree_weight(self, weight: Weight) -> Weight:
        """Returns a PyTorch weight as the tree has it; it may be quantised."""
        order = self._weight_order
        in_order = weight.reshape([self.shape[axis] for axis in order])
        return in_order.transpose([order.index(axis) for axis in range(len(order))])

    def problem(self) -> str | None:
        """Returns what keeps the weight from having this kind, or None."""
        if self.kind == "array" or len(self.axes) == 1:
            return None
        if self.kind == "conv" and self._channel_places() is None:
            return (
                f"its axes are {self.axes}; expected one 'out' axis of a convolution, at the "
                "beginning or the end, and 'in' axes"
            )
        return None

    @property
    def _has_inputs_first(self) -> bool:
        return self.transposed or self.kind == "embedding"

    @property
    def _weight_order(self) -> tuple[int, ...]:
        if self.kind == "array":
            return tuple(range(len(self.shape)))
        inputs, outputs = positions(self.axes, "in"), positions(self.axes, "out")
        if self.kind == "conv" and inputs:
            place = self._channel_place
            inputs = (inputs[place], *inputs[:place], *inputs[place + 1 :])
        sides = (*inputs, *outputs) if self._has_inputs_first else (*outputs, *inputs)
        return (*positions(self.axes, "batch"), *sides)

    @property
    def _channel_place(self) -> int:
        place = self._channel_places()
        assert place is not None
        return place

    def _channel_places(self) -> int | None:
        """Returns which of a convolution's input axes is that of the channels: out's neighbour."""
        outputs, inputs = positions(self.axes, "out"), positions(self.axes, "in")
        if len(outputs) != 1 or len(inputs) + 1 != len(self.axes) or not inputs:
            return None
        return {0: 0, len(inputs): len(inputs) - 1}.get(outputs[0])


def exchanged_for_tokens(kind: Kind, axes: Axes) -> Axes:
    """Returns the axes of a module's weight as those of its rows, and the other way round.

    Rows are along the inputs, and the tokens of an output layer are its outputs.
    """
    other: dict[AxisRole, AxisRole] = {"in": "out", "out": "in", "batch": "batch"}
    return axes if kind == "embedding" else tuple(other[role] for role in axes)


def written_layout(layout: Layout) -> Layout:
    """Returns the layout that PEFT reads today."""
    return _with_A_at(layout, is_last=_reads_last_axis(layout, (0, 19, 1)))


def file_layout(layout: Layout, A_shape: Shape, version: str | None) -> Layout | None:
    """Returns the layout of a file that a version of PEFT wrote; None where that is unknown."""
    if layout.kind != "parameter":
        return layout
    if layout.inputs != layout.outputs:
        return dataclasses.replace(layout, swapped=A_shape[-1:] == (layout.outputs,))
    # Those without a version are of PEFT up to 0.17, or of another program that writes as it does.
    possible = _releases(version)
    layouts = {
        _with_A_at(layout, is_last=_reads_last_axis(layout, release)) for release in possible
    }
    return layouts.pop() if len(layouts) == 1 else None


def is_written_as_now(version: str | None) -> bool:
    """Says whether a version of PEFT writes as is done here."""
    return all(release >= (0, 19, 1) for release in _releases(version))


def _with_A_at(layout: Layout, *, is_last: bool) -> Layout:
    if layout.kind != "parameter":
        return layout
    return dataclasses.replace(layout, swapped=is_last == layout.transposed)


def _reads_last_axis(layout: Layout, release: _Release) -> bool:
    if layout.experts == 1:
        return True
    if release >= (0, 19, 1):
        return not layout.transposed
    return layout.transposed and release == (0, 19, 0)


def _releases(version: str | None) -> tuple[_Release, ...]:
    """Returns the releases that a version may write like."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version or "")
    if found is None:
        return (0, 17, 0), (0, 19, 1)
    major, minor, patch = (int(number or 0) for number in found.groups())
    release = (major, minor, patch)
    is_between = (0, 18, 0) < release <= (0, 19, 1) and "dev" in (version or "")
    return ((0, 18, 0), (0, 19, 0), (0, 19, 1)) if is_between else (release,)
