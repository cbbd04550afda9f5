"""The factors that a new adapter starts with: an initialiser, compiled for a weight."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from lora_jax._compat import is_tracer
from lora_jax._dtypes import common_dtype, epsilon
from lora_jax._identity import Same, is_hashable
from lora_jax._keys import own_key
from lora_jax._matrices import by_matrix, stack_ndim
from lora_jax._partition import cut_as, factor_shardings, uncut
from lora_jax._settings import Settings
from lora_jax._shapes import AnyArray, Axes, Layers, factor_shapes, layers_shape, sizes, to_matrices
from lora_jax.init import DataInitializer, Frozen, QuantizingInitializer
from lora_jax.init._data import per_matrix
from lora_jax.init._protocol import QuantizedBase
from lora_jax.quantization._weight import AnyWeight

# How many compiled initialisers are kept: one for each set of settings.
_KEPT = 256


@dataclasses.dataclass(frozen=True)
class InitialFactors:
    """What an initialiser returned for a weight.

    Attributes:
      lora_A: of shape (*batch, *in, r).
      lora_B: of shape (*batch, r, *out).
      moved: the A and B whose s · A · B is taken out of the weight; None if the base is the weight
        itself.
      frozen: the names of the factors that do not train.
      encoding: how the base is quantised, if it is to be.
    """

    lora_A: Array
    lora_B: Array
    moved: tuple[Array, Array] | None
    frozen: tuple[str, ...]
    encoding: tuple[Any, ...] | None


def initial_factors(
    path: str,
    weight: AnyWeight,
    axes: Axes,
    layers: Layers | None,
    settings: Settings,
    dtype: Any,
    key: PRNGKeyArray,
) -> InitialFactors:
    """Returns the factors for a weight in `dtype`, cut over the mesh as the weight is.

    Args:
      path: the weight's path, from which its own random key is derived.
      weight: the weight.
      axes: the role of each of its axes.
      layers: the adapted indices of its first batch axis, or None.
      settings: how it is adapted; `rank` fits it.
      dtype: the factors' dtype.
      key: the random key that all weights share.

    Raises:
      ValueError: the initialiser has no statistics of the weight, returns arrays of other shapes,
        or a base that is neither the weight nor W - s · A · B.
    """
    init = settings.init
    statistics: tuple[Any, ...] = ()
    if isinstance(init, DataInitializer):
        statistics = (init.statistics_of(path, weight.shape, axes),)
    if isinstance(init, QuantizingInitializer):
        init = init.for_weight(weight)
    program = _program(
        _by_content(init.function if isinstance(init, DataInitializer) else init),
        isinstance(init, DataInitializer) and init.shaped_as_weights,
        axes,
        layers,
        settings.rank,
        settings.scale(settings.rank),
        dtype,
        factor_shardings(weight, axes, layers, settings.rank),
        stack_ndim(weight, axes),
    )
    try:
        (of_A, of_B, differences), kind = program(own_key(key, path), weight, statistics)
    except _WrongShapesError as error:
        raise ValueError(f"`init` returned {error} for '{path}'.") from None
    _check_base(path, differences, weight.dtype)
    is_moved = not kind.keeps_base or len(of_A) > 1
    return InitialFactors(
        lora_A=of_A[0],
        lora_B=of_B[0],
        moved=(of_A[-1], of_B[-1]) if is_moved else None,
        frozen=kind.frozen,
        encoding=kind.encoding,
    )


class _WrongShapesError(Exception):
    """An initialiser returned arrays whose shapes do not fit the weight's factors."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Kind:
    """What tracing an initialiser shows: what becomes of the base, and what does not train."""

    keeps_base: bool
    frozen: tuple[str, ...]
    encoding: tuple[Any, ...] | None


