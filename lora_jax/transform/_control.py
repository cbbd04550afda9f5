"""Rules for control flow: the body is rewritten, and the op is called again around it.

Each op is expressed through JAX's public function, so that its policies, names and derivative
rules hold for the rewritten body too. Factored values enter bodies as they are: they are pytrees.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec, Sharding
from jaxtyping import PRNGKeyArray

from lora_jax._compat import ClosedJaxpr, Equation, Jaxpr, scan_counts
from lora_jax.transform._factored import Factor, Factored, without_windows
from lora_jax.transform._forwarding import input_behind
from lora_jax.transform._interpreter import Interpreter, Rule, scope_of


def jit(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
    """Returns the outputs of a jitted function, rewritten and jitted under its own name.

    Shardings that the model asked for hold for what goes in and comes out.
    """
    inputs = _sharded(inputs, equation.params["in_shardings"])
    with scope_of(equation):
        outputs = interpreter.call_shared(
            equation,
            lambda body: jax.jit(
                _named(body, equation.params["name"]), inline=equation.params["inline"]
            ),
            inputs,
        )
    return _sharded(outputs, equation.params["out_shardings"])


def remat(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
    """Returns the outputs of a rematerialised function under its own policy."""
    inner = interpreter.within(equation)

    def body(key: PRNGKeyArray | None, *arguments: Any) -> list[Any]:
        return inner.with_key(key).run_open(equation.params["jaxpr"], (), arguments)

    rewritten = jax.checkpoint(
        body, prevent_cse=equation.params["prevent_cse"], policy=equation.params["policy"]
    )
    with scope_of(equation):
        return rewritten(interpreter.next_key(), *inputs)


def closed_call(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
    """Returns the outputs of a plain call."""
    return interpreter.within(equation).run(equation.params["call_jaxpr"], inputs)


def cond(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
    """Returns the outputs of the chosen branch."""
    index, *operands = inputs

    def rewritten(branch: ClosedJaxpr) -> Callable[..., list[Any]]:
        def body(key: PRNGKeyArray | None, *arguments: Any) -> list[Any]:
            outputs = interpreter.within(equation).with_key(key).run(branch, arguments)
            return _arrays(interpreter, equation, outputs)

        return body

    branches = [rewritten(branch) for branch in equation.params["branches"]]
    with scope_of(equation):
        return jax.lax.switch(index, branches, interpreter.next_key(), *operands)


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
    loop = interpreter.within(equation, times=equation.params["length"])

    def step(state: list[Any], cut: tuple[Any, list[Any]]) -> tuple[list[Any], list[Any]]:
        key, slices = cut
        layers = [stack.layer(leaves) for stack, leaves in zip(stacks, slices, strict=True)]
        outputs = loop.with_key(key).run(body, [*constants, *carry.joined(state), *layers])
        state = carry.changing(outputs[:carry_count])
        new = [y for y, old in zip(outputs[carry_count:], returned, strict=True) if old is None]
        return _arrays(loop, equation, state), _arrays(loop, equation, new)

    length = equation.params["length"]
    key = interpreter.next_key()
    keys = None if key is None else jax.random.split(key, length)
    with scope_of(equation):
        state, stacked = jax.lax.scan(
            step,
            carry.changing(carry.initial),
            (keys, [stack.leaves for stack in stacks]),
            length=length,
            reverse=equation.params["reverse"],
            unroll=equation.params["unroll"],
        )
    new = iter(stacked)
    return [*carry.joined(state), *(next(new) if old is None else old for old in returned)]


def while_loop(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
    """Returns the final state of a while loop that reads factored weights."""
    test, body = equation.params["cond_jaxpr"], equation.params["body_jaxpr"]
    test_count, body_count = equation.params["cond_nconsts"], equation.params["body_nconsts"]
    test_constants, body_constants = inputs[:test_count], inputs[test_count:][:body_count]
    carry = _Carry.of(
        interpreter, equation, body.jaxpr, inputs[test_count + body_count :], body_count
    )

    inside = interpreter.within(equation)

    def goes_on(keyed: tuple[Any, list[Any]]) -> Any:
        key, state = keyed
        # The body starts from `key` itself; its masks and these are to be independent.
        own_key = None if key is None else jax.random.fold_in(key, 1)
        (result,) = inside.with_key(own_key).run(test, [*test_constants, *carry.joined(state)])
        return result

    def step(keyed: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
        key, state = keyed
        loop = inside.with_key(key)
        outputs = loop.run(body, [*body_constants, *carry.joined(state)])
        return loop.next_key(), _arrays(loop, equation, carry.changing(outputs))

    initial = interpreter.next_key(), carry.changing(carry.initial)
    with scope_of(equation):
        _, state = jax.lax.while_loop(goes_on, step, initial)
    return carry.joined(state)


def _returned_stacks(
    body: Jaxpr, scanned: Sequence[Any], first: int, outputs: Sequence[Any]
) -> list[Factored | None]:
    """Returns, for each stacked output, the factored stack that it is again, or None.

    A body that returns the weights of its layer as they came stacks what was a stack before.
    """
    by_input = {
        variable: value
        for variable, value in zip(body.invars[first:], scanned, strict=True)
        if isinstance(value, Factored)
    }
    behind = [input_behind(body, output) for output in outputs]
    return [None if each is None else by_input.get(each) for each in behind]


@dataclasses.dataclass(frozen=True)
class _Carry:
    """What a loop carries, told apart: values that change, and those that it only hands on.

    A weight that the body hands on unchanged is a constant in disguise: it stays factored. One that
    the body changes must be an array.
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
            isinstance(value, Factored) and input_behind(body, after) is before
            for value, before, after in zip(
                initial, carried_in, body.outvars[: len(initial)], strict=True
            )
        ]
        values = [
            value if same else _arrays(interpreter, equation, [value])[0]
            for value, same in zip(initial, is_handed_on, strict=True)
        ]
        return cls(values, is_handed_on)

    def changing(self, values: Sequence[Any]) -> list[Any]:
        """Returns those of `values` that the loop changes."""
        return [x for x, same in zip(values, self.is_handed_on, strict=True) if not same]

    def joined(self, state: Sequence[Any]) -> list[Any]:
        """Returns all carried values: the changing ones from `state`, the rest as they came."""
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
        return cls(_without_any_window(value))

    @property
    def leaves(self) -> Any:
        """The arrays to scan; a factor that is the same for all layers is not among them."""
        if not isinstance(self.value, Factored):
            return self.value
        factors = [
            factor.stored if factor.is_stack else None
            for term in self.value.terms
            for factor in (term.factor_A, term.factor_B)
        ]
        gain = self.value.gain
        return self.value.base, factors, gain.stored if gain and gain.is_stack else None

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


