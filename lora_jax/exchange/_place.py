"""Putting the tensors of a PyTorch model where a parameter tree has them."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from lora_jax._folders import CheckpointError
from lora_jax._nodes import check_plain
from lora_jax._partition import Partition
from lora_jax._paths import listed, map_with_paths, nearest_paths
from lora_jax._shapes import AnyArray
from lora_jax._targets import Targets, select
from lora_jax.exchange.peft._names import GivenAxes, NamedLeaf, NamedTree, Place, named_tree
from lora_jax.exchange.peft._rules import Rule
from lora_jax.quantization._placement import leaf_specs
from lora_jax.quantization._weight import QuantizedWeight


@runtime_checkable
class Readable(Protocol):
    """A tensor whose numbers are read when NumPy makes an array of it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""

    @property
    def dtype(self) -> Any:
        """The dtype of the array."""

    def __array__(self) -> np.ndarray:
        """Returns the numbers."""


Tensor = AnyArray | QuantizedWeight | Readable


def place(
    tensors: Mapping[str, Tensor],
    params: PyTree,
    *,
    names: Sequence[Rule],
    axes: GivenAxes = None,
    keep: Targets | None = None,
    convert: Callable[[str, Any], Any] | None = None,
) -> PyTree:
    """Returns `params` with the tensors of a PyTorch model in place of its leaves.

    Rules say which tensor is which leaf, and how the two are laid out. A tensor is transposed, its
    axes are split or joined, and those of the layers of a stack are stacked. A quantised weight
    goes the same way as codes: its numbers stay those of the file. The tensors of a leaf are read
    when it is its turn, so that the host holds those of one leaf at a time.

    Args:
      tensors: the tensors by name, as a reader such as `exchange.gguf.load` returns them or as
        `exchange.huggingface.tensors` gives them: arrays, quantised weights, or what has a shape
        and a dtype and is read when NumPy makes an array of it.
      params: the parameter tree; `jax.ShapeDtypeStruct` leaves are enough, as `jax.eval_shape` of
        the function that makes params gives.
      names: the rules for the model's parameters; the first whose path a leaf has counts.
      axes: where the rules don't say it, each axis's role, as in `wrap`: a mapping from path or
        expression, or what `infer_axes` returned.
      keep: which leaves stay as they are, in the forms of `targets`; all others need a tensor.
      convert: a function of each leaf's path and value, called when it is on its devices, that
        returns what it becomes, such as one that quantises it.

    Returns:
      A tree of the same structure. Each leaf has the dtype that it has in `params` (a quantised
      weight dequantises to it), and is cut over a mesh as it is there.

    Raises:
      CheckpointError: a tensor has no place or another shape, a leaf has no tensor, or a stack
        has layers of several formats. Nothing is placed then.
      ValueError: `names` contradict each other or the tree, or `keep` matches nothing.

    Examples:
      >>> import jax, jax.numpy as jnp, lora_jax, numpy as np
      >>> from lora_jax.exchange import peft, place
      >>> layers = {f"layers.{n}.query.weight": np.ones((8, 4), np.float32) for n in range(3)}
      >>> params = {"layers": {"query": jax.ShapeDtypeStruct((3, 4, 2, 4), jnp.bfloat16)}}
      >>> axes = ("batch", "in", "out", "out")
      >>> rule = peft.Rule("layers.{n}.query.weight", "layers/query", axes=axes)
      >>> query = place(layers, params, names=[rule])["layers"]["query"]
      >>> query.shape, query.dtype
      ((3, 4, 2, 4), dtype(bfloat16))
    """
    check_plain(params, "expected plain params: place(tensors, unwrap(params), ...).")
    kept = _kept(params, keep)
    tree = named_tree(params, names, axes)
    leaves = {leaf.path: leaf for leaf in tree.leaves if leaf.path not in kept}
    problems = [*_problems(tensors, tree, leaves, kept)]
    if problems:
        more = f"\n- and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        lines = "".join(f"\n- {problem}" for problem in problems[:_SHOWN])
        raise CheckpointError(f"`tensors` do not fit `params`: {lines}{more}")

    def placed(path: str, leaf: Any) -> Any:
        if path not in leaves:
            return leaf
        value = _on_devices(_value(tensors, leaves[path]), leaf)
        return value if convert is None else convert(path, value)

    return map_with_paths(placed, params)


