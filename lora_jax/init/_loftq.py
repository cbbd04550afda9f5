"""LoRA-fine-tuning-aware quantisation."""

import dataclasses
import functools
import operator
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Shaped

from lora_jax._dtypes import epsilon
from lora_jax._paths import leaves_with_paths
from lora_jax.init._data import DataInitializer
from lora_jax.init._kaiming import kaiming
from lora_jax.init._linear_algebra import leading_singular_vectors, residual, widened
from lora_jax.init._protocol import Initializer, QuantizedBase
from lora_jax.quantization._encode import Encoding, quantized
from lora_jax.quantization._weight import AnyWeight, is_quantized

_Factors = tuple[Float[Array, "in r"], Float[Array, "r out"]]


@dataclasses.dataclass(frozen=True)
class QuantizingInitializer:
    """An initialiser that quantises the base of a weight that is not quantised yet.

    `wrap` takes it for `init=` like a function; `loftq` makes it.

    Attributes:
      encoding: how the base is quantised; None for nf4 in blocks of 64, and for a quantised weight
        as it is.
      steps: how often the base and the factors are found in turn.
      power_iterations: as for `pissa`.
    """

    encoding: Encoding | None = None
    steps: int = 1
    power_iterations: int | None = None

    def for_weight(self, weight: AnyWeight) -> Initializer:
        """Returns the initialiser of one weight; of a weight that keeps its codes, `kaiming`."""
        if is_quantized(weight) and self.encoding is None:
            return kaiming
        return functools.partial(
            _alternating,
            encoding=self.encoding or Encoding.checked("`loftq`"),
            steps=self.steps,
            power_iterations=self.power_iterations,
        )


def loftq(
    original: PyTree | None = None,
    *,
    format: str | None = None,  # noqa: A002 - the word of `quantize`
    block: SupportsIndex | None = 64,
    double_quantize: bool | None = None,
    steps: SupportsIndex = 1,
    power_iterations: int | None = None,
) -> QuantizingInitializer | DataInitializer:
    r"""Returns an initialiser whose factors make up for the quantisation of the base.

    From $A_0 B_0 = 0$ on, for t = 1 to T, with the rounding q of a format,

    $$ Q_t = q(W - s A_{t-1} B_{t-1}), \qquad s A_t B_t = \mathrm{SVD}_r(W - Q_t), $$

    the best approximation of rank r of what is left, with factors of the same norm as in `pissa`.
    The model starts as $Q_T + s A_T B_T$, which is nearer to W than $q(W)$ is. Where nothing is
    left to make up for, a column of A is drawn as in `kaiming`, and its row of B is zero. Adapters
    that were trained so belong to the base that is quantised, and not to W.

    `wrap(params, ..., init="loftq")` quantises the weights that it adapts, so that `params` are
    those before quantisation. A weight that is quantised already keeps its codes: what was lost is
    known from the original weights alone, `loftq(original)`, and without them it starts as with
    `kaiming`.

    Args:
      original: for a tree that is quantised already, the same tree before; the factors approximate
        the difference, and the bases stay as they are.
      format: as for `quantize`; by default `"nf4"`. A weight that is quantised already gets the
        format that is given here, from what it dequantises to.
      block: as for `quantize`.
      double_quantize: as for `quantize`.
      steps: T. With 1, the base is what `quantize` gives; more bring the sum nearer to W.
      power_iterations: as for `pissa`, for large weights.

    Returns:
      What `init=` of `wrap` takes.

    Raises:
      ValueError: `format` or `block` is none of those of `quantize`; `steps` is below 1; or
        `original` is given together with a `format` or with more steps, which would change the
        base that is quantised already.
      TypeError: a setting has the wrong type.

    Source: Li et al., LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models, 2023,
    algorithm 1.

    Examples:
      >>> import jax, jax.numpy as jnp, lora_jax
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (128, 64))}
      >>> wrapped = lora_jax.wrap(params, "kernel", rank=16, init="loftq")
      >>> quantized = lora_jax.quantize(params, "kernel")
      >>> init = lora_jax.init.loftq(params)
      >>> also = lora_jax.wrap(quantized, "kernel", rank=16, init=init)
      >>> def error(tree):
      ...     return float(jnp.linalg.norm(tree["kernel"] - params["kernel"]))
      >>> both = error(lora_jax.merge(wrapped)), error(lora_jax.merge(also))
      >>> max(both) < 0.9 * error(lora_jax.quantization.dequantize(quantized))
      True
    """
    steps = _checked_steps(steps)
    if format is not None:
        encoding = Encoding.checked(
            "`loftq`", format=format, block=block, double_quantize=double_quantize
        )
    elif (block, double_quantize) == (64, None):
        encoding = None
    else:
        encoding = Encoding.checked("`loftq`", block=block, double_quantize=double_quantize)
    if original is None:
        return QuantizingInitializer(encoding, steps, power_iterations)
    if encoding is not None or steps > 1:
        raise ValueError(
            "`original` is given together with a format or with several steps, and both would "
            "change the base, which is quantised already; expected loftq(original) alone, or "
            "wrap(original, ..., init=loftq(format=..., steps=...)), which quantises it."
        )
    function = functools.partial(_of_difference, power_iterations=power_iterations)
    arrays = {path: leaf for path, leaf in leaves_with_paths(original) if not is_quantized(leaf)}
    return DataInitializer(function, arrays, shaped_as_weights=True)


