"""The rule for convolutions: a convolution with lora_A, then lora_B on its channels."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lora_jax._compat import Equation, Primitive, primitives
from lora_jax._dtypes import common_dtype
from lora_jax._shapes import AxisRole, Size
from lora_jax.transform._bases import computed_with_bases
from lora_jax.transform._building import chosen
from lora_jax.transform._dense import built
from lora_jax.transform._factored import Factored, multiplied
from lora_jax.transform._interpreter import Interpreter, scope_of
from lora_jax.transform._product import Labelled, product
from lora_jax.transform._roles import note_roles
from lora_jax.transform._rows import recorded
from lora_jax.transform._terms import Term, without_windows
from lora_jax.transform.rules._contraction import product_dtype
from lora_jax.transform.rules._rule import Rule


def conv_general_dilated(
    interpreter: Interpreter, equation: Equation, inputs: list[Any]
) -> Sequence[Any] | None:
    r"""Returns the convolution with $W$ plus, for each term, one with lora_A mixed by lora_B.

    With $\Delta W_{h w i o} = \sum_r A_{h w i r} B_{r o}$, convolving is convolving with the r
    kernels of A and then mixing the r channels by B, at each position separately. With feature
    groups, output channel o reads the inputs of its own group g(o) only; all groups share A, so the
    convolution with A gives r channels for each group, and B mixes the channels of the group.
    """
    x, weight = inputs
    if isinstance(x, Factored) or equation.params["batch_group_count"] != 1:
        return None
    terms = [without_windows(term, weight.shape) for term in weight.terms]
    found = [_kernel_and_mixer(term, feature_axis_of(equation)) for term in terms]
    factors = [pair for pair in found if pair is not None]
    features = weight.shape[feature_axis_of(equation)]
    # A kernel that was repeated along its features has factors that don't depend on them.
    if any(mixer.shape[feature_axis_of(equation)] != features for _, mixer in factors):
        return None
    if len(factors) < len(terms) or not weight.held_by_gain <= {feature_axis_of(equation)}:
        return None
    how = chosen(
        interpreter.reporter,
        equation,
        weight,
        *_costs(equation, weight),
        may_build=not interpreter.dropout.is_active,
        may_merge=False,
    )
    if how == "dense":
        return computed_with_bases(equation, [x, built(weight)])
    base = result = computed_with_bases(equation, inputs)[0]
    with scope_of(equation), jax.named_scope("lora"):
        for use, (term, (kernel, mixer)) in enumerate(zip(terms, factors, strict=True)):
            adapter_input = interpreter.dropout.dropped_out(x, use)
            scale = interpreter.dropout.scaled(term.scale)
            whole = _whole_kernel(equation, kernel, weight.shape)
            result += _change(equation, adapter_input, whole, mixer, scale, base)
        if weight.gain is not None:
            out_axis = equation.params["dimension_numbers"].out_spec[1]
            shape = [size if axis == out_axis else 1 for axis, size in enumerate(base.shape)]
            gain = weight.gain.aligned.reshape(shape)
            result = multiplied(result, gain).astype(base.dtype)
    return [result]


def roles(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Sequence[Any] | None:
    """Records a kernel's output features as outputs and everything else as inputs."""
    x, kernel = inputs
    if isinstance(x, Factored):
        return None
    own: list[AxisRole] = ["in"] * kernel.ndim
    own[feature_axis_of(equation)] = "out"
    note_roles(interpreter, equation, kernel, own, untracked="in")
    return computed_with_bases(equation, inputs)


