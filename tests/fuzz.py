"""Random programs: three to six random ops on random weights, compared with the dense ones.

`python -m tests.fuzz --cases 5000 --seed 0` runs any number of them. A case is what its seed and
its number say, on every machine, and is valid by construction: each op is written for the shape at
hand. A failure is printed as the smallest part of the program that fails still.
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from tests import conftest as _settings  # noqa: F401 - JAX as the tests have it
from tests.battery.layouts import LAYOUTS, Layout
from tests.battery.model import cotangents
from tests.battery.options import Option
from tests.battery.problems import Dense, weight_of
from tests.battery.registry import contracted, rows, squared, traced
from tests.battery.running import relative_error
from tests.battery.transforms import TRANSFORMS, Transform
from tests.evaluation import evaluate
from tests.progress import with_progress


def custom(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function with a derivative rule of its own."""
    with_rule = jax.custom_jvp(function)
    with_rule.defjvp(lambda primals, tangents: jax.jvp(function, primals, tangents))
    return with_rule


_NAMES = {each.__name__: each for each in (contracted, custom, rows, squared, traced)} | {
    "jax": jax,
    "jnp": jnp,
}
_TRANSFORMS = [each for each in TRANSFORMS if each.kind == "gradients"]
_WIDTH = 192
_LARGEST = 192


@dataclasses.dataclass(frozen=True)
class Value:
    """A variable of a program: its name, its shape, and whether it is a result."""

    name: str
    shape: tuple[int, ...]
    is_result: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Line:
    """`value = expression`, and the names that the expression reads."""

    value: Value
    expression: str
    reads: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.value.name} = {self.expression}  # {self.value.shape}"


@dataclasses.dataclass(frozen=True)
class Program:
    """A function of weights and activations, as text.

    Attributes:
      weights: the layout, the option and the rank of each weight.
      lines: what it computes, one after the other.
      transform: what is done to it.
      seed: what the numbers are drawn from.
    """

    weights: Mapping[str, tuple[Layout, Option, int]]
    lines: tuple[Line, ...]
    transform: Transform
    seed: tuple[int, int]

    @property
    def results(self) -> list[str]:
        return [line.value.name for line in self.lines if line.value.is_result]

    def only(self, result: str) -> "Program":
        """Returns what of the program one of its results needs."""
        needed = {result}
        kept: list[Line] = []
        for line in reversed(self.lines):
            if line.value.name in needed:
                needed.update(line.reads)
                kept.append(line)
        return dataclasses.replace(self, lines=tuple(reversed(kept)))

    def __str__(self) -> str:
        weights = [
            f"# {name}: {layout.axes}, {layout.shape}, rank {rank}, {option.name}"
            for name, (layout, option, rank) in self.weights.items()
        ]
        lines = [*map(str, self.lines), f"return {', '.join(self.results)}"]
        head = [f"# seed {self.seed[0]}, case {self.seed[1]}, {self.transform.name}", *weights]
        return "\n".join([*head, "def program(p, x):", *(f"    {line}" for line in lines)])

    def function(self) -> Callable[[Any, jax.Array], dict[str, jax.Array]]:
        """Returns the program as a function `(params, x) -> results`."""

        def run(params: Any, x: jax.Array) -> dict[str, jax.Array]:
            dtype = next(iter(params.values())).dtype
            values = {"p": params, "x": x.astype(dtype)}
            for line in self.lines:
                values[line.value.name] = eval(line.expression, _NAMES | values)
            return {name: values[name] for name in self.results}

        return run


# --- writing programs --------------------------------------------------------------------------