def _checked_steps(steps: Any) -> int:
    if isinstance(steps, bool) or not hasattr(steps, "__index__"):
        raise TypeError(f"`steps` is {steps!r}; expected a whole number of at least 1.")
    if operator.index(steps) < 1:
        raise ValueError(f"`steps` is {steps}; expected a whole number of at least 1.")
    return operator.index(steps)


def _alternating(
    key: PRNGKeyArray,
    weight2d: Shaped[Array, "in out"],
    rank: int,
    scale: float,
    *,
    encoding: Encoding,
    steps: int,
    power_iterations: int | None,
) -> tuple[QuantizedBase, Float[Array, "in r"], Float[Array, "r out"]]:
    wide = widened(weight2d)

    def step(_: Any, factors: tuple[_Factors, _Factors]) -> tuple[_Factors, _Factors]:
        _, moved = factors
        left = residual(weight2d, scale, *moved)
        rounded = quantized(left, ("in", "out"), encoding).dequantize()
        found = _factors_of(
            key, wide - rounded.astype(wide.dtype), wide, rank, scale, power_iterations
        )
        return moved, found

    none = (
        jnp.zeros((wide.shape[0], rank), wide.dtype),
        jnp.zeros((rank, wide.shape[1]), wide.dtype),
    )
    moved, (lora_A, lora_B) = jax.lax.fori_loop(0, steps, step, (none, none))
    return QuantizedBase(encoding, *(moved if steps > 1 else (None, None))), lora_A, lora_B


def _of_difference(
    key: PRNGKeyArray,
    weight2d: Shaped[Array, "in out"],
    rank: int,
    scale: float,
    original2d: Shaped[Array, "in out"],
    *,
    power_iterations: int | None,
) -> tuple[Shaped[Array, "in out"], Float[Array, "in r"], Float[Array, "r out"]]:
    wide = widened(original2d)
    left = wide - weight2d.astype(wide.dtype)
    return weight2d, *_factors_of(key, left, wide, rank, scale, power_iterations)


def _factors_of(
    key: PRNGKeyArray,
    left: Float[Array, "in out"],
    weight2d: Float[Array, "in out"],
    rank: int,
    scale: float,
    power_iterations: int | None,
) -> _Factors:
    """Returns factors whose product is nearest to `left`, and that train where it is zero."""
    drawn, decomposed = jax.random.split(key)
    U, S, Vt = leading_singular_vectors(
        decomposed, left, rank, power_iterations=power_iterations, oversampling=10
    )
    root = jnp.sqrt(S / scale)
    is_left = epsilon(left.dtype) * jnp.linalg.norm(weight2d) < S
    _, spare, _ = kaiming(drawn, left, rank, scale)
    lora_A = jnp.where(is_left[None], U * root[None], spare)
    return lora_A, jnp.where(is_left[:, None], root[:, None] * Vt, 0)
