"""Rules for calls: an inner function is rewritten, and called again under its own name.

Each is expressed through JAX's public function, so that its policies, names and derivative rules
hold for the rewritten function too. Factored values enter it as they are: they are pytrees.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Sharding
from jaxtyping import PRNGKeyArray

from lora_jax._compat import Equation, Primitive, primitives, rebound
from lora_jax.transform._base_shards import placed_base
from lora_jax.transform._bases import base_of
from lora_jax.transform._deferred import is_deferred
from lora_jax.transform._factored import Factored
from lora_jax.transform._interpreter import Interpreter, scope_of
from lora_jax.transform._report import Reporter, Use
from lora_jax.transform._sharing import Place, SharedFunction, origins_of, with_origins
from lora_jax.transform.rules._rule import Rule
from lora_jax.transform.rules.placement import placed


def jit(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
    """Returns the outputs of a jitted function, rewritten and jitted under its own name.

    The shardings and layouts that the model asked for apply to the inputs and outputs. An input
    that the model donates is donated, unless it is factored.
    """
    params = equation.params
    inputs = _placed(inputs, params["in_shardings"], params["in_layouts"])
    donated = tuple(
        position + 1  # after the dropout key
        for position, is_donated in enumerate(params["donated_invars"])
        if is_donated and not isinstance(inputs[position], Factored)
    )
    options = {
        "donate_argnums": donated,
        "inline": params["inline"],
        "keep_unused": params["keep_unused"],
        "compiler_options": dict(params["compiler_options_kvs"]) or None,
    }
    with scope_of(equation):
        outputs = _called_shared(
            interpreter,
            equation,
            lambda body: jax.jit(_named(body, params["name"]), **options),
            (params["name"], donated, *(params[name] for name in _JIT_SETTINGS)),
            inputs,
        )
    return _placed(outputs, params["out_shardings"], params["out_layouts"])


_JIT_SETTINGS = ("inline", "keep_unused", "compiler_options_kvs")


def jit_inline(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
    """Evaluates a jitted function at each call, once for each layer that it is part of."""
    return interpreter.within(equation).run(equation.params["jaxpr"], inputs)


def remat(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
    """Returns the outputs of a rematerialised function, with all of its parameters kept."""
    inner = interpreter.within(equation)

    def body(key: PRNGKeyArray | None, *arguments: Any) -> list[Any]:
        return inner.with_key(key).run_open(equation.params["jaxpr"], (), arguments)

    with scope_of(equation):
        return rebound(equation, body, (interpreter.dropout.key_of(), *inputs))


def closed_call(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
    """Returns the outputs of a plain call."""
    inner = interpreter.within(equation).with_key(interpreter.dropout.key_of())
    return inner.run(equation.params["call_jaxpr"], inputs)


def _called_shared(
    interpreter: Interpreter,
    equation: Equation,
    transformed: Callable[[Callable[..., Any]], Callable[..., Any]],
    settings: Hashable,
    inputs: Sequence[Any],
) -> Sequence[Any]:
    """Returns the outputs of an inner function that is rewritten and transformed only once.

    Other weights of the same shapes reuse it: inside, positions stand for weights.

    Args:
      interpreter: at the call.
      equation: the call.
      transformed: turns the rewritten function into the one that is called, as `jax.jit` does.
      settings: all of the equation's parameters that `transformed` depends on.
      inputs: the inputs of the call.
    """
    closed_jaxpr = equation.params["jaxpr"]
    dropout, reporter = interpreter.dropout, interpreter.reporter
    origins = origins_of(inputs)
    places = [Place(index, str(origin)) for index, origin in enumerate(origins)]
    keyed = [dropout.key_of(), *with_origins(inputs, dict(zip(origins, places, strict=True)))]
    leaves, structure = jax.tree.flatten(keyed)
    # A jaxpr is hashed by identity, and the memo keeps it alive.
    types = tuple(map(jax.typeof, leaves))
    signature = closed_jaxpr, settings, dropout.settings, structure, types
    function = interpreter.shared.get(signature)
    if function is None:
        uses: list[Use] = []
        body = dataclasses.replace(
            interpreter,
            reporter=Reporter(uses.append, (*reporter.callers, equation)),
            # The memo outlives the trace that this key belongs to.
            dropout=dropout.with_key(None),
        )
        call = transformed(lambda key, *inputs: body.with_key(key).run(closed_jaxpr, inputs))
        outputs = call(*keyed)
        function = SharedFunction(call, tuple(map(str, places)), tuple(uses))
        interpreter.shared.add(signature, function)
    else:
        outputs = function.call(*keyed)
    for use in function.uses_of(origins):
        reporter.tell(use)
    return with_origins(outputs, dict(zip(places, origins, strict=True)))


def _placed(values: Sequence[Any], shardings: Sequence[Any], layouts: Sequence[Any]) -> list[Any]:
    """Returns the values under the shardings and layouts that are given."""
    return [
        _with_layout(_with_sharding(value, sharding), layout)
        for value, sharding, layout in zip(values, shardings, layouts, strict=True)
    ]


def _with_sharding(value: Any, sharding: Any) -> Any:
    if not isinstance(sharding, Sharding):
        return value
    if not isinstance(value, Factored):
        return jax.lax.with_sharding_constraint(value, sharding)
    base = placed_base(value.base, sharding, jax.lax.with_sharding_constraint)
    return placed(value, base, sharding, jax.lax.with_sharding_constraint)


def _with_layout(value: Any, layout: Any) -> Any:
    """Returns a value, or the array that is the base of a factored one, in a layout."""
    if not isinstance(layout, Layout) or is_deferred(base_of(value)):
        return value
    if isinstance(value, Factored):
        return dataclasses.replace(value, base=with_layout_constraint(value.base, layout))
    return with_layout_constraint(value, layout)


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    function.__name__ = function.__qualname__ = name
    return function


def rules() -> dict[Primitive, Rule]:
    """Returns the rules of calls."""
    return {
        primitives.closed_call_p: Rule(factors=closed_call),
        primitives.jit_p: Rule(factors=jit, roles=jit_inline),
        primitives.remat_p: Rule(factors=remat),
    }
