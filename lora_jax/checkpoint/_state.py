"""What a training checkpoint holds: the stored leaves, a description of them, and what they fit."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from lora_jax._folders import CheckpointError, as_checkpoint_error
from lora_jax._nodes import NodeIndex, adapter_nodes
from lora_jax._originals import with_norms
from lora_jax._paths import leaves_with_paths, listed, nearest_paths
from lora_jax._weight import AdapterNode, has_factors, is_adapter_node, is_bank
from lora_jax.checkpoint._files import (
    check_files,
    file_checksums,
    position_to_json,
    read_signed,
    signed_text,
)
from lora_jax.checkpoint._weights import (
    WeightMetadata,
    leaves_of_arrays,
    placed,
    saved_arrays,
    sharding_of,
)

DESCRIPTION_FILE = "training.json"
ARRAYS_ITEM = "arrays"
_FORMAT = "lora_jax training"
_VERSION = 1

_NUMBERS = (bool, int, float)

_SAME_WRAP = (
    "Expected a tree that is wrapped as in the run that saved it: wrap(params, targets, ...) with "
    "the same arguments."
)

LeavesWithPaths = Sequence[tuple[str, Any]]


@dataclasses.dataclass(frozen=True)
class TrainingState:
    """What `TrainingCheckpoints.restore` returns.

    Attributes:
      wrapped: the wrapped tree, with all that is trained as it was.
      optimizer_state: the optimiser's state, or whatever tree was saved as it.
      step: the step at which it was saved.
      data_position: where the data were.
      metrics: the metrics that were saved, as Python numbers.
    """

    wrapped: PyTree
    optimizer_state: PyTree
    step: int
    data_position: Any
    metrics: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class LeafMetadata:
    """What a leaf must be when it is read again.

    Attributes:
      path: its path, which begins with the name of the argument that it belongs to.
      container: what holds its numbers.
      shape: its shape; for random keys that of their data.
      dtype: its dtype, or the type of a Python number; for random keys that of their data.
      weak_type: whether JAX treats it as a Python number where dtypes meet.
      implementation: that of random keys, where there are any.
      number: a Python number itself, which needs no array.
    """

    path: str
    container: Literal["jax", "numpy", "key", "number"]
    shape: tuple[int, ...]
    dtype: str
    weak_type: bool = False
    implementation: str | None = None
    number: bool | int | float | None = None

    @classmethod
    def of(cls, path: str, leaf: Any) -> "LeafMetadata":
        if isinstance(leaf, _NUMBERS) and not isinstance(leaf, np.generic):
            return cls(path, "number", (), type(leaf).__name__, number=leaf)
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise CheckpointError(
                f"'{path}' is a {type(leaf).__name__}; expected arrays, random keys and numbers."
            )
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = jax.eval_shape(jax.random.key_data, leaf)
            known = str(jax.random.key_impl(leaf)) if isinstance(leaf, jax.Array) else None
            return cls(path, "key", data.shape, str(data.dtype), implementation=known)
        shape, dtype = tuple(leaf.shape), str(leaf.dtype)
        if isinstance(leaf, np.ndarray | np.generic):
            return cls(path, "numpy", shape, dtype)
        return cls(path, "jax", shape, dtype, weak_type=bool(leaf.weak_type))

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "LeafMetadata":
        return cls(**{**entry, "shape": tuple(entry["shape"])})

    @property
    def has_numbers(self) -> bool:
        """Whether there is an array to store: Orbax takes none without elements."""
        return self.container != "number" and 0 not in self.shape

    def fits(self, target: "LeafMetadata") -> bool:
        """Says whether this leaf may stand where `target` is now.

        Compiled functions make arrays of Python numbers, so each may stand for the other.
        """
        if self.path != target.path or self.shape != target.shape:
            return False
        if "number" in (self.container, target.container):
            return "key" not in (self.container, target.container)
        if (self.container == "key") != (target.container == "key"):
            return False
        known = {self.implementation, target.implementation} - {None}
        return self.dtype == target.dtype and len(known) < 2

    def described(self) -> str:
        """Returns the leaf in words."""
        return f"'{self.path}' of shape {self.shape} and dtype {self.dtype}"


@dataclasses.dataclass(frozen=True)
class Description:
    """What a training checkpoint holds and what it belongs to.

    Attributes:
      weights: what is adapted, by path.
      frozen: the fingerprint of each array that is not stored, by path.
      leaves: the leaves that are stored, in the order of `stored_leaves`.
      data_position: what `save` was given, in terms of JSON.
      metrics: what `save` was given, as numbers.
      checksums: that of each file, once they are written.
    """

    weights: Mapping[str, WeightMetadata]
    frozen: Mapping[str, int]
    leaves: Sequence[LeafMetadata]
    data_position: Any
    metrics: Mapping[str, float]
    checksums: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        wrapped: PyTree,
        leaves: LeavesWithPaths,
        frozen: Mapping[str, int],
        data_position: Any = None,
        metrics: Mapping[str, float] | None = None,
    ) -> "Description":
        weights = {
            path: WeightMetadata.of(node, saved_arrays(path, node))
            for path, node in adapter_nodes(wrapped).items()
        }
        described = [LeafMetadata.of(path, leaf) for path, leaf in leaves]
        position = position_to_json(data_position)
        return cls(weights, frozen, described, position, dict(metrics or {}))

    @classmethod
    def read(cls, folder: Path, *, damaged: str) -> "Description":
        """Returns what the checkpoint in `folder` says; errors begin with `damaged`."""
        content = read_signed(folder / DESCRIPTION_FILE, _FORMAT, _VERSION, damaged=damaged)
        with as_checkpoint_error(damaged):
            return cls(
                {path: WeightMetadata.from_json(x) for path, x in content["weights"].items()},
                content["frozen"],
                [LeafMetadata.from_json(each) for each in content["leaves"]],
                content["data_position"],
                content["metrics"],
                content["crc32"],
            )

    def write(self, folder: Path) -> None:
        """Writes it beside the arrays, which are complete, with their checksums."""
        content = {
            "weights": {path: dataclasses.asdict(each) for path, each in self.weights.items()},
            "frozen": self.frozen,
            "leaves": [dataclasses.asdict(leaf) for leaf in self.leaves],
            "data_position": self.data_position,
            "metrics": self.metrics,
            "crc32": file_checksums(folder, ARRAYS_ITEM),
        }
        text = signed_text(_FORMAT, _VERSION, content)
        (folder / DESCRIPTION_FILE).write_text(text, encoding="utf-8")

    def check_fits(self, given: "Description", source: str) -> None:
        """Raises a `CheckpointError` unless what is `given` is what this was saved from."""
        _check_same_weights(self.weights, given.weights, source)
        _check_same_frozen(self.frozen, given.frozen, source)
        _check_same_state(self.leaves, given.leaves, source)

    def check_files(self, folder: Path, *, damaged: str) -> None:
        """Raises a `CheckpointError` unless all files are as they were written."""
        check_files(folder, self.checksums, damaged=damaged)


def stored_leaves(wrapped: PyTree, optimizer_state: PyTree) -> LeavesWithPaths:
    """Returns the leaves of both trees that a training checkpoint stores, each beside its path."""
    of_wrapped = [
        (f"wrapped/{path}/{name}", array)
        for path, node in adapter_nodes(wrapped).items()
        for name, array in saved_arrays(path, node).items()
    ]
    of_optimizer = leaves_with_paths(optimizer_state, is_leaf=lambda _: False)
    return of_wrapped + [(f"optimizer_state/{path}", leaf) for path, leaf in of_optimizer]


def with_leaves(
    wrapped: PyTree, optimizer_state: PyTree, leaves: Sequence[Any]
) -> tuple[PyTree, PyTree]:
    """Returns both trees with `leaves`, in the order of `stored_leaves`, in place of their own."""
    remaining = iter(leaves)
    arrays = {
        path: {name: next(remaining) for name in saved_arrays(path, node)}
        for path, node in adapter_nodes(wrapped).items()
    }
    new_wrapped = NodeIndex.of(wrapped).mapped(lambda path, node: _restored(path, node, arrays))
    return new_wrapped, jax.tree.unflatten(jax.tree.structure(optimizer_state), list(remaining))


def arrays_to_save(leaves: LeavesWithPaths) -> dict[str, Any]:
    """Returns what Orbax is to store: by its number, each leaf that has an array of numbers."""
    return {
        str(number): jax.random.key_data(leaf) if metadata.container == "key" else _array(leaf)
        for number, (path, leaf) in enumerate(leaves)
        if (metadata := LeafMetadata.of(path, leaf)).has_numbers
    }


def arrays_to_restore(metadata: Sequence[LeafMetadata], targets: Sequence[Any]) -> dict[str, Any]:
    """Returns what Orbax is to read: onto the shardings of the targets, or into NumPy arrays."""
    return {
        str(number): _abstract_array(leaf, sharding_of(target))
        for number, (leaf, target) in enumerate(zip(metadata, targets, strict=True))
        if leaf.has_numbers
    }


def restored_leaf(leaf: LeafMetadata, stored: Any, target: Any) -> Any:
    """Returns a leaf as it was saved, with the sharding of `target`."""
    if leaf.container == "number":
        return leaf.number
    if stored is None:
        stored = np.zeros(leaf.shape, jnp.dtype(leaf.dtype))
    if leaf.container == "numpy":
        return stored[()] if isinstance(target, np.generic) else stored
    array = jnp.asarray(stored)
    if leaf.container == "key":
        array = jax.random.wrap_key_data(array, impl=leaf.implementation)
    elif leaf.weak_type:
        array = _weakly_typed(array)
    return placed(array, sharding_of(target))


def _check_same_weights(
    saved: Mapping[str, WeightMetadata], given: Mapping[str, WeightMetadata], source: str
) -> None:
    """Raises a `CheckpointError` that names the path unless the same is adapted in the same way."""
    for path in saved:
        if path not in given:
            raise CheckpointError(
                f"{source} adapts '{path}', which `wrapped` does not adapt; the nearest paths that "
                f"it does are {listed(nearest_paths(path, given))}. {_SAME_WRAP}"
            )
    for path in given:
        if path not in saved:
            raise CheckpointError(
                f"{source} does not adapt '{path}', which `wrapped` does. {_SAME_WRAP}"
            )
        was, now = _properties(saved[path]), _properties(given[path])
        for name in {**was, **now}:
            if was.get(name) != now.get(name):
                raise CheckpointError(
                    f"{source} does not fit `wrapped` at '{path}': its {name} is {was.get(name)} "
                    f"in the checkpoint and {now.get(name)} in `wrapped`. {_SAME_WRAP}"
                )


def _check_same_frozen(saved: Mapping[str, int], given: Mapping[str, int], source: str) -> None:
    """Raises a `CheckpointError` that names the path unless the frozen numbers are the same."""
    for path in sorted({*saved, *given}):
        if saved.get(path) == given.get(path):
            continue
        what = (
            "which `wrapped` does not have"
            if path not in given
            else "which is not in the checkpoint's tree"
            if path not in saved
            else "whose numbers are not those that it had when the run began"
        )
        raise CheckpointError(
            f"{source} belongs to another model: `wrapped` differs at the frozen leaf '{path}', "
            f"{what}. Expected wrap(params, ...) of the params, and with the key and init, that "
            "the run began with. A leaf that changes in training and is not an adapter belongs in "
            "`optimizer_state`, as in (optimizer_state, batch_statistics)."
        )


def _check_same_state(
    saved: Sequence[LeafMetadata], given: Sequence[LeafMetadata], source: str
) -> None:
    """Raises a `CheckpointError` that names the path unless the optimiser's state is the same."""
    for was, now in itertools.zip_longest(saved, given):
        if was is None or now is None or not was.fits(now):
            came = "no leaf" if was is None else was.described()
            expected = "has none" if now is None else f"has {now.described()}"
            raise CheckpointError(
                f"{source} is of another optimiser: it has {came} where `optimizer_state` "
                f"{expected}. Expected tx.init(...) of the transformation that the run began with."
            )