_SHOWN = 8


def _kept(params: PyTree, keep: Targets | None) -> set[str]:
    if keep is None:
        return set()
    expected = "expected leaves of `params`"
    return set(select(params, keep, obstacle=_no_obstacle, expected=expected, argument="keep"))


def _no_obstacle(path: str, leaf: Any, names_leaf: bool) -> None:
    """Says of every leaf that it can be kept."""


def _problems(
    tensors: Mapping[str, Tensor],
    tree: NamedTree,
    leaves: Mapping[str, NamedLeaf],
    kept: set[str],
) -> Iterator[str]:
    """Yields everything that keeps the tensors from being placed."""
    lost = [name for name in tensors if _leaf_of(name, tree, leaves) is None]
    if lost:
        near = nearest_paths(lost[0], tree.by_name) or ["none"]
        yield (
            f"the tensors {listed(lost)} have no place: no rule in `names` gives a leaf such a "
            f"name; the nearest names to the first are {listed(near)}. Leave out of `tensors` what "
            "the model does not have."
        )
    without = [path for path in tree.without_rule if path not in kept]
    if without:
        yield (
            f"the leaves {listed(without)} have no rule in `names`; give them one, or keep what "
            "they are with place(..., keep=...)."
        )
    for named in leaves.values():
        yield from _leaf_problems(tensors, named)


def _leaf_of(name: str, tree: NamedTree, leaves: Mapping[str, NamedLeaf]) -> NamedLeaf | None:
    found = tree.by_name.get(name)
    return None if found is None else leaves.get(found[0].path)


def _leaf_problems(tensors: Mapping[str, Tensor], named: NamedLeaf) -> Iterator[str]:
    missing = [named.name(place) for place in named.places if not _names_in(tensors, named, place)]
    if missing:
        yield f"'{named.path}' is {listed(missing)} in PyTorch, which `tensors` do not hold."
        return
    problem = named.problem()
    if problem is not None:
        yield problem
        return
    found = [(name, tensors[name]) for name in _all_names(tensors, named)]
    expected = named.layout.weight_shape
    for name, tensor in found:
        if tuple(tensor.shape) != expected:
            yield (
                f"'{name}' has the shape {tuple(tensor.shape)}; expected {expected} for "
                f"'{named.path}' of shape {tuple(named.leaf.shape)} with the axes {named.axes}."
            )
            return
    if named.tied_name is not None and len(found) == 2 and not _are_equal(found[0][1], found[1][1]):
        yield (
            f"'{named.path}' is {listed([name for name, _ in found])} in PyTorch, which differ in "
            "`tensors`; give the model a leaf for each, or leave one of them out."
        )
        return
    yield from _stack_problems(named, found)


def _stack_problems(named: NamedLeaf, found: Sequence[tuple[str, Tensor]]) -> Iterator[str]:
    """Yields why the tensors can't be quantised weights of one leaf."""
    if not any(isinstance(tensor, QuantizedWeight) for _, tensor in found):
        return
    if named.stack != tuple(range(len(named.stack))):
        yield (
            f"'{named.path}' stacks '{named.template}' along the axes {named.stack}, and a "
            "quantised weight only along its first ones; put tensor.dequantize() in `tensors`."
        )
        return
    try:
        shapes = [_form(_abstract_layout(tensor, named)) for _, tensor in found]
    except ValueError as error:
        yield f"'{found[0][0]}' can't have the axes of '{named.path}': {error}"
        return
    other = next((place for place, form in enumerate(shapes) if form != shapes[0]), None)
    if other is not None:
        pair = [found[0], found[other]]
        kinds = [f"{name}: {_described(tensor)}" for name, tensor in pair]
        yield (
            f"'{named.path}' stacks tensors of several formats, {listed(kinds)}; expected one. "
            "Place them in a tree with a leaf for each layer, or put tensor.dequantize() in "
            "`tensors` for all of them, which lora_jax.quantize may then quantise alike."
        )


