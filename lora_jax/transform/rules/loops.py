"""Rules for branches and loops: the body is rewritten, and the op is called again around it.

Each op is expressed through JAX's public function. Factored values enter bodies unchanged, since
they are pytrees. A changing value leaves a body as an array.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from lora_jax._compat import (
    ClosedJaxpr,
    Equation,
    Jaxpr,
    Literal,
    Primitive,
    called_jaxpr,
    primitives,
    scan_counts,
)
from lora_jax.transform._bases import stacked_base
from lora_jax.transform._building import materialized
from lora_jax.transform._factored import Factored
from lora_jax.transform._interpreter import Interpreter, scope_of
from lora_jax.transform._terms import Factor
from lora_jax.transform.rules._rule import Rule


def cond(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
    """Returns the outputs of the chosen branch."""
    index, *operands = inputs

    def rewritten(branch: ClosedJaxpr) -> Callable[..., list[Any]]:
        def body(key: PRNGKeyArray | None, *arguments: Any) -> list[Any]:
            outputs = interpreter.within(equation).with_key(key).run(branch, arguments)
            return materialized(interpreter.reporter, equation, outputs)

        return body

    branches = [rewritten(branch) for branch in equation.params["branches"]]
    platforms = equation.params.get("branches_platforms")
    with scope_of(equation):
        if platforms is not None:
            return _of_platform(platforms, branches, (interpreter.dropout.key_of(), *operands))
        return jax.lax.switch(index, branches, interpreter.dropout.key_of(), *operands)


def _of_platform(
    platforms: Sequence[Sequence[str] | None], branches: Sequence[Any], arguments: Sequence[Any]
) -> Any:
    """Returns the outputs of the branch for the platform that the program is compiled for."""
    by_platform = {
        platform: branch
        for names, branch in zip(platforms, branches, strict=True)
        for platform in names or ("default",)
    }
    return jax.lax.platform_dependent(*arguments, **by_platform)


def scan(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
    """Returns the outputs of a scan whose constants or scanned stacks are factored.

    A stack of weights is scanned layer by layer, base and factors alike.
    """
    body = equation.params["jaxpr"]
    constant_count, carry_count = scan_counts(equation)
    constants = inputs[:constant_count]
    carry = _Carry.of(
        interpreter, equation, body.jaxpr, inputs[constant_count:][:carry_count], constant_count
    )
    scanned = inputs[constant_count + carry_count :]
    stacks = [_Stack.of(value) for value in scanned]
    returned = _returned_stacks(
        body.jaxpr, scanned, constant_count + carry_count, body.jaxpr.outvars[carry_count:]
    )
    length = equation.params["length"]
    loop = interpreter.within(equation, times=length)
    key = interpreter.dropout.key_of()

    def step(
        counted: tuple[Any, list[Any]], slices: list[Any]
    ) -> tuple[tuple[Any, list[Any]], list[Any]]:
        count, state = counted
        layers = [stack.layer(leaves) for stack, leaves in zip(stacks, slices, strict=True)]
        in_round = loop.with_key(_key_of_round(key, count))
        outputs = in_round.run(body, [*constants, *carry.joined(state), *layers])
        state = materialized(loop.reporter, equation, carry.changing(outputs[:carry_count]))
        new = [y for y, old in zip(outputs[carry_count:], returned, strict=True) if old is None]
        return (_next_round(count), state), materialized(loop.reporter, equation, new)

    leaves = [stack.leaves for stack in stacks]
    with scope_of(equation):
        (_, state), stacked = jax.lax.scan(
            step,
            (_first_round(key), carry.changing(carry.initial)),
            leaves,
            # What is scanned knows its length, which may be a symbol.
            length=None if jax.tree.leaves(leaves) else length,
            reverse=equation.params["reverse"],
            unroll=equation.params["unroll"],
        )
    new = iter(stacked)
    return [*carry.joined(state), *(next(new) if old is None else old for old in returned)]


def _first_round(key: PRNGKeyArray | None) -> Array | None:
    """Returns the counter that gives each round of a loop its own dropout; None in evaluation."""
    return None if key is None else jnp.zeros((), jnp.uint32)


def _next_round(count: Array | None) -> Array | None:
    return None if count is None else count + jnp.uint32(1)


def _key_of_round(key: PRNGKeyArray | None, count: Array | None) -> PRNGKeyArray | None:
    return None if key is None or count is None else jax.random.fold_in(key, count)


def while_loop(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
    """Returns the final state of a while loop that reads factored weights."""
    test, body = equation.params["cond_jaxpr"], equation.params["body_jaxpr"]
    test_count, body_count = equation.params["cond_nconsts"], equation.params["body_nconsts"]
    test_constants, body_constants = inputs[:test_count], inputs[test_count:][:body_count]
    carry = _Carry.of(
        interpreter, equation, body.jaxpr, inputs[test_count + body_count :], body_count
    )

    inside = interpreter.within(equation)
    body_key, test_key = interpreter.dropout.key_of(0), interpreter.dropout.key_of(1)

    def goes_on(counted: tuple[Any, list[Any]]) -> Any:
        count, state = counted
        in_round = inside.with_key(_key_of_round(test_key, count))
        (result,) = in_round.run(test, [*test_constants, *carry.joined(state)])
        return materialized(inside.reporter, equation, [result])[0]

    def step(counted: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
        count, state = counted
        in_round = inside.with_key(_key_of_round(body_key, count))
        outputs = in_round.run(body, [*body_constants, *carry.joined(state)])
        return _next_round(count), materialized(inside.reporter, equation, carry.changing(outputs))

    initial = _first_round(body_key), carry.changing(carry.initial)
    with scope_of(equation):
        _, state = jax.lax.while_loop(goes_on, step, initial)
    return carry.joined(state)


def _returned_stacks(
    body: Jaxpr, scanned: Sequence[Any], first: int, outputs: Sequence[Any]
) -> list[Factored | None]:
    """Returns, for each stacked output, the factored stack that it equals, or None.

    A body that returns the weights of its layer unchanged rebuilds the stack that came in.
    """
    by_input = {
        variable: value
        for variable, value in zip(body.invars[first:], scanned, strict=True)
        if isinstance(value, Factored)
    }
    behind = [_input_behind(body, output) for output in outputs]
    return [None if each is None else by_input.get(each) for each in behind]


def _input_behind(jaxpr: Jaxpr, atom: Any) -> Any | None:
    """Returns the input that `atom` equals, also through calls that pass it on, or None."""
    if isinstance(atom, Literal):
        return None
    definitions = {output: equation for equation in jaxpr.eqns for output in equation.outvars}
    while atom in definitions:
        equation = definitions[atom]
        body = called_jaxpr(equation)
        if body is None:
            return None
        inner = _input_behind(body, body.outvars[equation.outvars.index(atom)])
        if inner is None:
            return None
        atom = equation.invars[body.invars.index(inner)]
        if isinstance(atom, Literal):
            return None
    return atom if atom in jaxpr.invars else None


@dataclasses.dataclass(frozen=True)
class _Carry:
    """What a loop carries: the values that change, and the values that it only passes on.

    A weight that the body passes on unchanged is a constant in disguise and stays factored. A
    weight that the body changes must be an array.
    """

    initial: list[Any]
    is_handed_on: list[bool]

    @classmethod
    def of(
        cls,
        interpreter: Interpreter,
        equation: Equation,
        body: Jaxpr,
        initial: Sequence[Any],
        constant_count: int,
    ) -> "_Carry":
        carried_in = body.invars[constant_count:][: len(initial)]
        is_handed_on = [
            isinstance(value, Factored) and _input_behind(body, after) is before
            for value, before, after in zip(
                initial, carried_in, body.outvars[: len(initial)], strict=True
            )
        ]
        values = [
            value if same else materialized(interpreter.reporter, equation, [value])[0]
            for value, same in zip(initial, is_handed_on, strict=True)
        ]
        return cls(values, is_handed_on)

    def changing(self, values: Sequence[Any]) -> list[Any]:
        """Returns the `values` that the loop changes."""
        return [x for x, same in zip(values, self.is_handed_on, strict=True) if not same]

    def joined(self, state: Sequence[Any]) -> list[Any]:
        """Returns all carried values: the changing ones from `state`, the others unchanged."""
        rest = iter(state)
        return [
            value if same else next(rest)
            for value, same in zip(self.initial, self.is_handed_on, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class _Stack:
    """A scanned input: the leaves that are cut along their first axis, and what they belong to."""

    value: Any

    @classmethod
    def of(cls, value: Any) -> "_Stack":
        if not isinstance(value, Factored):
            return cls(value)
        return cls(value.without_windows().map_factors(Factor.as_stack))

    @property
    def leaves(self) -> Any:
        """The arrays to scan; a factor that is the same for all layers is not among them."""
        if not isinstance(self.value, Factored):
            return self.value
        factors = [
            factor.cuts for term in self.value.terms for factor in (term.factor_A, term.factor_B)
        ]
        gain = self.value.gain
        return stacked_base(self.value), factors, gain and gain.cuts

    def layer(self, leaves: Any) -> Any:
        """Returns one layer of the stack, from one step's cut of `leaves`."""
        if not isinstance(self.value, Factored):
            return leaves
        base, cuts, gain_cut = leaves
        terms = tuple(
            dataclasses.replace(
                term,
                factor_A=term.factor_A.layer(A_cut),
                factor_B=term.factor_B.layer(B_cut),
                window=term.window[1:],
            )
            for term, A_cut, B_cut in zip(self.value.terms, cuts[::2], cuts[1::2], strict=True)
        )
        gain = self.value.gain
        return Factored(base, terms, gain and gain.layer(gain_cut))


def rules() -> dict[Primitive, Rule]:
    """Returns the rules of branches and loops."""
    return {
        primitives.cond_p: Rule(factors=cond),
        primitives.scan_p: Rule(factors=scan),
        primitives.while_p: Rule(factors=while_loop),
    }