def _properties(weight: WeightMetadata) -> dict[str, Any]:
    """Returns what is said of a weight: what `wrap` was told first, then what follows from it."""
    fields = {field.name: getattr(weight, field.name) for field in dataclasses.fields(weight)}
    arrays = fields.pop("arrays")
    return {**fields, **{name: f"{each.dtype} {each.shape}" for name, each in arrays.items()}}


def _restored(path: str, node: AdapterNode, arrays: Mapping[str, Any]) -> AdapterNode:
    if has_factors(node):
        leaves = leaves_of_arrays(arrays[path], node.shape, node.axes)
        restored: AdapterNode = dataclasses.replace(node, **leaves)
    else:
        restored = dataclasses.replace(node, **arrays[path])
    if is_adapter_node(node.base):
        restored = dataclasses.replace(restored, base=_restored(f"{path}/base", node.base, arrays))
    # The norms belong to the factors, which have just been replaced.
    return with_norms(restored) if is_bank(restored) and restored.norm is not None else restored


def _abstract_array(leaf: LeafMetadata, sharding: jax.sharding.Sharding | None) -> Any:
    dtype = jnp.dtype(leaf.dtype)
    if leaf.container != "jax" or sharding is None:
        return np.empty(leaf.shape, dtype)
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)


def _array(leaf: Any) -> Any:
    """Returns what Orbax writes; an array that each process has for itself is written by one."""
    is_local = not isinstance(leaf, jax.Array) or (
        jax.process_count() > 1 and leaf.is_fully_addressable
    )
    return np.asarray(leaf) if is_local else leaf


def _weakly_typed(array: Array) -> Array:
    number = jnp.zeros((), array.dtype).item()
    return jnp.broadcast_to(jnp.asarray(number), array.shape).at[...].set(array)
