r"""`input_moments`: the sums of x and x xᵀ over the inputs of each weight.

Backpropagation brings them out of whatever the model is made of: loops, rematerialised and jitted
functions, branches. Each weight carries a probe $P = [I, 0]$ in the place of lora_A, with in + 1
columns. Where the model multiplies x by the weight, $h = x P = [x, 0]$ is computed beside it, and
what comes back to $h$ in the backward pass is set to $[x, 1]$, whatever the loss. The gradient of
P is then $\sum x^\top [x, 1] = [\sum x^\top x, \sum x^\top]$, summed over all uses, and apart for
each place of a batch axis. A second probe of ones in the place of lora_B receives 1 for each row,
and counts them. Where weights are joined, it also says which rows are a weight's own, being 0
outside of the term's window.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lora_jax._compat import Equation, evaluate_equation
from lora_jax._paths import leaves_with_paths, listed
from lora_jax._selection import SelectedWeight, selected_weights
from lora_jax._shapes import Axes, batch_places, factor_places, factor_shapes, side_size, sizes
from lora_jax._targets import Targets
from lora_jax.init._moments import InputMoments
from lora_jax.transform._adapt import traced_function
from lora_jax.transform._contraction import labels_of, rank_label_of
from lora_jax.transform._convolution import convolved, feature_axis_of
from lora_jax.transform._factored import Factor, Factored, Term, base_of, without_windows
from lora_jax.transform._interpreter import Interpreter, Rule
from lora_jax.transform._product import Labels, product, without_unit_axes
from lora_jax.transform._rules import RULES
from lora_jax.transform._sharing import SharedFunctions
from lora_jax.transform._static import with_static

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

    They are what `lora_jax.init.eva` and `lora_jax.init.corda` start from. The model is run as it
    is; its inputs to each weight are found by the transform, through loops, convolutions (whose
    inputs are patches) and experts.

    Args:
      fn: a function `(params, batch)` with a differentiable output, such as a loss or logits.
      params: plain params.
      batches: what `fn` takes beside them, batch by batch; tuples are one argument.
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
    """Returns the probes of a weight: [I, 0] for each of its matrices, and a one to count with."""
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
    leaves, structure = jax.tree.flatten(((params, batch), {}))
    traced = traced_function(fn, structure, leaves)
    paths = [path for path, _ in leaves_with_paths(params)]
    probed = [
        _probed(path, leaf, weights[path].axes, probes[path]) if path in weights else leaf
        for path, leaf in zip(paths, leaves, strict=False)
    ]
    values = [*probed, *leaves[len(paths) :]]
    interpreter = Interpreter({**RULES, **_RECORDING_RULES}, SharedFunctions())
    outputs = [base_of(value) for value in interpreter.run(traced.closed_jaxpr, values)]
    differentiable = [y for y in outputs if jnp.issubdtype(y.dtype, jnp.inexact)]
    return sum((_real_sum(y) for y in differentiable), jnp.zeros(()))


def _real_sum(array: Array) -> Array:
    """Returns the sum of all real and imaginary parts."""
    parts = [array.real, array.imag] if jnp.iscomplexobj(array) else [array]
    return sum((jnp.sum(part.astype(jnp.float32)) for part in parts), jnp.zeros(()))


def _probed(path: str, leaf: Array, axes: Axes, probes: tuple[Array, Array]) -> Factored:
    # The scale is zero: where the weight itself is needed, it is built without the probes.
    term = Term(
        factor_A=Factor(probes[0], factor_places(axes)[0]),
        factor_B=Factor(probes[1], batch_places(axes)),
        scale=jnp.zeros(()),
        window=(None,) * len(axes),
        origin=path,
    )
    return Factored(jax.lax.stop_gradient(leaf), (term,))


@jax.custom_vjp
def _recorded(result: Array, hidden: Array, counter: Array) -> Array:
    """Returns `result`; backwards, gives [x, 1] to hidden = [x, 0] and 1 for each row.

    A row that isn't the weight's own has a counter of 0, and gives nothing.
    """
    del hidden, counter
    return result


def _recorded_forward(result: Array, hidden: Array, counter: Array) -> tuple[Array, Any]:
    rows = (hidden * counter[..., None]).at[..., -1].set(counter)
    return result, (rows, counter)


def _recorded_backward(saved: Any, cotangent: Array) -> tuple[Array, Array, Array]:
    return cotangent, *saved


_recorded.defvjp(_recorded_forward, _recorded_backward)


def _dot_general(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
    labels, output = labels_of(equation, inputs)
    result = evaluate_equation(equation, [base_of(value) for value in inputs])[0]
    for position, value in enumerate(inputs):
        other = inputs[1 - position]
        if isinstance(value, Factored) and not isinstance(other, Factored):
            for term in value.terms:
                result = _with_rows(
                    result,
                    other,
                    labels[1 - position],
                    without_windows(term, value.shape),
                    labels[position],
                    output,
                )
    return [result]


def _with_rows(
    result: Array, x: Array, x_labels: Labels, probe: Term, labels: Labels, output: Labels
) -> Array:
    """Returns `result`, the rows of x recorded if the op sums over the weight's input axes."""
    held = {label for label, size in zip(labels, probe.lora_A.shape, strict=False) if size != 1}
    summed = {label for label in x_labels if label in labels and label not in output}
    if held - set(output) != {
        label
        for label, size in zip(x_labels, x.shape, strict=True)
        if label in summed and size != 1
    }:
        return result
    rank_label = rank_label_of(0, (x_labels, labels))
    x = x.astype(jnp.float32)
    operands = [
        without_unit_axes(array, named)
        for array, named in ((x, x_labels), (probe.lora_A, (*labels, rank_label)))
    ]
    hidden = product(operands, (*output, rank_label), precision=jax.lax.Precision.HIGHEST)
    counter = without_unit_axes(probe.lora_B, (*labels, rank_label))
    # Along the weight's outputs any place will do: a row is multiplied by all of them.
    outputs = [axis for axis, name in enumerate(counter.labels) if name not in hidden.labels]
    held_labels = [name for name in counter.labels if name in hidden.labels]
    order = [name for name in hidden.labels[:-1] if name in held_labels]
    rows = jnp.max(counter.array, axis=tuple(outputs)).transpose(
        [held_labels.index(name) for name in order]
    )
    absent = [axis for axis, name in enumerate(hidden.labels[:-1]) if name not in order]
    rows = jnp.broadcast_to(jnp.expand_dims(rows, absent), hidden.array.shape[:-1])
    return _recorded(result, hidden.array, rows)