def _described(tensor: Tensor) -> str:
    return tensor.format if isinstance(tensor, QuantizedWeight) else str(tensor.dtype)


def _abstract_layout(tensor: Any, named: NamedLeaf) -> Any:
    """Returns the shapes of a PyTorch weight with the axes of the tree."""
    return jax.eval_shape(named.layout.tree_weight, tensor)


def _form(tensor: Tensor) -> Any:
    """Returns what tensors of one stack have in common."""
    leaves, structure = jax.tree.flatten(tensor)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _are_equal(first: Tensor, second: Tensor) -> bool:
    return _form(first) == _form(second) and all(
        np.array_equal(np.asarray(one), np.asarray(other))
        for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    )


def _names_in(tensors: Mapping[str, Tensor], named: NamedLeaf, place: Place) -> list[str]:
    """Returns the names that `tensors` have of the parameter at one place."""
    names = [named.name(place), *([] if named.tied_name is None else [named.tied_name])]
    return [name for name in names if name in tensors]


def _all_names(tensors: Mapping[str, Tensor], named: NamedLeaf) -> Iterator[str]:
    for place in named.places:
        yield from _names_in(tensors, named, place)


def _value(tensors: Mapping[str, Tensor], named: NamedLeaf) -> Tensor:
    """Returns what a leaf becomes, in the memory that the tensors are in."""
    parts = (_part(tensors, named, place) for place in named.places)
    first = next(parts)
    if not named.stack:
        return first
    sizes = tuple(named.leaf.shape[axis] for axis in named.stack)
    is_on_device = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(first))
    layers = itertools.chain([first], parts)
    stacked = _stacked_on_device(layers) if is_on_device else _stacked(layers, math.prod(sizes))
    whole = jax.tree.map(lambda array: array.reshape(*sizes, *array.shape[1:]), stacked)
    if isinstance(whole, QuantizedWeight):
        return whole
    library: Any = jnp if is_on_device else np
    moved: AnyArray = library.moveaxis(whole, tuple(range(len(named.stack))), named.stack)
    return moved


def _part(tensors: Mapping[str, Tensor], named: NamedLeaf, place: Place) -> Tensor:
    """Returns one place of a leaf."""
    tensor = tensors[_names_in(tensors, named, place)[0]]
    if isinstance(tensor, QuantizedWeight):
        laid_out = named.layout.tree_weight(tensor)
        return dataclasses.replace(laid_out, dtype_name=str(jnp.dtype(named.leaf.dtype)))
    array = tensor if isinstance(tensor, jax.Array) else np.asarray(tensor)
    laid_out = named.layout.tree_weight(array)
    return laid_out.astype(named.leaf.dtype, copy=False)


def _stacked_on_device(parts: Iterable[Tensor]) -> Tensor:
    whole: Tensor = jax.tree.map(lambda *arrays: jnp.stack(arrays), *parts)
    return whole


def _stacked(parts: Iterable[Tensor], count: int) -> Tensor:
    """Returns parts one after another, of which the host holds one beside the whole."""
    whole: Any = None
    for place, part in enumerate(parts):
        if whole is None:
            whole = jax.tree.map(lambda array: np.empty((count, *array.shape), array.dtype), part)
        for target, array in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
            target[place] = array
    stack: Tensor = whole
    return stack


def _on_devices(value: Tensor, leaf: Any) -> Tensor:
    """Returns a value on the devices that a leaf is on or belongs on, cut as the leaf is."""
    partition = Partition.of(leaf)
    if partition is None:
        return jax.tree.map(jnp.asarray, value)
    if not isinstance(value, QuantizedWeight):
        return jax.device_put(value, leaf.sharding)
    specs = leaf_specs(value, partition.cuts, dict(partition.mesh.shape))
    shardings = jax.tree.map(lambda spec: NamedSharding(partition.mesh, spec), specs)
    placed: QuantizedWeight = jax.device_put(value, shardings)
    return placed