def rows(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
    """Returns the convolution with the base, the patches that the kernel meets recorded."""
    x, weight = inputs
    result = computed_with_bases(equation, inputs)[0]
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
        result = recorded(result, hidden, counter)
    return [result]


def _kernel_and_mixer(term: Term, feature_axis: int) -> tuple[Array, Array] | None:
    """Returns the factor that holds all but the output features, and the one that holds them."""
    for kernel, mixer in ((term.lora_A, term.lora_B), (term.lora_B, term.lora_A)):
        mixes_only_features = all(
            size == 1 for axis, size in enumerate(mixer.shape[:-1]) if axis != feature_axis
        )
        if kernel.shape[feature_axis] == 1 and mixes_only_features:
            return kernel, mixer
    return None


def _whole_kernel(equation: Equation, kernel: Array, shape: tuple[Size, ...]) -> Array:
    """Returns a factor with its whole extent on all axes but the output features."""
    feature_axis = feature_axis_of(equation)
    sizes = [1 if axis == feature_axis else size for axis, size in enumerate(shape)]
    return jnp.broadcast_to(kernel, (*sizes, kernel.shape[-1]))


def _change(
    equation: Equation, x: Array, kernel: Array, mixer: Array, scale: Array, base: Array
) -> Array:
    """Returns scale · mix(conv(x, kernel), mixer) in the shape and dtype of `base`."""
    groups, rank = equation.params["feature_group_count"], kernel.shape[-1]
    dtype = common_dtype(x.dtype, kernel.dtype, mixer.dtype)
    hidden = convolved(equation, x.astype(dtype), kernel.astype(dtype))
    out_axis = equation.params["dimension_numbers"].out_spec[1]
    precision = equation.params["precision"]
    return _mixed(hidden, mixer.astype(dtype), scale, out_axis, groups, rank, precision, base)


def convolved(equation: Equation, x: Array, kernel: Array) -> Array:
    """Returns the convolution with each of a factor's r kernels: groups · r channels.

    Args:
      equation: the model's convolution.
      x: its input.
      kernel: the factor, aligned: 1 at the output features, and the rank last.
    """
    feature_axis = feature_axis_of(equation)
    kernels = jnp.moveaxis(kernel.squeeze(feature_axis), -1, feature_axis)
    return jax.lax.conv_general_dilated(
        x,
        jnp.concatenate([kernels] * equation.params["feature_group_count"], axis=feature_axis),
        **{
            **{name: equation.params[name] for name in _SAME_PARAMETERS},
            "preferred_element_type": product_dtype(equation, x.dtype),
        },
    )


def _mixed(
    hidden: Array,
    mixer: Array,
    scale: Array,
    out_axis: int,
    groups: int,
    rank: int,
    precision: Any,
    base: Array,
) -> Array:
    """Returns the channels of each group mixed, with the output features at `out_axis`."""
    shape = base.shape
    before, after = tuple(range(out_axis)), tuple(range(out_axis + 1, base.ndim))
    group_label, rank_label, feature_label = base.ndim, base.ndim + 1, out_axis
    split = hidden.reshape(*shape[:out_axis], groups, rank, *shape[out_axis + 1 :])
    features = mixer.reshape(groups, shape[out_axis] // groups, rank)
    joined = product(
        [
            Labelled(split, (*before, group_label, rank_label, *after)),
            Labelled(features, (group_label, feature_label, rank_label)),
        ],
        (*before, group_label, feature_label, *after),
        scale=scale,
        precision=precision,
    )
    return joined.array.reshape(shape).astype(base.dtype)


def _costs(equation: Equation, kernel: Factored) -> tuple[Size, list[Size]]:
    """Returns the FLOPs of the base op, and those of the products of each term."""
    features = kernel.shape[feature_axis_of(equation)]
    output: Any = equation.outvars[0].aval
    size = math.prod(output.shape)
    places = size // features
    window = math.prod(kernel.shape) // features
    groups = equation.params["feature_group_count"]
    of_terms = [2 * places * term.rank * (groups * window + features) for term in kernel.terms]
    return 2 * size * window, of_terms


def feature_axis_of(equation: Equation) -> int:
    """Returns the weight's axis of output features."""
    return equation.params["dimension_numbers"].rhs_spec[0]


_SAME_PARAMETERS = (
    "window_strides",
    "padding",
    "lhs_dilation",
    "rhs_dilation",
    "dimension_numbers",
    "feature_group_count",
    "precision",
)


def rules() -> dict[Primitive, Rule]:
    """Returns the rule of convolutions."""
    return {
        primitives.conv_general_dilated_p: Rule(
            factors=conv_general_dilated, roles=roles, rows=rows
        )
    }