def _convolution(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
    x, weight = inputs
    result = evaluate_equation(equation, [base_of(x), base_of(weight)])[0]
    if isinstance(x, Factored):
        return [result]
    for term in weight.terms:
        probe = without_windows(term, weight.shape)
        if probe.lora_A.shape[feature_axis_of(equation)] != 1:
            continue
        patches = convolved(equation, x.astype(jnp.float32), probe.lora_A)
        out_axis = equation.params["dimension_numbers"].out_spec[1]
        hidden = jnp.moveaxis(patches, out_axis, -1)
        hidden = hidden.reshape(*hidden.shape[:-1], -1, probe.rank)
        counter = jnp.broadcast_to(jnp.max(probe.lora_B), hidden.shape[:-1])
        result = _recorded(result, hidden, counter)
    return [result]


def _ragged_dot_general(
    interpreter: Interpreter, equation: Equation, inputs: list[Any]
) -> Sequence[Any]:
    x, weight, group_sizes = inputs
    result = evaluate_equation(equation, [base_of(value) for value in inputs])[0]
    if isinstance(x, Factored):
        return [result]
    for term in weight.terms:
        probe = without_windows(term, weight.shape)
        experts = group_sizes.shape[0]
        kernels = jnp.broadcast_to(
            probe.lora_A.squeeze(2), (experts, *weight.shape[1:2], probe.rank)
        )
        counters = jnp.broadcast_to(
            jnp.max(probe.lora_B, axis=(1, 2)).reshape(-1, 1, 1), (experts, 1, 1)
        )
        hidden = jax.lax.ragged_dot(x.astype(jnp.float32), kernels, group_sizes)
        rows = jax.lax.ragged_dot(jnp.ones((x.shape[0], 1)), counters, group_sizes)
        result = _recorded(result, hidden, rows.squeeze(-1))
    return [result]


def _converted(
    interpreter: Interpreter, equation: Equation, inputs: list[Any]
) -> Sequence[Any] | None:
    """Returns the weight in another dtype, its probes in float32: they hold sums."""
    (value,) = inputs
    if not jnp.issubdtype(equation.params["new_dtype"], jnp.floating):
        return None
    base = evaluate_equation(equation, [value.base])[0]
    return [dataclasses.replace(value, base=base)]


def _multiplied(
    interpreter: Interpreter, equation: Equation, inputs: list[Any]
) -> Sequence[Any] | None:
    """Returns the weight times an array; along its outputs that changes nothing of its inputs."""
    weights = [value for value in inputs if isinstance(value, Factored)]
    others = [value for value in inputs if not isinstance(value, Factored)]
    is_linear = equation.primitive.name == "mul" or isinstance(inputs[0], Factored)
    if is_linear and len(weights) == 1 and jnp.ndim(others[0]) == weights[0].ndim:
        held = [axis for axis, size in enumerate(others[0].shape) if size != 1]
        if all(term.lora_A.shape[axis] == 1 for term in weights[0].terms for axis in held):
            base = evaluate_equation(equation, [base_of(value) for value in inputs])[0]
            return [dataclasses.replace(weights[0], base=base)]
    return RULES[equation.primitive.name](interpreter, equation, inputs)


def _called(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
    """Returns the outputs of a function without its own derivative rule, which knows no probes."""
    return interpreter.within(equation).run(equation.params["call_jaxpr"], inputs)


_RECORDING_RULES: Mapping[str, Rule] = {
    "conv_general_dilated": _convolution,
    "convert_element_type": _converted,
    "custom_jvp_call": _called,
    "custom_vjp_call": _called,
    "div": _multiplied,
    "dot_general": _dot_general,
    "mul": _multiplied,
    "ragged_dot_general": _ragged_dot_general,
}
