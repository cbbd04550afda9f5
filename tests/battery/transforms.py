"""What is done to the adapted model: one row for each."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from tests.battery.model import loss_of

DROPOUT = 0.25
DRAWS = 64

Model = Callable[..., Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Transform:
    """A way to call an adapted model.

    Attributes:
      name: its name.
      apply: from the model, the stacked adapters, the frozen leaves and the examples to what is
        compared, with an axis for the instances in front.
      instances: which adapter meets which example.
      kind: what is compared: "gradients" with the results, a "slope" along a direction, the "mean"
        of many draws of dropout, or the "shapes" alone.
    """

    name: str
    apply: Callable[[Model, Any, Any, Any], Any]
    instances: tuple[tuple[int, int], ...] = ((0, 0),)
    kind: str = "gradients"


def with_gradients(model: Model) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """Returns a function to the results and the gradients of the adapters."""

    def loss(adapters: Any, frozen: Any, x: Any) -> tuple[jax.Array, Any]:
        results = model(lora_jax.combine(adapters, frozen), x)
        return loss_of(results), results

    def both(adapters: Any, frozen: Any, x: Any) -> tuple[Any, Any]:
        (_, results), gradients = jax.value_and_grad(loss, has_aux=True)(adapters, frozen, x)
        return results, gradients

    return both


def _first(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], tree)


def _as_one(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[None], tree)


def _once(both: Any, adapters: Any, frozen: Any, xs: Any) -> Any:
    return _as_one(both(_first(adapters), frozen, xs[0]))


def _vmapped(both: Any, adapters: Any, frozen: Any, xs: Any) -> Any:
    return jax.vmap(both, (None, None, 0))(_first(adapters), frozen, xs)


def _scanned(both: Any, adapters: Any, frozen: Any, xs: Any) -> Any:
    return jax.lax.map(lambda x: both(_first(adapters), frozen, x), xs)


def _of_each_adapter(both: Any, adapters: Any, frozen: Any, xs: Any) -> Any:
    return jax.vmap(both, (0, None, None))(adapters, frozen, xs[0])


def directions(adapters: Any) -> Any:
    """Returns fixed numbers of the adapters' shapes."""
    return jax.tree.map(
        lambda x: np.sin(1 + np.arange(x.size)).reshape(x.shape).astype(x.dtype), adapters
    )


def _along_a_direction(model: Model, adapters: Any, frozen: Any, xs: Any) -> Any:
    def loss(adapters: Any) -> tuple[jax.Array, Any]:
        results = model(lora_jax.combine(adapters, frozen), xs[0])
        return loss_of(results), results

    single = _first(adapters)
    # Zeros like the adapters have their sharding too.
    along = jax.tree.map(lambda x, d: jnp.zeros_like(x) + d, single, directions(single))
    _, slope, results = jax.jvp(loss, (single,), (along,), has_aux=True)
    return _as_one((results, slope))


def _mean_of_draws(model: Model, adapters: Any, frozen: Any, xs: Any) -> Any:
    wrapped = lora_jax.combine(_first(adapters), frozen)
    keys = jax.random.split(jax.random.key(3), DRAWS)
    drawn = jax.vmap(lambda key: model(wrapped, xs[0], lora_key=key))(keys)
    wide = jax.tree.map(lambda y: y.astype(jnp.float32), drawn)
    return _as_one(tuple(jax.tree.map(lambda y, f=f: f(y, 0), wide) for f in (jnp.mean, jnp.std)))


def _traced_for_any_rows(model: Model, adapters: Any, frozen: Any, xs: Any) -> Any:
    """Traces the model, as an export does, for a number of rows that is not known."""
    (count,) = jax.export.symbolic_shape("rows")
    shape = jax.ShapeDtypeStruct((count, xs.shape[2]), xs.dtype)
    jax.eval_shape(model, _first(adapters), frozen, shape)
    return None


def _rematerialised(model: Model) -> Model:
    return jax.checkpoint(model)


def _differentiated(apply: Any, change: Callable[[Model], Model] = lambda model: model) -> Any:
    return lambda model, *inputs: apply(with_gradients(change(model)), *inputs)


_BOTH = ((0, 0), (0, 1))

TRANSFORMS = [
    Transform("jit", _differentiated(_once)),
    Transform("vmap", _differentiated(_vmapped), _BOTH),
    Transform("scan", _differentiated(_scanned), _BOTH),
    Transform("remat", _differentiated(_once, _rematerialised)),
    Transform("adapters vmapped", _differentiated(_of_each_adapter), ((0, 0), (1, 0))),
    Transform("jvp", _along_a_direction, kind="slope"),
    Transform("dropout", _mean_of_draws, kind="mean"),
    Transform("symbolic rows", _differentiated(_traced_for_any_rows), kind="shapes"),
]