class Writer:
    """Writes one program, op by op; every choice comes from its generator."""

    def __init__(self, seed: int, case: int) -> None:
        """Takes the seed of a run and the number of the case in it."""
        self.random = np.random.default_rng([seed, case])
        self.lines: list[Line] = []
        self.weights: list[Value] = []
        self.seed = seed, case

    def program(self) -> Program:
        dtype = self.choice([np.float32] * 7 + [jnp.bfloat16] * 2 + [np.float16])
        layouts = [self.layout()]
        for _ in range(self.choice([0, 1, 1, 2])):
            layouts.append(self.choice([layouts[0], self.layout()]))
        weights = {f"w{i}": (each, *self.option(each, dtype)) for i, each in enumerate(layouts)}
        for name, (layout, _, _) in weights.items():
            self.weights.append(self.write(f"p['{name}']", layout.shape, ()))
        for _ in range(int(self.random.integers(3, 7))):
            self.one_of(_OPS)
        for value in dict.fromkeys([*self.weights[: len(layouts)], *self.weights[-2:]]):
            self.use(value)
        return Program(weights, tuple(self.lines), self.choice(_TRANSFORMS), self.seed)

    def choice(self, values: Sequence[Any]) -> Any:
        return values[int(self.random.integers(len(values)))]

    def layout(self) -> Layout:
        sizes = tuple(int(size) for size in self.random.permutation([2, 3, 4, 5, 6])[:3])
        return Layout(self.choice(LAYOUTS).axes, sizes)

    def option(self, layout: Layout, dtype: Any) -> tuple[Option, int]:
        dora, layers = bool(self.random.integers(2)), None
        if "batch" in layout.axes and self.random.integers(2):
            count = layout.shape[layout.axes.index("batch")]
            layers = tuple(sorted({int(i) for i in self.random.integers(0, count, 2)}))
        name = f"{np.dtype(dtype).name}{', dora' * dora}{f', layers {layers}' if layers else ''}"
        return Option(name, dora=dora, layers=layers, dtype=dtype), self.choice([1, 2, 2, 3])

    def write(
        self, expression: str, shape: Sequence[int], reads: Sequence[Value], *, result: bool = False
    ) -> Value:
        name = f"{'y' if result else 'v'}{len(self.lines)}"
        value = Value(name, tuple(int(size) for size in shape), result)
        self.lines.append(Line(value, expression, tuple(each.name for each in reads)))
        if not result:
            self.weights.append(value)
        return value

    def one_of(self, ops: Sequence[Callable[["Writer", Value], bool]]) -> None:
        """Writes an op that fits one of the values."""
        for _ in range(50):
            values = self.weights[-1:] if self.random.integers(4) else self.weights
            op, value = self.choice(ops), self.choice(values)
            if (value.shape or op in _OF_SCALARS) and op(self, value):
                return

    def wrapped(self, body: str, value: Value) -> str:
        """Returns the call of a function of one weight `a`, in one of the ways that JAX has."""
        function = f"lambda a: {body}"
        kind = self.choice(["plain"] * 5 + ["jit", "remat", "jvp", "custom", "cond", "barrier"])
        return {
            "plain": f"({function})({value.name})",
            "jit": f"jax.jit({function})({value.name})",
            "remat": f"jax.checkpoint({function})({value.name})",
            "jvp": f"jax.jvp({function}, ({value.name},), ({value.name},))[1]",
            "custom": f"custom(lambda a, x: {body})({value.name}, x)",
            "cond": f"jax.lax.cond(x[0, 0] > 0, {function}, {function}, {value.name})",
            "barrier": f"({function})(jax.lax.optimization_barrier({value.name}))",
        }[kind]

    def unary(self, body: str, shape: Sequence[int], value: Value, *, linear: bool = True) -> bool:
        if math.prod(shape) > _LARGEST:
            return False
        # The derivative of a linear function along a value is the function of it.
        expression = self.wrapped(body, value) if linear else f"(lambda a: {body})({value.name})"
        self.write(expression, shape, (value,))
        return True

    def partner(self, value: Value) -> Value:
        """Returns a value of the same shape, often the same."""
        return self.choice([each for each in self.weights if each.shape == value.shape])

    def use(self, value: Value) -> None:
        """Writes a result that depends on all of a value."""
        shape = (3, *value.shape[1:]) if value.shape else (3,)
        self.write(f"contracted(x, {value.name})", shape, (value,), result=True)


