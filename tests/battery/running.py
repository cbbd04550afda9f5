"""Running rows, and comparing what they give with what the dense weights give."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType

import lora_jax
from tests.battery.model import expected_results, model_of
from tests.battery.problems import problem_of, shapes_of
from tests.battery.rows import Row
from tests.battery.transforms import DRAWS, DROPOUT, directions
from tests.evaluation import evaluate

# How many standard errors a mean over draws may be off, as the root of the mean of squares.
_STANDARD_ERRORS = 3.0

# What all but cancels is compared with this share of what it is among.
_SHARE = 0.01


@dataclasses.dataclass(frozen=True)
class Failure:
    """A row that did not give what the dense weights give, and how."""

    row: Row
    reason: str

    def __str__(self) -> str:
        return f"{self.row.name}: {self.reason}"


def failures_of(rows: Iterable[Row]) -> list[Failure]:
    """Returns the rows that fail."""
    reasons = ((row, reason_against(row)) for row in rows)
    return [Failure(row, reason) for row, reason in reasons if reason]


def reason_against(row: Row) -> str:
    """Returns what is wrong with a row, or nothing."""
    try:
        with _on_mesh(row.option.mesh):
            result = _result(row)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if row.kind == "shapes":
        return ""
    reasons: list[str] = []
    problem = problem_of(row.layout, row.option, row.base)
    for place, (adapter, example) in enumerate(row.transform.instances):
        actual = jax.tree.map(lambda leaf, place=place: leaf[place], result)
        expected = expected_results(row.op, problem, adapter, example)
        reasons += _COMPARED[row.kind](row, problem, actual, expected)
    return "; ".join(dict.fromkeys(reasons))


def _result(row: Row) -> Any:
    """Returns what a row gives: traced as a whole by JAX, and then computed in NumPy."""
    problem = problem_of(row.layout, row.option, row.base)
    inputs = problem.stacked_adapters, problem.frozen, problem.xs
    shapes = shapes_of(problem, None if row.option.mesh is None else mesh_of(row.option.mesh))
    closed_jaxpr, outputs = jax.make_jaxpr(applied(row), return_shape=True)(*shapes)
    if row.kind == "shapes":
        return None
    values = evaluate(closed_jaxpr, jax.tree.leaves(inputs))
    return jax.tree.unflatten(jax.tree.structure(outputs), values)


@contextlib.contextmanager
def _on_mesh(kind: str | None) -> Iterator[None]:
    if kind is None:
        yield
        return
    with jax.set_mesh(mesh_of(kind)):
        yield


@functools.cache
def mesh_of(kind: str) -> jax.sharding.Mesh:
    types = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
    return jax.make_mesh((2,), ("d",), axis_types=(types[kind],))


def applied(row: Row) -> Callable[..., Any]:
    """Returns the function from the inputs of a row to what is compared."""
    dropout = DROPOUT if row.kind == "mean" else 0.0
    adapted = lora_jax.adapt(model_of(row.op, row.option), on_materialize="ignore", dropout=dropout)
    if not row.op.reverse and row.transform.kind in ("gradients", "shapes"):
        adapted = _not_differentiated(adapted)
    return functools.partial(row.transform.apply, adapted)


def _not_differentiated(model: Callable[..., Any]) -> Callable[..., Any]:
    return lambda wrapped, x: jax.lax.stop_gradient(model(jax.lax.stop_gradient(wrapped), x))


def _compared_results(row: Row, problem: Any, actual: Any, expected: Any) -> list[str]:
    return _differences(actual[0], expected[0], row.tolerance)


def _compared_gradients(row: Row, problem: Any, actual: Any, expected: Any) -> list[str]:
    gradients = {
        name: {leaf: getattr(node, leaf) for leaf in expected[1][name]}
        for name, node in actual[1].items()
    }
    return _differences(actual[0], expected[0], row.tolerance) + [
        f"gradient of {name} is off by {error:.1e}"
        for name, gradient in gradients.items()
        if not (error := relative_error(gradient, expected[1][name], expected[1]))
        <= 4 * row.tolerance
    ]


def _compared_slopes(row: Row, problem: Any, actual: Any, expected: Any) -> list[str]:
    along = directions(problem.adapters[0])
    terms = [
        (gradient[leaf], np.asarray(getattr(along[name], leaf), np.float64))
        for name, gradient in (expected[1] or {}).items()
        for leaf in gradient
    ]
    reasons = _differences(actual[0], expected[0], row.tolerance)
    if not terms:
        return reasons
    slope = sum(float(np.sum(g * d)) for g, d in terms)
    size = math.sqrt(sum(np.sum(g**2) for g, _ in terms)) * math.sqrt(
        sum(np.sum(d**2) for _, d in terms)
    )
    error = abs(float(actual[1]) - slope) / max(size, 1e-30)
    return reasons + ([f"slope is off by {error:.1e}"] if not error <= 2 * row.tolerance else [])


def _compared_means(row: Row, problem: Any, actual: Any, expected: Any) -> list[str]:
    """Each result is linear in the masks of its uses, so that its mean is the dense result."""
    reasons: list[str] = []
    if not row.op.linear:
        return reasons
    floor = _SHARE * _norm(expected[0])
    means, deviations = actual
    for (name, mean), (_, deviation), (_, dense) in zip(
        *(jax.tree_util.tree_leaves_with_path(tree) for tree in (means, deviations, expected[0])),
        strict=True,
    ):
        place = jax.tree_util.keystr(name)
        rounding = row.tolerance * max(_norm(dense), floor) / math.sqrt(max(dense.size, 1))
        error = deviation / math.sqrt(DRAWS) + 2 * rounding
        off = float(np.sqrt(np.mean(((mean - dense) / error) ** 2)))
        if not off <= _STANDARD_ERRORS:
            reasons.append(f"mean of {place} is off by {off:.1f} standard errors")
    return reasons


_COMPARED = {
    "results": _compared_results,
    "gradients": _compared_gradients,
    "slope": _compared_slopes,
    "mean": _compared_means,
}


def _differences(actual: Any, expected: Any, tolerance: float) -> list[str]:
    pairs = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    errors = {
        jax.tree_util.keystr(path): relative_error(array, dense, expected)
        for (path, array), dense in pairs
    }
    return [
        f"{path} is off by {error:.1e}" for path, error in errors.items() if not error <= tolerance
    ]


def relative_error(actual: Any, expected: Any, among: Any, *, share: float = _SHARE) -> float:
    """Returns the error relative to what is expected, or to a share of what it is among."""
    difference = jax.tree.map(
        lambda a, e: np.asarray(a, np.float64) - np.asarray(e, np.float64), actual, expected
    )
    return _norm(difference) / max(_norm(expected), share * _norm(among), 1e-30)


def _norm(tree: Any) -> float:
    leaves = (np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree))
    return math.sqrt(sum(float(np.sum(np.square(leaf))) for leaf in leaves))
