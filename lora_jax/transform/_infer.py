"""`infer_axes`: how a function uses each weight, read off its jaxpr without running it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._axes import InferredAxes, WeightUse
from lora_jax._paths import path_strings
from lora_jax._selection import check_not_wrapped
from lora_jax.quantization._tree import dequantize
from lora_jax.transform._adapt import traced_function
from lora_jax.transform._factored import Factored
from lora_jax.transform._interpreter import Interpreter
from lora_jax.transform._output import head_products, place_of
from lora_jax.transform._report import Reporter, Use
from lora_jax.transform._roles import RolesNote, probed
from lora_jax.transform._sharing import SharedFunctions
from lora_jax.transform._static import with_static
from lora_jax.transform.rules import with_roles


def infer_axes(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> InferredAxes:
    """Returns the axes of each weight of `params`, as `fn(params, *args, **kwargs)` uses them.

    An axis that a product sums over is an input axis, an axis that it keeps is an output axis, and
    an axis that it maps over, or that is cut layer by layer first, is a batch axis. In a lookup the
    rows are the inputs. The function is traced, not run, so its arguments may be
    `jax.ShapeDtypeStruct`.

    Args:
      fn: any JAX function whose first argument holds the parameters.
      params: plain parameters.
      *args: the other arguments.
      **kwargs: the keyword arguments.

    Returns:
      A mapping from path to axes for `wrap(..., axes=...)`, which also makes `"all-linear"` exact.
      It leaves out weights whose uses disagree and weights that no product, convolution or lookup
      uses; its attributes `uses`, `disagreements` and `unused` list those, and `print` shows all.

    Examples:
      >>> import jax, jax.numpy as jnp, lora_jax
      >>> params = {"query": jnp.ones((8, 2, 4)), "out": jnp.ones((2, 4, 8))}
      >>> def attend(params, x):
      ...     heads = jnp.einsum("te,ehd->thd", x, params["query"])
      ...     return jnp.einsum("thd,hde->te", heads, params["out"])
      >>> dict(lora_jax.infer_axes(attend, params, jnp.ones((5, 8))))
      {'out': ('in', 'in', 'out'), 'query': ('in', 'out', 'out')}
    """
    check_not_wrapped(params)
    arguments = with_static(((params, *args), kwargs))
    found: dict[str, list[WeightUse]] = {}
    # Under `eval_shape` a quantised weight is dequantised as a shape alone.
    jax.eval_shape(lambda arguments: _run_with_probes(fn, dequantize(arguments), found), arguments)
    return InferredAxes({path: tuple(dict.fromkeys(uses)) for path, uses in found.items()})


def _run_with_probes(
    fn: Callable[..., Any], arguments: Any, found: dict[str, list[WeightUse]]
) -> None:
    flat, structure = jax.tree_util.tree_flatten_with_path(arguments)
    traced = traced_function(fn, structure, [leaf for _, leaf in flat])
    paths = path_strings([key_path for key_path, _ in flat], skip=2)
    values = [
        probed(path, leaf) if _is_candidate(key_path, leaf) else leaf
        for path, (key_path, leaf) in zip(paths, flat, strict=True)
    ]
    found.update({value.path: [] for value in values if isinstance(value, Factored)})
    notes: list[RolesNote | Use] = []
    interpreter = Interpreter(with_roles(), SharedFunctions(), Reporter(notes.append))
    interpreter.run(traced.closed_jaxpr, values)
    products = [note for note in notes if isinstance(note, RolesNote)]
    heads = head_products(
        traced.closed_jaxpr, frozenset(place_of(note.equations) for note in products)
    )
    for note in products:
        is_output = place_of(note.equations) in heads
        found[note.path].append(WeightUse(note.primitive, note.source, note.axes, is_output))
    for use in notes:
        if isinstance(use, Use):
            found[use.path].append(WeightUse(use.primitive, use.source, None))


def _is_candidate(key_path: Sequence[Any], leaf: Any) -> bool:
    """Says whether a leaf of (args, kwargs) is a weight of the first argument."""
    is_of_params = key_path[0].idx == 0 and key_path[1] == jax.tree_util.SequenceKey(0)
    return is_of_params and jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim >= 2