def _axis(writer: Writer, value: Value) -> int:
    return int(writer.random.integers(len(value.shape)))


def _replaced(shape: Sequence[int], axis: int, *sizes: int) -> tuple[int, ...]:
    return (*shape[:axis], *sizes, *shape[axis + 1 :])


def transpose(writer: Writer, value: Value) -> bool:
    order = tuple(int(i) for i in writer.random.permutation(len(value.shape)))
    return writer.unary(f"jnp.transpose(a, {order})", [value.shape[i] for i in order], value)


def reshape(writer: Writer, value: Value) -> bool:
    sizes: list[int] = []
    rest = value.size
    while rest > 1 and len(sizes) < 3:
        divisors = [d for d in range(2, rest + 1) if rest % d == 0]
        sizes.append(writer.choice(divisors))
        rest //= sizes[-1]
    shape = tuple([*sizes, rest] if rest > 1 else sizes)
    return writer.unary(f"a.reshape({shape})", shape, value)


def merge_axes(writer: Writer, value: Value) -> bool:
    if len(value.shape) < 2:
        return False
    axis = int(writer.random.integers(len(value.shape) - 1))
    shape = (
        *value.shape[:axis],
        value.shape[axis] * value.shape[axis + 1],
        *value.shape[axis + 2 :],
    )
    return writer.unary(f"a.reshape({shape})", shape, value)


