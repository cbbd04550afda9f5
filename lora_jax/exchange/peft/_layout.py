"""How PyTorch and PEFT lay out a weight and its factors, and how a parameter tree does."""

import dataclasses
import math

import numpy as np

from lora_jax._shapes import Axes, factor_shapes, positions, sizes
from lora_jax.exchange.peft._rules import Kind

Shape = tuple[int, ...]


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

    def tree_weight(self, weight: np.ndarray) -> np.ndarray:
        """Returns a PyTorch weight as the tree has it."""
        order = self._weight_order
        in_order = weight.reshape([self.shape[axis] for axis in order])
        return in_order.transpose(np.argsort(order))

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
