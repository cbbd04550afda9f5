"""What an op is: a function of two weights and activations that works for any number of axes."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

# JAX 0.11 and newer refuse to roll a cut axis, and batch axes that are cut in two ways. They can't
# differentiate a barrier in a custom rule, where a tangent that is zero is none to them.
IS_STRICT = jax.__version_info__ >= (0, 11)

# The activations: rows of numbers of which an op takes what it needs.
ROWS, WIDTH = 3, 192

Program = Callable[[Any, Any, jax.Array], Mapping[str, jax.Array]]


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    """A way in which a model can use a weight.

    Attributes:
      name: the function's name.
      family: the module that it is in.
      fn: from weights w and v of one shape and activations x (rows, 192), all of one dtype, to
        results by name.
      gives_weights: whether the results are weights, which are then multiplied with x, or with
        themselves; or activations.
      ndims: the numbers of axes that w may have.
      reverse: whether JAX can differentiate it in reverse mode.
      forward: whether JAX can differentiate it in forward mode.
      batchable: whether JAX can vmap it.
      symbolic: whether JAX can export it with a symbolic number of rows.
      explicit: whether JAX can compute it on an explicit mesh that cuts w's last axis.
      meshes: whether it can be told which mesh to run on; if not, it brings its own devices.
      linear: whether the results are linear in what each use of a weight gives, so that the mean
        over masks of LoRA dropout is the result without.
      tolerance: the relative error that it makes itself.
    """

    name: str
    family: str
    fn: Program
    gives_weights: bool = False
    ndims: tuple[int, ...] = (2, 3)
    reverse: bool = True
    forward: bool = True
    batchable: bool = True
    symbolic: bool = True
    explicit: bool = True
    meshes: bool = True
    linear: bool = True
    tolerance: float = 0.0

    def once(self, w: Any, v: Any, x: jax.Array) -> Mapping[str, jax.Array]:
        """Returns what it gives; a weight as multiplied with the activations."""
        results = self.fn(w, v, x)
        if not self.gives_weights:
            return results
        return {name: contracted(x, weight) for name, weight in results.items()}

    def twice(self, w: Any, v: Any, x: jax.Array) -> Mapping[str, jax.Array]:
        """Returns the weights that it gives, each multiplied with itself in one equation."""
        return {
            name: squared(weight) * (1 + x[0, 0].astype(weight.dtype))
            for name, weight in self.fn(w, v, x).items()
        }


OPS: list[Op] = []


def op(**options: Any) -> Callable[[Program], Program]:
    """Registers a function whose results are activations."""

    def registered(fn: Program) -> Program:
        OPS.append(Op(fn.__name__, fn.__module__.rpartition(".")[2], fn, **options))
        return fn

    return registered


def weight_op(**options: Any) -> Callable[[Program], Program]:
    """Registers a function whose results are weights."""
    return op(gives_weights=True, **options)


def contracted(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns the activations times a weight, summed over the weight's first axis."""
    x = x.astype(weight.dtype)
    if weight.ndim == 0:
        return x[:, 0] * weight
    return jnp.tensordot(x[:, : weight.shape[0]], weight, (1, 0))


def squared(weight: jax.Array) -> jax.Array:
    """Returns a product of which both operands are the same variable."""
    if weight.ndim == 0:
        return weight * weight
    last = weight.ndim - 1
    batch = ((last,), (last,)) if last else ((), ())
    return jax.lax.dot_general(weight, weight, (((0,), (0,)), batch))


def rows(x: jax.Array, *shape: int) -> jax.Array:
    """Returns the activations as an array of shape (rows, *shape)."""
    return x[:, : math.prod(shape)].reshape(x.shape[0], *shape)


def numbers(x: jax.Array, count: int) -> jax.Array:
    """Returns integers from -16 to 16, of shape (rows, count), that depend on the activations."""
    return jnp.floor(x[:, :count] * 8).astype(jnp.int32)


def traced(x: jax.Array, number: int) -> jax.Array:
    """Returns an integer that JAX can't know when it traces."""
    return jnp.floor(x[0, 0] * 0).astype(jnp.int32) + number