def shard_map(interpreter: Interpreter, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
    """Returns the outputs of a function that runs on each shard: factors are cut as W is."""
    values = [_without_any_window(value) for value in inputs]
    specs = [
        _factored_specs(value, spec)
        for value, spec in zip(values, equation.params["in_specs"], strict=True)
    ]

    def body(key: PRNGKeyArray | None, *arguments: Any) -> list[Any]:
        shard = interpreter.within(equation).with_key(
            _key_of_shard(key, equation.params["newly_manual_axes"])
        )
        return _arrays(shard, equation, shard.run_open(equation.params["jaxpr"], (), arguments))

    rewritten = jax.shard_map(
        body,
        mesh=equation.params["mesh"],
        in_specs=(PartitionSpec(), *specs),
        out_specs=list(equation.params["out_specs"]),
        axis_names=equation.params["newly_manual_axes"],
        check_vma=equation.params["check_vma"],
    )
    with scope_of(equation):
        return rewritten(interpreter.next_key(), *values)


def _key_of_shard(key: PRNGKeyArray | None, axes: Iterable[str]) -> PRNGKeyArray | None:
    """Returns a key of its own for each shard, so that no two drop the same places."""
    if key is None:
        return None
    for axis in sorted(axes):
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    return key


def _factored_specs(value: Any, spec: Any) -> Any:
    """Returns the spec of each array of a factored weight: that of W, where the array holds it."""
    if not isinstance(value, Factored):
        return spec
    axes = (*spec, *(None,) * (value.ndim - len(spec)), None)
    replicated: Any = PartitionSpec()

    def factor_spec(factor: Factor) -> Any:
        cut = {
            place: axis
            for axis, place, size in zip(axes, factor.places, factor.aligned.shape, strict=True)
            if place is not None and size != 1
        }
        spec: Any = PartitionSpec(*(cut.get(place) for place in range(factor.stored.ndim)))
        return dataclasses.replace(factor, stored=spec)

    terms = tuple(
        dataclasses.replace(
            term,
            factor_A=factor_spec(term.factor_A),
            factor_B=factor_spec(term.factor_B),
            scale=replicated,
        )
        for term in value.terms
    )
    return Factored(spec, terms, value.gain and factor_spec(value.gain))


def _without_any_window(value: Any) -> Any:
    if not isinstance(value, Factored):
        return value
    terms = tuple(without_windows(term, value.shape) for term in value.terms)
    return dataclasses.replace(value, terms=terms)


def _sharded(values: Sequence[Any], shardings: Sequence[Any]) -> list[Any]:
    """Returns the values under the shardings that are given; of a factored one, its base."""
    return [
        _with_base_sharded(value, sharding) if isinstance(sharding, Sharding) else value
        for value, sharding in zip(values, shardings, strict=True)
    ]


def _with_base_sharded(value: Any, sharding: Sharding) -> Any:
    if isinstance(value, Factored):
        base = jax.lax.with_sharding_constraint(value.base, sharding)
        return dataclasses.replace(value, base=base)
    return jax.lax.with_sharding_constraint(value, sharding)


def _arrays(interpreter: Interpreter, equation: Equation, values: Sequence[Any]) -> list[Any]:
    """Returns the values as arrays: what leaves a body as a changing value can't stay factored."""
    return interpreter.materialize(equation, values)


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    function.__name__ = function.__qualname__ = name
    return function


RULES: dict[str, Rule] = {
    "checkpoint": remat,
    "closed_call": closed_call,
    "cond": cond,
    "core_call": closed_call,
    "jit": jit,
    "pjit": jit,
    "remat": remat,
    "remat2": remat,
    "scan": scan,
    "shard_map": shard_map,
    "while": while_loop,
}