def split_axis(writer: Writer, value: Value) -> bool:
    axes = [axis for axis, size in enumerate(value.shape) if size in (4, 6, 8, 10, 12)]
    if not axes or len(value.shape) > 3:
        return False
    axis = writer.choice(axes)
    shape = _replaced(value.shape, axis, 2, value.shape[axis] // 2)
    return writer.unary(f"a.reshape({shape})", shape, value)


def unit_axis(writer: Writer, value: Value) -> bool:
    if 1 in value.shape and writer.random.integers(2):
        axis = value.shape.index(1)
        return writer.unary(f"jnp.squeeze(a, {axis})", _replaced(value.shape, axis), value)
    axis = int(writer.random.integers(len(value.shape) + 1))
    shape = (*value.shape[:axis], 1, *value.shape[axis:])
    return len(shape) < 5 and writer.unary(f"jnp.expand_dims(a, {axis})", shape, value)


def broadcast(writer: Writer, value: Value) -> bool:
    ones = [axis for axis, size in enumerate(value.shape) if size == 1]
    shape = _replaced(value.shape, writer.choice(ones), 3) if ones else (2, *value.shape)
    return len(shape) < 5 and writer.unary(f"jnp.broadcast_to(a, {shape})", shape, value)


def flip(writer: Writer, value: Value) -> bool:
    return writer.unary(f"jnp.flip(a, {_axis(writer, value)})", value.shape, value)


def roll(writer: Writer, value: Value) -> bool:
    return writer.unary(f"jnp.roll(a, 1, {_axis(writer, value)})", value.shape, value)


def cut(writer: Writer, value: Value) -> bool:
    axis = _axis(writer, value)
    size = value.shape[axis]
    start = int(writer.random.integers(size))
    stop = int(writer.random.integers(start, size)) + 1
    step = writer.choice([1, 1, 2])
    count = len(range(start, stop, step))
    index = ", ".join([":"] * axis + [f"{start}:{stop}:{step}"])
    return writer.unary(f"a[{index}]", _replaced(value.shape, axis, count), value)


def index(writer: Writer, value: Value) -> bool:
    axis = _axis(writer, value)
    size = value.shape[axis]
    known = int(writer.random.integers(-size, size))
    unknown = f"traced(x, {int(writer.random.integers(-2 * size, 2 * size))})"
    at = ", ".join([":"] * axis + [writer.choice([str(known), unknown])])
    return writer.unary(f"a[{at}]", _replaced(value.shape, axis), value)


def dynamic_slice(writer: Writer, value: Value) -> bool:
    axis = _axis(writer, value)
    size = int(writer.random.integers(1, value.shape[axis] + 1))
    start = int(writer.random.integers(-8, 9))
    body = f"jax.lax.dynamic_slice_in_dim(a, traced(x, {start}), {size}, {axis})"
    return writer.unary(body, _replaced(value.shape, axis, size), value)


def pad(writer: Writer, value: Value) -> bool:
    axis = _axis(writer, value)
    widths = [(1, 0) if i == axis else (0, 0) for i in range(len(value.shape))]
    shape = _replaced(value.shape, axis, value.shape[axis] + 1)
    return writer.unary(f"jnp.pad(a, {widths})", shape, value)


def take(writer: Writer, value: Value) -> bool:
    axis = _axis(writer, value)
    size = value.shape[axis]
    ids = [int(i) for i in writer.random.integers(-size - 1, size + 2, 3)]
    mode = writer.choice(["clip", "wrap", "fill"])
    fill = ", fill_value=0" if mode == "fill" else ""
    body = f"jnp.take(a, jnp.array({ids}), {axis}, mode='{mode}'{fill})"
    return writer.unary(body, _replaced(value.shape, axis, 3), value)


def split_off(writer: Writer, value: Value) -> bool:
    axis = _axis(writer, value)
    size = value.shape[axis]
    if size < 2:
        return False
    at = int(writer.random.integers(1, size))
    body = f"jnp.split(a, [{at}], {axis})[1]"
    return writer.unary(body, _replaced(value.shape, axis, size - at), value)


def concatenate(writer: Writer, value: Value) -> bool:
    axis = _axis(writer, value)
    other = writer.partner(value)
    names = [value.name, other.name, f"jnp.ones_like({value.name})"]
    chosen = [writer.choice(names) for _ in range(writer.choice([1, 2]))]
    places = [*chosen, value.name] if writer.random.integers(2) else [value.name, *chosen]
    shape = _replaced(value.shape, axis, value.shape[axis] * len(places))
    if math.prod(shape) > _LARGEST:
        return False
    writer.write(f"jnp.concatenate([{', '.join(places)}], {axis})", shape, (value, other))
    return True


def stack(writer: Writer, value: Value) -> bool:
    axis = int(writer.random.integers(len(value.shape) + 1))
    other = writer.partner(value)
    names = writer.choice([[value.name], [value.name, other.name]])
    shape = (*value.shape[:axis], len(names), *value.shape[axis:])
    if math.prod(shape) > _LARGEST or len(shape) > 4:
        return False
    writer.write(f"jnp.stack([{', '.join(names)}], {axis})", shape, (value, other))
    return True


def add(writer: Writer, value: Value) -> bool:
    other = writer.partner(value)
    sign = writer.choice(["+", "-"])
    numbers = f"x.reshape(-1)[:{value.size}].reshape({value.shape})"
    right = writer.choice([f"2 * {other.name}", numbers, "1.0", "a[:1]" if value.shape else "1.0"])
    reads = (value, other)
    writer.write(f"(lambda a: a {sign} {right})({value.name})", value.shape, reads)
    return True


def scale(writer: Writer, value: Value) -> bool:
    if not value.shape:
        return writer.unary("a * (x[0, 0] + 3)", (), value)
    axis = _axis(writer, value)
    sizes = [size if i == axis else 1 for i, size in enumerate(value.shape)]
    by = writer.choice(
        ["2.0", "(x[0, 0] + 3)", f"(x[0, :{value.shape[axis]}].reshape({sizes}) + 3)"]
    )
    return writer.unary(f"a {writer.choice('*/')} {by}", value.shape, value)


def negate(writer: Writer, value: Value) -> bool:
    return writer.unary("-a", value.shape, value)


def convert(writer: Writer, value: Value) -> bool:
    return writer.unary("a.astype(jnp.float32).astype(a.dtype)", value.shape, value)


def by_rows(writer: Writer, value: Value) -> bool:
    """A loop that does something to each row and gives them back as a stack."""
    body = writer.choice(["row", "-row", "2.0 * row", "row.T", "row + row.sum()"])
    inner = value.shape[1:][::-1] if body == "row.T" else value.shape[1:]
    shape = (value.shape[0], *inner)
    way = writer.choice(["jax.lax.map(lambda row: {0}, a)", "jax.vmap(lambda row: {0})(a)"])
    return writer.unary(way.format(body), shape, value, linear=False)


def mask(writer: Writer, value: Value) -> bool:
    body = f"jnp.where((jnp.arange({value.size}) % 3 > 0).reshape({value.shape}), a, 0 * a)"
    return writer.unary(body, value.shape, value)


def product(writer: Writer, value: Value) -> bool:
    """A contraction of two weights, often of one with itself."""
    axes = [axis for axis, size in enumerate(value.shape) if size > 1]
    other = writer.partner(value)
    if not axes or len(value.shape) > 3:
        return False
    axis = writer.choice(axes)
    rest = _replaced(value.shape, axis)
    if writer.random.integers(2) or math.prod(rest) ** 2 > _LARGEST:
        letters = "abcd"[: len(value.shape)]
        out = letters.replace(letters[axis], "")
        expression = f"jnp.einsum('{letters},{letters}->{out}', {value.name}, {other.name}) / 4"
        writer.write(expression, rest, (value, other))
    else:
        expression = f"jnp.tensordot({value.name}, {other.name}, ({axis}, {axis})) / 4"
        writer.write(expression, (*rest, *rest), (value, other))
    return True


def left(writer: Writer, value: Value) -> bool:
    axis = _axis(writer, value)
    size = value.shape[axis]
    expression = f"jnp.tensordot(rows(x, {size}), {value.name}, (1, {axis}))"
    writer.write(expression, (3, *_replaced(value.shape, axis)), (value,), result=True)
    return True


def right(writer: Writer, value: Value) -> bool:
    axis = _axis(writer, value)
    expression = f"jnp.tensordot({value.name}, rows(x, {value.shape[axis]}), ({axis}, 1))"
    writer.write(expression, (*_replaced(value.shape, axis), 3), (value,), result=True)
    return True


def with_itself(writer: Writer, value: Value) -> bool:
    if len(value.shape) < 2:
        return False
    shape = (value.shape[-1], *value.shape[1:-1], *value.shape[1:-1])
    writer.write(f"squared({value.name}) / 4", shape, (value,), result=True)
    return math.prod(shape) <= _LARGEST


def batched(writer: Writer, value: Value) -> bool:
    if len(value.shape) < 2:
        return False
    first, second = (int(i) for i in writer.random.permutation(len(value.shape))[:2])
    letters = "abcd"[: len(value.shape)]
    rest = letters.replace(letters[second], "")
    sizes = value.shape[first], value.shape[second]
    spec = f"n{letters[first]}{letters[second]},{letters}->n{rest}"
    expression = f"jnp.einsum('{spec}', rows(x, {sizes[0]}, {sizes[1]}), {value.name})"
    writer.write(expression, (3, *_replaced(value.shape, second)), (value,), result=True)
    return True


def looked_up(writer: Writer, value: Value) -> bool:
    size = value.shape[0]
    expression = f"{value.name}[jnp.floor(x[:, :4] * 8).astype(jnp.int32) % {size}]"
    writer.write(expression, (3, 4, *value.shape[1:]), (value,), result=True)
    return True


def looped(writer: Writer, value: Value) -> bool:
    axis = _axis(writer, value)
    layers = f"jnp.moveaxis({value.name}, {axis}, 0)"
    body = writer.choice(
        ["lambda w: contracted(x, w)", "jax.checkpoint(lambda w: contracted(x, w))"]
    )
    way = writer.choice(["jax.lax.map({}, {})", "jax.vmap({})({})"])
    inner = _replaced(value.shape, axis)
    shape = (value.shape[axis], 3, *inner[1:])
    writer.write(way.format(body, layers), shape, (value,), result=True)
    return True


def by_number(writer: Writer, value: Value) -> bool:
    if len(value.shape) < 2:
        return False
    shape = (3, *value.shape[2:])
    start = f"jnp.zeros({shape}, x.dtype)"
    body = f"lambda i, y: y + contracted(x, {value.name}[i - {value.shape[0]}])"
    expression = f"jax.lax.fori_loop(0, {value.shape[0]}, {body}, {start})"
    writer.write(expression, shape, (value,), result=True)
    return True


def shared(writer: Writer, value: Value) -> bool:
    """A jitted layer that several weights of one shape go through, one of them in a custom rule."""
    others = [writer.partner(value) for _ in range(2)]
    calls = [
        f"f({value.name}, x)",
        f"2 * custom(f)({others[0].name}, x)",
        f"4 * f({others[1].name}, x)",
    ]
    order = [calls[i] for i in writer.random.permutation(3)]
    expression = f"(lambda f: {' + '.join(order)})(jax.jit(lambda a, x: contracted(x, a)))"
    shape = (3, *value.shape[1:])
    writer.write(expression, shape, (value, *others), result=True)
    return True


_OPS: list[Callable[[Writer, Value], bool]] = [
    *(transpose, reshape, merge_axes, split_axis, unit_axis, broadcast, flip, roll, cut, index),
    *(dynamic_slice, pad, take, split_off, concatenate, concatenate, stack, add, scale, negate),
    *(convert, by_rows, mask, product, product, left, right, with_itself, batched, looked_up),
    *(looped, looped, by_number, shared),
]


_OF_SCALARS = (unit_axis, broadcast, add, scale, negate, convert, stack)


# --- running programs --------------------------------------------------------------------------


def program_of(seed: int, case: int) -> Program:
    return Writer(seed, case).program()


def reason_against(program: Program) -> str:
    """Returns what is wrong with a program adapted, or nothing."""
    random = np.random.default_rng([*program.seed, 1])
    wrapped = {
        name: weight_of(random, layout, option, dtype=option.dtype, rank=rank)
        for name, (layout, option, rank) in program.weights.items()
    }
    adapters, frozen = lora_jax.split(wrapped)
    other = jax.tree.map(lambda x: x * np.asarray(-0.5, x.dtype), adapters)
    xs = random.integers(-16, 16, (2, 3, _WIDTH)).astype(np.float32) / 8
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), adapters, other)
    function = program.function()
    adapted = lora_jax.adapt(function, on_materialize="ignore")

    def applied(*inputs: Any) -> Any:
        return program.transform.apply(adapted, *inputs)

    try:
        actual = _computed(applied, stacked, frozen, xs)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    epsilon = max(float(jnp.finfo(option.dtype).eps) for _, option, _ in program.weights.values())
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
    simpler = dataclasses.replace(program, transform=_TRANSFORMS[0])
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


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    cases = [options.case] if options.case is not None else range(options.cases)
    start = time.monotonic()
    done = failed = 0
    for _, text in with_progress(failures(options.seed, cases), len(cases), unit="cases"):
        done += 1
        failed += bool(text)
        if text:
            print(f"\n{text}", flush=True)
        if options.minutes is not None and time.monotonic() - start > 60 * options.minutes:
            break
        if options.exit_first and failed:
            break
    minutes = (time.monotonic() - start) / 60
    print(f"{done} cases from seed {options.seed}, {failed} failures, {minutes:.1f} min")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description="Random programs, adapted and compared with the dense weights in float64.",
        epilog="Exit code: 0 if nothing failed, 1 if a case did.",
    )
    parser.add_argument("--cases", type=int, default=1000, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which programs (%(default)s)")
    parser.add_argument("--case", type=int, help="only the case of this number")
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("--exit-first", action="store_true", help="stop at the first failure")
    return parser


if __name__ == "__main__":
    sys.exit(main())
