"""The evaluator: equations one after the other, functions within them, loops and devices."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax._compat import ClosedJaxpr, Equation, Jaxpr, Literal
from tests.evaluation._arrays import ARRAYS
from tests.evaluation._collectives import COLLECTIVES, axis_numbers, joined, shards
from tests.evaluation._elementwise import ELEMENTWISE
from tests.evaluation._lookups import LOOKUPS
from tests.evaluation._products import PRODUCTS
from tests.evaluation._random import RANDOM

_OPS: dict[str, Callable[..., Any]] = ELEMENTWISE | ARRAYS | PRODUCTS | LOOKUPS | RANDOM

# Values in here are lists, with one for each device of the `shard_map` around, or one.
Devices = list[Any]


def evaluate(closed_jaxpr: ClosedJaxpr, inputs: Sequence[Any]) -> list[np.ndarray]:
    """Returns the outputs of a traced program for arrays."""
    with np.errstate(all="ignore"):
        outputs = _run(closed_jaxpr, [[_array(each)] for each in inputs], 1)
    return [output[0] for output in outputs]


def _array(x: Any) -> Any:
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        words = np.asarray(jax.random.key_data(x)).astype(np.uint64)
        return (words[..., 0] << np.uint64(32)) | words[..., 1]
    return np.asarray(x)


def _run(jaxpr: ClosedJaxpr | Jaxpr, inputs: Sequence[Devices], count: int) -> list[Devices]:
    constants: Sequence[Any] = ()
    if isinstance(jaxpr, ClosedJaxpr):
        jaxpr, constants = jaxpr.jaxpr, jaxpr.consts
    values: dict[Any, Devices] = {
        var: [_array(value)] * count for var, value in zip(jaxpr.constvars, constants, strict=True)
    }
    values.update(zip(jaxpr.invars, inputs, strict=True))

    def value_of(atom: Any) -> Devices:
        return (
            [np.asarray(atom.val, atom.aval.dtype)] * count
            if isinstance(atom, Literal)
            else values[atom]
        )

    for equation in jaxpr.eqns:
        outputs = _outputs(equation, [value_of(atom) for atom in equation.invars], count)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [value_of(atom) for atom in jaxpr.outvars]


def _outputs(equation: Equation, inputs: list[Devices], count: int) -> Sequence[Devices]:
    name, params = equation.primitive.name, equation.params
    if name in _FORMS:
        return _FORMS[name](equation, inputs, count)
    if name == "axis_index":
        return [axis_numbers(count)]
    if name in COLLECTIVES:
        return [COLLECTIVES[name](each, **params) for each in inputs]
    if name not in _OPS:
        raise NotImplementedError(f"{name} is not among the evaluator's ops: {equation}")
    by_device = []
    for device in range(count):
        given = _OPS[name](*(each[device] for each in inputs), **params)
        given = given if isinstance(given, list) else [given]
        by_device.append(
            [_of_type(array, var.aval) for array, var in zip(given, equation.outvars, strict=True)]
        )
    return [list(each) for each in zip(*by_device, strict=True)]


def _of_type(array: Any, aval: Any) -> Any:
    """Returns an array in the dtype that JAX says it has, of the shape that it says."""
    array = np.asarray(array)
    assert array.shape == aval.shape, (array.shape, aval)
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return array
    return array if array.dtype == aval.dtype else array.astype(aval.dtype)


def _called(equation: Equation, inputs: list[Devices], count: int) -> list[Devices]:
    body = next(equation.params[key] for key in ("jaxpr", "call_jaxpr") if key in equation.params)
    return _run(body, inputs, count)


def _scan(equation: Equation, inputs: list[Devices], count: int) -> list[Devices]:
    params = equation.params
    if "ft_in" in params:
        constants, carried, _ = params["ft_in"].unpack()
        constant_count, carry_count = len(constants), len(carried)
    else:
        constant_count, carry_count = params["num_consts"], params["num_carry"]
    constants, state = inputs[:constant_count], inputs[constant_count:][:carry_count]
    stacks = inputs[constant_count + carry_count :]
    steps: list[list[Devices]] = [None] * params["length"]
    for i in reversed(range(params["length"])) if params["reverse"] else range(params["length"]):
        cut = [[stack[i] for stack in each] for each in stacks]
        outputs = _run(params["jaxpr"], [*constants, *state, *cut], count)
        state, steps[i] = outputs[:carry_count], outputs[carry_count:]
    stacked = []
    for place, var in enumerate(equation.outvars[carry_count:]):
        stacked.append(
            [
                np.stack([step[place][device] for step in steps])
                if steps
                else np.zeros(var.aval.shape, var.aval.dtype)
                for device in range(count)
            ]
        )
    return [*state, *stacked]


def _while(equation: Equation, inputs: list[Devices], count: int) -> list[Devices]:
    params = equation.params
    test_count, body_count = params["cond_nconsts"], params["body_nconsts"]
    test, body = inputs[:test_count], inputs[test_count:][:body_count]
    state = inputs[test_count + body_count :]
    while np.all(_run(params["cond_jaxpr"], [*test, *state], count)[0][0]):
        state = _run(params["body_jaxpr"], [*body, *state], count)
    return state


def _cond(equation: Equation, inputs: list[Devices], count: int) -> list[Devices]:
    index, *operands = inputs
    branches = equation.params["branches"]
    return _run(branches[int(np.clip(index[0], 0, len(branches) - 1))], operands, count)


def _shard_map(equation: Equation, inputs: list[Devices], count: int) -> list[Devices]:
    assert count == 1
    devices = equation.params["mesh"].size
    cut = [
        shards(each[0], spec, devices)
        for each, spec in zip(inputs, equation.params["in_specs"], strict=True)
    ]
    outputs = _run(equation.params["jaxpr"], cut, devices)
    return [
        [joined(each, spec)]
        for each, spec in zip(outputs, equation.params["out_specs"], strict=True)
    ]


def _callback(equation: Equation, inputs: list[Devices], count: int) -> list[Devices]:
    outputs = equation.params["callback"](*(each[0] for each in inputs))
    return [[np.asarray(output)] for output in outputs]


_FORMS: dict[str, Callable[[Equation, list[Devices], int], Sequence[Devices]]] = {
    "checkpoint": _called,
    "closed_call": _called,
    "composite": _called,
    "cond": _cond,
    "core_call": _called,
    "custom_jvp_call": _called,
    "custom_vjp_call": _called,
    "custom_vmap_call": lambda equation, inputs, count: _run(
        equation.params["call"], inputs, count
    ),
    "eval_jaxpr": _called,
    "jit": _called,
    "platform_index": lambda equation, inputs, count: [[np.asarray(0, np.int32)] * count],
    "pjit": _called,
    "pure_callback": _callback,
    "remat": _called,
    "remat2": _called,
    "scan": _scan,
    "shard_map": _shard_map,
    "while": _while,
}
