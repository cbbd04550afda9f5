"""What a leaf is, judged by its dtype, its shape, its name and the leaves beside it."""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp

from lora_jax._dtypes import is_narrow_float

# Leaves with these names shift a module's output. They may have two axes (the heads and the head
# dimension of an attention bias, the layers of a stack), and so look like weights.
_BIAS_NAMES = frozenset({"b", "bias"})
# Names of weights beside which a leaf named by one letter is a bias.
_WEIGHT_NAMES = frozenset({"kernel", "w", "weight"})
_SCALE_NAMES = frozenset({"g", "gamma", "scale"})

_SCALE_WORDS = frozenset(
    {"absmax", "amax", "offset", "offsets", "qzeros", "scale", "scales", "zero", "zeros", "zp"}
)
_CODE_WORDS = frozenset(
    {"codes", "packed", "q", "qdata", "quantised", "quantized", "qvalue", "qweight"}
)

_Neighbour = tuple[str, Any]


def floating_obstacle(leaf: Any) -> str | None:
    """Returns why a leaf is not an array of real numbers to compute with, or None if it is."""
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return "it is not an array"
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return f"its dtype is {leaf.dtype}, and only real weights can be adapted"
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        return (
            f"its dtype is {leaf.dtype}, not a floating-point one; codes are a weight with their "
            "scales, as a lora_jax.QuantizedWeight or with quantization.declare"
        )
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"its dtype is {leaf.dtype}, not a floating-point one"
    return None


def weight_obstacle(leaf: Any) -> str | None:
    """Returns why a leaf can't be adapted, whatever its name, or None if it can."""
    obstacle = floating_obstacle(leaf)
    if obstacle is not None:
        return obstacle
    if len(leaf.shape) < 2:
        return "it has fewer than two axes"
    if math.prod(leaf.shape) == 0:
        return "it holds no numbers"
    if jnp.dtype(leaf.dtype) == jnp.float8_e8m0fnu:
        return "its dtype is float8_e8m0fnu, which has powers of two only, and no sign"
    return None


@dataclasses.dataclass(frozen=True)
class Neighbourhood:
    """The leaves of each module, which tell weights from biases and scales.

    Attributes:
      modules: for each module's path, the name of each of its leaves beside the leaf. Places in a
        list don't count: in `kernel/scale/0` the leaf is `scale` of the module `kernel`.
    """

    modules: Mapping[str, Sequence[_Neighbour]]

    @classmethod
    def of(cls, leaves: Iterable[tuple[str, Any]]) -> "Neighbourhood":
        """Returns the neighbourhood of these leaves by path."""
        modules = collections.defaultdict(list)
        for path, leaf in leaves:
            module, name = _module_and_name(path)
            modules[module].append((name, leaf))
        return cls(modules)

    def kind_by_name(self, path: str, leaf: Any) -> Literal["weight", "bias", "unclear"]:
        """Says what a leaf of two or more axes is by its name.

        A bias has the axes of a weight of its module without the inputs, or those of a scale; the
        outputs may be one axis of the weight and several of the bias. What is called `b` may also
        be the letter after `a`: it is a bias beside `w`, `kernel` and the like, if it has their
        axes, and a weight where it fits nothing.
        """
        _, name = _module_and_name(path)
        if name not in _BIAS_NAMES:
            return "weight"
        others = [
            (other, neighbour)
            for other, neighbour in self._beside(path, leaf)
            if other not in _BIAS_NAMES and floating_obstacle(neighbour) is None
        ]
        shape = leaf.shape
        outputs = {other for other, neighbour in others if _lacks_axes_of(shape, neighbour.shape)}
        sides = {other for other, neighbour in others if _is_side_of(shape, neighbour.shape)}
        equal = {other for other, neighbour in others if neighbour.shape == shape}
        if outputs & _WEIGHT_NAMES or equal & _SCALE_NAMES:
            return "bias"
        if name == "bias" and outputs | sides | equal:
            return "bias"
        weights = {other for other, neighbour in others if len(neighbour.shape) > 1}
        if name == "b" and weights - _SCALE_NAMES and not weights & _WEIGHT_NAMES | outputs | sides:
            return "weight"
        return "unclear"

    def quantised_partner(self, path: str, leaf: Any) -> str | None:
        """Returns the name of what makes a quantised weight together with a leaf, if there is any.

        That is the codes beside scales or zero points, and the scales beside float8 codes.
        """
        _, name = _module_and_name(path)
        for other, neighbour in self._beside(path, leaf):
            if _is_scale_of(name, leaf, other, neighbour) or (
                is_narrow_float(leaf.dtype) and _is_scale_of(other, neighbour, name, leaf)
            ):
                return other
        return None

    def _beside(self, path: str, leaf: Any) -> Iterator[_Neighbour]:
        module, _ = _module_and_name(path)
        return (pair for pair in self.modules[module] if pair[1] is not leaf)


def _module_and_name(path: str) -> tuple[str, str]:
    segments = path.split("/")
    named = itertools.dropwhile(str.isdigit, reversed(segments))
    *module, name = [*reversed(list(named))] or [""]
    return "/".join(module), name


def _lacks_axes_of(bias: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Says whether a bias holds some of a weight's axes, in their order, and size 1 elsewhere."""
    remaining = iter(weight)
    sizes = [size for size in bias if size != 1]
    return len(sizes) < len(weight) and all(
        any(size == other for other in remaining) for size in sizes
    )


def _is_side_of(bias: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Says whether a bias has as many numbers as the first or the last axes of a weight."""
    sides = [side for cut in range(1, len(weight)) for side in (weight[:cut], weight[cut:])]
    return math.prod(bias) in map(math.prod, sides)


def _is_scale_of(name: str, scales: Any, codes_name: str, codes: Any) -> bool:
    if floating_obstacle(scales) is not None or not hasattr(codes, "shape"):
        return False
    says_scale = bool(_words(name) & _SCALE_WORDS)
    if is_narrow_float(codes.dtype):
        return says_scale and len(codes.shape) > 1
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        return False
    if says_scale and _words(codes_name) & _CODE_WORDS:
        return True
    # Numbers of one byte are codes rather than ids or places; a mask is as large as its weight.
    is_narrow = jnp.dtype(codes.dtype).itemsize == 1 and len(codes.shape) > 1
    is_larger = math.prod(codes.shape) > math.prod(scales.shape)
    return is_narrow and is_larger and (says_scale or _are_blocks(scales.shape, codes.shape))


def _are_blocks(scales: tuple[int, ...], codes: tuple[int, ...]) -> bool:
    return len(scales) == len(codes) and all(
        code % scale == 0 for scale, code in zip(scales, codes, strict=True)
    )


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name.lower()))
