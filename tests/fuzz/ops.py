"""The ops: each writes what it makes of a value, or says that it does not fit."""

import math
from collections.abc import Sequence

from tests.fuzz.program import Value
from tests.fuzz.writer import LARGEST, Writer, Writes


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
    if math.prod(shape) > LARGEST:
        return False
    writer.write(f"jnp.concatenate([{', '.join(places)}], {axis})", shape, (value, other))
    return True


def stack(writer: Writer, value: Value) -> bool:
    axis = int(writer.random.integers(len(value.shape) + 1))
    other = writer.partner(value)
    names = writer.choice([[value.name], [value.name, other.name]])
    shape = (*value.shape[:axis], len(names), *value.shape[axis:])
    if math.prod(shape) > LARGEST or len(shape) > 4:
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
    if writer.random.integers(2) or math.prod(rest) ** 2 > LARGEST:
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
    return math.prod(shape) <= LARGEST


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


# What is there twice is chosen twice as often.
OPS: list[Writes] = [
    *(transpose, reshape, merge_axes, split_axis, unit_axis, broadcast, flip, roll, cut, index),
    *(dynamic_slice, pad, take, split_off, concatenate, concatenate, stack, add, scale, negate),
    *(convert, by_rows, mask, product, product, left, right, with_itself, batched, looked_up),
    *(looped, looped, by_number, shared),
]

OPS_OF_SCALARS = (unit_axis, broadcast, add, scale, negate, convert, stack)
