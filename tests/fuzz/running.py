"""Running a program, and comparing what it gives with what the dense weights give."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from tests.battery.model import cotangents
from tests.battery.problems import Dense, weight_of
from tests.battery.registry import WIDTH
from tests.battery.running import relative_error
from tests.evaluation import evaluate
from tests.fuzz.ops import OPS, OPS_OF_SCALARS
from tests.fuzz.program import Program
from tests.fuzz.writer import GRADIENT_TRANSFORMS, Writer


def program_of(seed: int, case: int) -> Program:
    return Writer(seed, case).program(OPS, OPS_OF_SCALARS)


def reason_against(program: Program) -> str:
    """Returns what is wrong with a program adapted, or nothing."""
    random = np.random.default_rng([*program.seed, 1])
    wrapped = {
        name: weight_of(random, layout, option, base.format, dtype=option.dtype, rank=rank)
        for name, (layout, option, rank, base) in program.weights.items()
    }
    for name, (*_, base) in program.weights.items():
        if name in base.alone:
            wrapped[name] = wrapped[name].base
    adapters, frozen = lora_jax.split(wrapped)
    other = jax.tree.map(lambda x: x * np.asarray(-0.5, x.dtype), adapters)
    xs = random.integers(-16, 16, (2, 3, WIDTH)).astype(np.float32) / 8
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), adapters, other)
    function = program.function()
    adapted = lora_jax.adapt(function, on_materialize="ignore")

    def applied(*inputs: Any) -> Any:
        return program.transform.apply(adapted, *inputs)

    try:
        actual = _computed(applied, stacked, frozen, xs)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    epsilon = max(float(jnp.finfo(option.dtype).eps) for _, option, *_ in program.weights.values())
    # A narrow dtype leaves little of what cancels: there the whole is compared.
    share = 0.01 if 16 * epsilon < 1e-3 else 1.0
    for place, (adapter, example) in enumerate(program.transform.instances):
        tree = lora_jax.combine((adapters, other)[adapter], frozen)
        dense = {name: Dense.of(node) for name, node in tree.items()}
        cancellation = max(each.cancellation for each in dense.values())
        tolerance = max(1e-4, 16 * epsilon, float(np.finfo(np.float32).eps) * cancellation)
        results, gradients = _expected(function, dense, xs[example])
        given = jax.tree.map(lambda leaf, place=place: leaf[place], actual)
        for name, expected in results.items():
            error = relative_error(given[0][name], expected, results, share=share)
            if not error <= tolerance:
                return f"{name} is off by {error:.1e}"
        for name, expected in gradients.items():
            leaves = {leaf: getattr(given[1][name], leaf) for leaf in expected}
            error = relative_error(leaves, expected, gradients, share=share)
            if not error <= 2 * tolerance:
                return f"the gradient of {name} is off by {error:.1e}"
    return ""


def _expected(function: Any, dense: dict[str, Dense], x: np.ndarray) -> tuple[Any, dict[str, Any]]:
    """Returns the results of the dense weights in float64, and the adapters' gradients."""

    def with_gradients(params: Any, x: Any) -> Any:
        results, pullback = jax.vjp(lambda params: function(params, x), params)
        signs = jax.tree.map(lambda c, y: c.astype(y.dtype), cotangents(results), results)
        return results, pullback(signs)[0]

    with jax.enable_x64(True):
        values = {name: each.value for name, each in dense.items()}
        results, gradients = _computed(with_gradients, values, x.astype(np.float64))
    return results, {name: dense[name].gradient(each) for name, each in gradients.items()}


def _computed(function: Callable[..., Any], *inputs: Any) -> Any:
    """Returns what a function gives, traced by JAX and computed in NumPy."""
    closed_jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*inputs)
    return jax.tree.unflatten(
        jax.tree.structure(shapes), evaluate(closed_jaxpr, jax.tree.leaves(inputs))
    )


def smallest(program: Program) -> tuple[Program, str]:
    """Returns the smallest part of a program that fails, and how."""
    simpler = dataclasses.replace(program, transform=GRADIENT_TRANSFORMS[0])
    for each in (simpler, program):
        parts = sorted(map(each.only, each.results), key=lambda part: len(part.lines))
        for part in (*parts, each):
            if reason := reason_against(part):
                return part, reason
    return program, reason_against(program)


def failures(seed: int, cases: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Yields the number of each case, and what is wrong with it as text, or an empty one."""
    for case in cases:
        program = program_of(seed, case)
        if not reason_against(program):
            yield case, ""
            continue
        part, reason = smallest(program)
        yield case, f"python -m tests.fuzz --seed {seed} --case {case}: {reason}\n{part}\n"
