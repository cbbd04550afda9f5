"""Writing a program that is valid by construction."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from tests.battery.bases import Base
from tests.battery.layouts import LAYOUTS, Layout
from tests.battery.options import Option
from tests.battery.transforms import TRANSFORMS
from tests.fuzz.program import Line, Program, Value

GRADIENT_TRANSFORMS = [each for each in TRANSFORMS if each.kind == "gradients"]
# How many numbers a value has at most.
LARGEST = 192

# Writes an op of a value, or says that it does not fit.
Writes = Callable[["Writer", Value], bool]


class Writer:
    """Writes one program, op by op; every choice comes from its generator."""

    def __init__(self, seed: int, case: int) -> None:
        """Takes the seed of a run and the number of the case in it."""
        self.random = np.random.default_rng([seed, case])
        self.quantises = case % 3 == 1
        self.formats = np.random.default_rng([seed, case, 1])
        self.lines: list[Line] = []
        self.weights: list[Value] = []
        self.seed = seed, case

    def program(self, ops: Sequence[Writes], of_scalars: Sequence[Writes]) -> Program:
        """Returns a program of some of the ops; only the latter take values without axes."""
        dtype = self.choice([np.float32] * 7 + [jnp.bfloat16] * 2 + [np.float16])
        layouts = [self.layout()]
        for _ in range(self.choice([0, 1, 1, 2])):
            layouts.append(self.choice([layouts[0], self.layout()]))
        weights = {
            name: (each, *self.option(each, dtype), self.base(name))
            for name, each in ((f"w{i}", each) for i, each in enumerate(layouts))
        }
        for name, (layout, *_) in weights.items():
            self.weights.append(self.write(f"p['{name}']", layout.shape, ()))
        for _ in range(int(self.random.integers(3, 7))):
            self.one_of(ops, of_scalars)
        for value in dict.fromkeys([*self.weights[: len(layouts)], *self.weights[-2:]]):
            self.use(value)
        return Program(weights, tuple(self.lines), self.choice(GRADIENT_TRANSFORMS), self.seed)

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

    def base(self, name: str) -> Base:
        """Returns an array or a format; what is quantised and not the first weight may be alone."""
        found = self.quantises and str(self.formats.choice(["", "nf4", "int8", "int4", "fp8_e4m3"]))
        if not found:
            return Base("array")
        is_alone = name != "w0" and bool(self.formats.integers(3) == 0)
        return Base(f"{found}{', alone' * is_alone}", found, (name,) if is_alone else ())

    def write(
        self, expression: str, shape: Sequence[int], reads: Sequence[Value], *, result: bool = False
    ) -> Value:
        name = f"{'y' if result else 'v'}{len(self.lines)}"
        value = Value(name, tuple(int(size) for size in shape), result)
        self.lines.append(Line(value, expression, tuple(each.name for each in reads)))
        if not result:
            self.weights.append(value)
        return value

    def one_of(self, ops: Sequence[Writes], of_scalars: Sequence[Writes]) -> None:
        """Writes an op that fits one of the values."""
        for _ in range(50):
            values = self.weights[-1:] if self.random.integers(4) else self.weights
            op, value = self.choice(ops), self.choice(values)
            if (value.shape or op in of_scalars) and op(self, value):
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
        if math.prod(shape) > LARGEST:
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
