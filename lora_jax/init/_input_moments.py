"""`input_moments`: the sums of x and x xᵀ over the inputs of each weight.

Backpropagation extracts them from any model, through loops, rematerialised and jitted functions,
and branches. `lora_jax.transform._rows` derives how.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lora_jax._paths import leaves_with_paths, listed
from lora_jax._selection import SelectedWeight, selected_weights
from lora_jax._shapes import Axes, batch_places, factor_places, factor_shapes, side_size, sizes
from lora_jax._targets import Targets
from lora_jax.init._moments import InputMoments
from lora_jax.quantization._weight import is_quantized
from lora_jax.transform._adapt import traced_function
from lora_jax.transform._bases import array_of, stand_in
from lora_jax.transform._factored import Factored
from lora_jax.transform._interpreter import Interpreter
from lora_jax.transform._sharing import SharedFunctions
from lora_jax.transform._static import with_static
from lora_jax.transform._terms import Factor, Term
from lora_jax.transform.rules import with_rows

Probes = dict[str, tuple[Array, Array]]


def input_moments(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    targets: Targets,
    axes: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, InputMoments]:
    r"""Returns, for each target, the sums of its inputs $x$ and of $x x^\top$ over some batches.

    `lora_jax.init.eva` and `lora_jax.init.corda` start from them. The model runs unchanged; the
    transform finds the inputs of each weight, through loops, convolutions (whose inputs are
    patches) and experts.

    Args:
      fn: a function `(params, batch)` with a differentiable output, such as a loss or logits.
      params: plain params.
      batches: the second arguments of `fn`, one for each batch; a tuple is one argument.
      targets: which weights, in the forms of `wrap`.
      axes: as for `wrap`.

    Returns:
      The moments of each weight by its path; float32, of shapes (batch, in, in) and (batch, in),
      where several input axes are flattened into one.

    Raises:
      ValueError: there is no batch; `targets` or `axes` does not fit; or no output depends on a
        weight as a factor of its input, as for an embedding that is only looked up.

    Examples:
      >>> import jax.numpy as jnp, lora_jax
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> batches = [jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0]])]
      >>> moments = lora_jax.init.input_moments(fn, params, batches, targets="kernel")["kernel"]
      >>> moments.second.tolist(), moments.first.tolist(), moments.count.tolist()
      ([[[10.0, 14.0], [14.0, 20.0]]], [[4.0, 6.0]], [2.0])
    """
    weights = selected_weights(params, targets, axes=axes)
    probes = {path: _probes(weight) for path, weight in weights.items()}

    @jax.jit
    def moments_of(params: Any, probes: Probes, batch: Any) -> Any:
        return jax.grad(lambda probes: _total(fn, params, batch, weights, probes))(probes)

    total: Any = None
    for batch in batches:
        of_batch = moments_of(with_static(params), probes, with_static(batch))
        total = of_batch if total is None else jax.tree.map(jnp.add, total, of_batch)
    if total is None:
        raise ValueError("`batches` is empty; expected at least one batch of the model's inputs.")
    moments = {path: _moments(weights[path], *total[path]) for path in weights}
    unseen = [path for path, each in moments.items() if not bool(jnp.any(each.count > 0))]
    if unseen:
        raise ValueError(
            f"`targets` selects {listed(unseen)}, by which `fn` multiplies nothing that its output "
            "depends on differentiably; leave it out, or return logits or a loss from `fn`."
        )
    return moments


def _probes(weight: SelectedWeight) -> tuple[Array, Array]:
    """Returns the probes of a weight: [I, 0] for each of its matrices, and ones to count rows."""
    inputs = side_size(weight.leaf.shape, weight.axes, "in")
    shape, _ = factor_shapes(weight.leaf.shape, weight.axes, inputs + 1)
    batch = sizes(weight.leaf.shape, weight.axes, "batch")
    identity = jnp.eye(inputs, inputs + 1).reshape(shape[len(batch) :])
    return jnp.broadcast_to(identity, shape), jnp.ones(batch)


def _moments(weight: SelectedWeight, gradient: Array, count: Array) -> InputMoments:
    inputs = side_size(weight.leaf.shape, weight.axes, "in")
    sums = gradient.reshape(-1, inputs, inputs + 1)
    return InputMoments(second=sums[..., :-1], first=sums[..., -1], count=count.reshape(-1))


def _total(
    fn: Callable[..., Any],
    params: Any,
    batch: Any,
    weights: Mapping[str, SelectedWeight],
    probes: Probes,
) -> Array:
    """Returns a number that depends on every differentiable output of `fn`."""
    leaves, structure = jax.tree.flatten(((params, batch), {}), is_leaf=is_quantized)
    traced = traced_function(fn, structure, list(map(stand_in, leaves)))
    paths = [path for path, _ in leaves_with_paths(params)]
    probed = [
        _probed(path, leaf, weights[path].axes, probes[path]) if path in weights else leaf
        for path, leaf in zip(paths, leaves, strict=False)
    ]
    values = [
        Factored(value, ()) if is_quantized(value) else value
        for value in (*probed, *leaves[len(paths) :])
    ]
    interpreter = Interpreter(with_rows(), SharedFunctions())
    outputs = [array_of(value) for value in interpreter.run(traced.closed_jaxpr, values)]
    differentiable = [y for y in outputs if jnp.issubdtype(y.dtype, jnp.inexact)]
    return sum((_real_sum(y) for y in differentiable), jnp.zeros(()))


def _real_sum(array: Array) -> Array:
    """Returns the sum of all real and imaginary parts."""
    parts = [array.real, array.imag] if jnp.iscomplexobj(array) else [array]
    return sum((jnp.sum(part.astype(jnp.float32)) for part in parts), jnp.zeros(()))


def _probed(path: str, leaf: Any, axes: Axes, probes: tuple[Array, Array]) -> Factored:
    # The scale is zero: where the weight itself is needed, it is built without the probes.
    term = Term(
        factor_A=Factor(probes[0], factor_places(axes)[0]),
        factor_B=Factor(probes[1], batch_places(axes)),
        scale=jnp.zeros(()),
        window=(None,) * len(axes),
        origin=path,
    )
    return Factored(jax.lax.stop_gradient(leaf), (term,))