@functools.lru_cache(maxsize=_KEPT)
def _program(
    init: Callable[..., Any],
    shaped_as_weights: bool,
    axes: Axes,
    layers: Layers | None,
    rank: int,
    scale: float,
    dtype: Any,
    shardings: Any,
    stack: int,
) -> Callable[..., Any]:
    """Returns a compiled function from key, weight and statistics to factors and differences.

    Beside lora_A and lora_B it returns the factors that were moved out of the weight, where those
    are others.

    A quantised stack is dequantised matrix by matrix.

    A program that drops out of the cache frees what it compiled, so that new initialisers, as in a
    loop that makes a closure each time, do not pile up.
    """

    def of_matrix(key: PRNGKeyArray, weight2d: Array, *statistics: Any) -> Any:
        base, *factors = init(key, weight2d, rank, scale, *statistics)
        arrays = [factor.array if isinstance(factor, Frozen) else factor for factor in factors]
        names = zip(("lora_A", "lora_B"), factors, strict=True)
        frozen = tuple(name for name, factor in names if isinstance(factor, Frozen))
        if isinstance(base, QuantizedBase):
            moved = () if base.lora_A is None else (base.lora_A, base.lora_B)
            encoding = dataclasses.astuple(base.encoding)
            base = weight2d
        else:
            moved, encoding = (), None
        _check_shapes(weight2d, rank, base, *arrays)
        keeps_base = base is weight2d
        difference = () if keeps_base else _difference(base, weight2d, scale, *arrays)
        kind = _Kind(keeps_base, frozen, encoding)
        lora_A, lora_B = (array.astype(dtype) for array in arrays)
        return (([lora_A, *moved[:1]], [lora_B, *moved[1:]], difference), kind)

    def of_part(part: AnyArray, keys: PRNGKeyArray, known: Sequence[Any]) -> Any:
        matrices = to_matrices(part, axes)
        batch = sizes(part.shape, axes, "batch")
        keys, known = jax.tree.map(
            lambda leaf: leaf.reshape(-1, *leaf.shape[len(batch) :]), (keys, known)
        )
        (of_A, of_B, differences), kind = jax.vmap(of_matrix)(keys, matrices, *known)
        A_shape, B_shape = factor_shapes(part.shape, axes, rank)
        shaped = (
            [lora_A.reshape(A_shape) for lora_A in of_A],
            [lora_B.reshape(B_shape) for lora_B in of_B],
            jax.tree.map(lambda leaf: leaf.reshape(batch), differences),
        )
        return shaped, kind

    def of_weight(key: PRNGKeyArray, weight: Any, statistics: tuple[Any, ...]) -> Any:
        known = [
            per_matrix(each, weight.shape, axes, layers, shaped_as_weights=shaped_as_weights)
            for each in statistics
        ]
        batch = sizes(layers_shape(weight.shape, axes, layers), axes, "batch")
        keys = jax.random.split(key, math.prod(batch))
        keys, known = jax.tree.map(
            lambda leaf: leaf.reshape(*batch, *leaf.shape[1:]), (keys, known)
        )
        return by_matrix(of_part, stack, weight, axes, layers, keys, known)

    if shardings is None:
        return jax.jit(of_weight)
    whole = uncut(shardings[0].mesh)
    # A weight whose values are not used still decides on which devices the program runs.
    return jax.jit(
        functools.partial(cut_as, ((*shardings, whole), whole), of_weight),
        keep_unused=True,
    )


def _difference(base: Array, weight2d: Array, scale: float, lora_A: Array, lora_B: Array) -> Array:
    """Returns how far a base is from W - s · A · B, relative to the sizes of W and s · A · B."""
    wide = common_dtype(weight2d.dtype, lora_A.dtype, lora_B.dtype, jnp.float32)
    product = scale * jnp.matmul(
        lora_A.astype(wide), lora_B.astype(wide), precision=jax.lax.Precision.HIGHEST
    )
    expected = (weight2d.astype(wide) - product).astype(weight2d.dtype).astype(wide)
    size = jnp.linalg.norm(weight2d.astype(wide)) + jnp.linalg.norm(product)
    return jnp.linalg.norm(base.astype(wide) - expected) / jnp.where(size == 0, 1, size)


def _check_base(path: str, differences: Any, dtype: Any) -> None:
    """Raises if an initialiser returned another base than W - s · A · B, where that is known."""
    for each in jax.tree.leaves(differences):
        if is_tracer(each):
            continue
        # An initialiser may round its product as the hardware does by default, to bfloat16 or so.
        allowed = max(2 * epsilon(dtype), epsilon(jnp.bfloat16) / 4)
        difference = float(np.max(np.asarray(each)))
        if difference > allowed:
            raise ValueError(
                f"`init` returned a base for '{path}' that differs from weight2d - scale * lora_A "
                f"@ lora_B by {difference:.2g} of their size; expected that, or weight2d itself. "
                "What the model computes at the start must be what it computed before."
            )


def _check_shapes(weight2d: Array, rank: int, base: Array, lora_A: Array, lora_B: Array) -> None:
    inputs, outputs = weight2d.shape
    shapes = {
        "a base": (base.shape, (inputs, outputs)),
        "lora_A": (lora_A.shape, (inputs, rank)),
        "lora_B": (lora_B.shape, (rank, outputs)),
    }
    if any(shape != expected for shape, expected in shapes.values()):
        came = ", ".join(f"{name} of shape {shape}" for name, (shape, _) in shapes.items())
        wanted = ", ".join(f"{expected}" for _, expected in shapes.values())
        raise _WrongShapesError(f"{came}, where {wanted} are expected,")


@dataclasses.dataclass(frozen=True)
class _Applied:
    """A `functools.partial` that equals others with the same function and the same arguments."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: tuple[Any, ...]

    def __call__(self, *args: Any) -> Any:
        arguments = [value for _, value in self.arguments]
        keywords = {name: value for name, _, value in self.keywords}
        return self.function(*arguments, *args, **keywords)


class _Unhashable(Same):
    """A function that equals only itself, since it can't be compared with others."""

    def __call__(self, *args: Any) -> Any:
        return self.value(*args)


def _by_content(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that hashes and compares by what it computes, as far as that shows."""
    if isinstance(function, functools.partial):
        applied = _Applied(
            function.func,
            tuple((type(value), value) for value in function.args),
            tuple((name, type(value), value) for name, value in sorted(function.keywords.items())),
        )
        return applied if is_hashable(applied) else function
    return function if is_hashable(function) else _Unhashable(function)
