"""`infer_axes`: how a function uses each weight, read off its jaxpr.

A weight is traced as a factored value with one probe for each of its axes: a term whose first
factor holds that axis alone. The transform's own rules move the probes along with the weight, and
at a contraction each probe shows where its axis has gone. Nothing is computed.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._axes import InferredAxes, WeightUse
from lora_jax._compat import Equation, evaluate_equation
from lora_jax._paths import path_strings
from lora_jax._selection import check_not_wrapped
from lora_jax._shapes import Axes, AxisRole
from lora_jax.transform._adapt import traced_function
from lora_jax.transform._factored import Factor, Factored, Term, base_of, without_windows
from lora_jax.transform._indexing import aligned_with_offsets, looked_up_axes
from lora_jax.transform._interpreter import Interpreter, Rule
from lora_jax.transform._output import Place, head_products, place_of
from lora_jax.transform._report import Use
from lora_jax.transform._rules import RULES
from lora_jax.transform._sharing import SharedFunctions
from lora_jax.transform._static import with_static
from lora_jax.transform._structure import reshape_groups


def infer_axes(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> InferredAxes:
    """Returns the axes of each weight of `params`, as `fn(params, *args, **kwargs)` uses them.

    An axis that a product sums over is an input axis, one that it keeps is an output axis, and one
    that it maps over, or that is cut layer by layer before, is a batch axis. In a lookup the rows
    are the inputs. The function is traced, not run, so arguments may be `jax.ShapeDtypeStruct`.

    Args:
      fn: any JAX function whose first argument holds the parameters.
      params: plain parameters.
      *args: the other arguments.
      **kwargs: the keyword arguments.

    Returns:
      A mapping from path to axes for `wrap(..., axes=...)`, which also makes `"all-linear"` exact.
      Weights whose uses disagree, and weights that no product, convolution or lookup uses, are not
      in it; its attributes `uses`, `disagreements` and `unused` tell of them; `print` shows all.

    Examples:
      >>> import jax, jax.numpy as jnp, lora_jax
      >>> params = {"query": jnp.ones((8, 2, 4)), "out": jnp.ones((2, 4, 8))}
      >>> def attend(params, x):
      ...     heads = jnp.einsum("te,ehd->thd", x, params["query"])
      ...     return jnp.einsum("thd,hde->te", heads, params["out"])
      >>> dict(lora_jax.infer_axes(attend, params, jnp.ones((5, 8))))
      {'out': ('in', 'in', 'out'), 'query': ('in', 'out', 'out')}
    """
    check_not_wrapped(params)
    arguments = with_static(((params, *args), kwargs))
    found: dict[str, list[WeightUse]] = {}
    jax.eval_shape(lambda arguments: _run_with_probes(fn, arguments, found), arguments)
    return InferredAxes({path: tuple(dict.fromkeys(uses)) for path, uses in found.items()})


@dataclasses.dataclass(frozen=True)
class _Probe:
    """What a probing term comes from: one axis of a weight."""

    path: str
    axis: int
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return self.path


def _run_with_probes(
    fn: Callable[..., Any], arguments: Any, found: dict[str, list[WeightUse]]
) -> None:
    flat, structure = jax.tree_util.tree_flatten_with_path(arguments)
    traced = traced_function(fn, structure, [leaf for _, leaf in flat])
    paths = path_strings([key_path for key_path, _ in flat], skip=2)
    values = [
        _probed(path, leaf) if _is_candidate(key_path, leaf) else leaf
        for path, (key_path, leaf) in zip(paths, flat, strict=True)
    ]
    found.update({value.path: [] for value in values if isinstance(value, Factored)})
    recorder = _Recorder([])
    others: list[Use] = []
    interpreter = Interpreter(
        {**RULES, **recorder.rules()}, SharedFunctions(), recorder=others.append
    )
    interpreter.run(traced.closed_jaxpr, values)
    products = frozenset(place for _, _, place in recorder.notes)
    heads = head_products(traced.closed_jaxpr, products)
    for path, use, place in recorder.notes:
        found[path].append(dataclasses.replace(use, is_output=place in heads))
    for other in others:
        found[other.path].append(WeightUse(other.primitive, other.source, None))


def _is_candidate(key_path: Sequence[Any], leaf: Any) -> bool:
    """Says whether a leaf of (args, kwargs) is a weight of the first argument."""
    is_of_params = key_path[0].idx == 0 and key_path[1] == jax.tree_util.SequenceKey(0)
    return is_of_params and jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim >= 2


def _probed(path: str, leaf: Any) -> Factored:
    """Returns a weight as a value with a probe for each axis."""
    held = [[1] * axis + [size] + [1] * (leaf.ndim - axis) for axis, size in enumerate(leaf.shape)]
    terms = tuple(
        Term(
            factor_A=Factor.of_aligned(jnp.zeros(shape)),
            factor_B=Factor.of_aligned(jnp.zeros([1] * (leaf.ndim + 1))),
            scale=jnp.zeros(()),
            window=(None,) * leaf.ndim,
            origin=_Probe(path, axis, leaf.shape),
        )
        for axis, shape in enumerate(held)
    )
    return Factored(leaf, terms)


@dataclasses.dataclass(frozen=True)
class _Recorder:
    """Rules that note how each weight is used, in place of those that compute with factors.

    Attributes:
      notes: the path of a weight, how it is used, and at which equation.
    """

    notes: list[tuple[str, WeightUse, Place]]

    def rules(self) -> Mapping[str, Rule]:
        """The rules that differ from the transform's own."""
        return {
            "add": self.arithmetic,
            "add_any": self.arithmetic,
            "concatenate": self.arithmetic,
            "conv_general_dilated": self.convolution,
            "div": self.arithmetic,
            "dot_general": self.dot_general,
            "gather": self.gather,
            "jit": self.jit,
            "mul": self.arithmetic,
            "ragged_dot_general": self.ragged_dot_general,
            "reshape": self.reshape,
            "stack": self.arithmetic,
            "sub": self.arithmetic,
        }

    def dot_general(
        self, interpreter: Interpreter, equation: Equation, inputs: list[Any]
    ) -> Sequence[Any]:
        """Notes the axes that are contracted, mapped over and kept."""
        contracted, batch = equation.params["dimension_numbers"]
        for position, value in enumerate(inputs):
            if isinstance(value, Factored):
                roles: list[AxisRole] = ["out"] * value.ndim
                for axis in contracted[position]:
                    roles[axis] = "in"
                for axis in batch[position]:
                    roles[axis] = "batch"
                self._note(interpreter, equation, value, roles)
        return _on_bases(equation, inputs)

    def convolution(
        self, interpreter: Interpreter, equation: Equation, inputs: list[Any]
    ) -> Sequence[Any] | None:
        """Notes a kernel's output features as outputs and all else as inputs."""
        x, kernel = inputs
        if isinstance(x, Factored):
            return None
        roles: list[AxisRole] = ["in"] * kernel.ndim
        roles[equation.params["dimension_numbers"].rhs_spec[0]] = "out"
        self._note(interpreter, equation, kernel, roles, untracked="in")
        return _on_bases(equation, inputs)

    def ragged_dot_general(
        self, interpreter: Interpreter, equation: Equation, inputs: list[Any]
    ) -> Sequence[Any] | None:
        """Notes the axes of a stack of experts."""
        numbers = equation.params["ragged_dot_dimension_numbers"]
        (_, contracted), (_, batch) = numbers.dot_dimension_numbers
        x, weight, _ = inputs
        if isinstance(x, Factored):
            return None
        roles: list[AxisRole] = ["out"] * weight.ndim
        for axis in contracted:
            roles[axis] = "in"
        for axis in (*batch, *numbers.rhs_group_dimensions):
            roles[axis] = "batch"
        self._note(interpreter, equation, weight, roles)
        return _on_bases(equation, inputs)

    def gather(
        self, interpreter: Interpreter, equation: Equation, inputs: list[Any]
    ) -> Sequence[Any] | None:
        """Notes a lookup of rows; or goes on with the weights that are picked out of a stack."""
        value, _ = inputs
        numbers = equation.params["dimension_numbers"]
        if not isinstance(value, Factored) or numbers.operand_batching_dims:
            return None
        looked_up = looked_up_axes(equation, value.shape)
        if value.ndim - len(looked_up) < 2:
            roles: list[AxisRole] = [
                "in" if axis in looked_up else "out" for axis in range(value.ndim)
            ]
            self._note(interpreter, equation, value, roles)
            return _on_bases(equation, inputs)
        picked = _on_bases(equation, inputs)[0]
        terms = tuple(
            term.moved(
                aligned_with_offsets(_cut(term.lora_A, looked_up), numbers, picked.ndim),
                aligned_with_offsets(term.lora_B, numbers, picked.ndim),
                (None,) * picked.ndim,
            )
            for term in (without_windows(term, value.shape) for term in value.terms)
        )
        return [Factored(picked, terms)]

    def reshape(
        self, interpreter: Interpreter, equation: Equation, inputs: list[Any]
    ) -> Sequence[Any] | None:
        """Returns the weight reshaped, each probe on all of the axes that its axis becomes."""
        value, new_shape = inputs[0], equation.params["new_sizes"]
        groups = reshape_groups(value.shape, new_shape)
        if groups is None:
            return None

        def spread(factor: jax.Array) -> jax.Array:
            held = {
                axis
                for old, new in groups
                for axis in new
                if any(factor.shape[place] != 1 for place in old)
            }
            sizes = [size if axis in held else 1 for axis, size in enumerate(new_shape)]
            return jnp.zeros((*sizes, 1))

        terms = tuple(
            term.moved(spread(term.lora_A), spread(term.lora_B), (None,) * len(new_shape))
            for term in (without_windows(term, value.shape) for term in value.terms)
        )
        return [Factored(_on_bases(equation, inputs)[0], terms)]

    def arithmetic(
        self, interpreter: Interpreter, equation: Equation, inputs: list[Any]
    ) -> Sequence[Any] | None:
        """Goes on with weights among themselves and with scalars; an activation ends the weight.

        A bias, a norm's scale, a position table and a class token meet activations here, and what
        comes out is an activation, whatever product it goes into next.
        """
        others = [value for value in inputs if not isinstance(value, Factored)]
        if any(jnp.ndim(value) > 0 for value in others):
            return None
        return RULES[equation.primitive.name](interpreter, equation, inputs)

    def jit(self, interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
        """Goes through a jitted function each time that it is called, for each layer it is in."""
        return interpreter.within(equation).run(equation.params["jaxpr"], inputs)

    def _note(
        self,
        interpreter: Interpreter,
        equation: Equation,
        value: Factored,
        roles: Sequence[AxisRole],
        untracked: AxisRole = "batch",
    ) -> None:
        """Notes, for each weight in `value`, which role each of its own axes plays."""
        for path, part in value.parts().items():
            use = WeightUse(
                equation.primitive.name,
                interpreter.source_of(equation),
                _original_axes(part.terms, roles, untracked),
            )
            self.notes.append((path, use, place_of(interpreter.callers, equation)))


def _original_axes(
    probes: Sequence[Term], roles: Sequence[AxisRole], untracked: AxisRole
) -> Axes | None:
    """Returns the role of each axis of the original weight, or None if it isn't a matrix here."""
    axes: list[AxisRole | None] = []
    for probe in probes:
        held = {roles[axis] for axis, size in enumerate(probe.lora_A.shape[:-1]) if size != 1}
        if len(held) > 1:
            return None
        is_unit = probe.origin.shape[probe.origin.axis] == 1  # type: ignore[attr-defined]
        # No axis is left of one that was cut before, layer by layer; one of size 1 can't be seen.
        axes.append(held.pop() if held else None if is_unit else "batch")
    for role in ("in", "out"):
        if role not in axes and None in axes:
            axes[axes.index(None)] = role
    known: Axes = tuple(untracked if axis is None else axis for axis in axes)
    return known if "in" in known and "out" in known else None


def _cut(factor: jax.Array, looked_up: Sequence[int]) -> jax.Array:
    """Returns a probe's factor without its extent on the looked-up axes."""
    for axis in looked_up:
        factor = jax.lax.slice_in_dim(factor, 0, 1, axis=axis)
    return factor


def _on_bases(equation: Equation, inputs: Sequence[Any]) -> list[Any]:
    return evaluate_equation(equation, [base_of(value) for value in inputs])
