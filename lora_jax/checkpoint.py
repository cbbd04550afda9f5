"""Checkpoints of adapters: what was trained and what it belongs to, without the base weights.

A checkpoint is a folder with the arrays, written by Orbax, and `adapters.json`, which says for each
adapted path what was trained there. Orbax is imported on first use.
"""

import dataclasses
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lora_jax._algebra import lora_weight
from lora_jax._folders import (
    CheckpointError,
    as_checkpoint_error,
    cannot_write,
    complete_folder,
    interruption_hint,
    is_free,
)
from lora_jax._paths import leaves_with_paths, listed, map_with_paths, nearest_paths
from lora_jax._shapes import Axes, Layers, factor_shapes, layers_shape, sizes
from lora_jax._weight import FullWeight, LoRAWeight, is_adapter_node

FORMAT_VERSION = 2

_FORMAT = "lora_jax adapters"
_METADATA_FILE = "adapters.json"
_ARRAYS_FOLDER = "arrays"

AdapterNode = LoRAWeight | FullWeight
ArraysByName = dict[str, np.ndarray]

# What `restore` finds in the params or computes from them.
_OF_THE_BASE = frozenset({"base", "squared_norm"})


def save(path: str | os.PathLike[str], wrapped: PyTree, *, overwrite: bool = False) -> None:
    """Writes the adapters of `wrapped`, and nothing of the frozen base, into the folder `path`.

    The folder appears when it is complete. One that is overwritten stays until then.

    Args:
      path: the folder to write; what is above it is created.
      wrapped: what `wrap` returned, trained or not.
      overwrite: whether a checkpoint that is at `path` already may be replaced.

    Raises:
      CheckpointError: `wrapped` has no adapters or is half a tree; `path` is taken or can't be
        written.

    Examples:
      >>> import jax.numpy as jnp, lora_jax, tempfile
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> wrapped = lora_jax.wrap(params, "kernel", rank=2)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     lora_jax.save(f"{folder}/adapters", wrapped)
      ...     restored = lora_jax.restore(f"{folder}/adapters", params)
      >>> bool((restored["kernel"].lora_A == wrapped["kernel"].lora_A).all())
      True
    """
    destination = Path(path).resolve()
    nodes = _adapter_nodes(wrapped)
    arrays = {key: _host_arrays(key, node) for key, node in nodes.items()}
    metadata = {key: _WeightMetadata.of(node, arrays[key]) for key, node in nodes.items()}
    with as_checkpoint_error(cannot_write(destination)):
        _check_destination(destination, overwrite)
    with complete_folder(destination) as folder:
        _write_arrays(folder / _ARRAYS_FOLDER, arrays)
        text = _metadata_text(metadata, _checksums(folder))
        (folder / _METADATA_FILE).write_text(text, encoding="utf-8")


def restore(path: str | os.PathLike[str], params: PyTree) -> PyTree:
    """Returns `params` wrapped with the adapters that `save` wrote into the folder `path`.

    Args:
      path: the folder that `save` wrote.
      params: plain params of the model that the adapters belong to. Their containers and the
        weights' dtypes may differ from those at saving; paths and shapes may not.

    Returns:
      A wrapped tree with the factors, scales and weights trained in full exactly as they were
      saved, on JAX's default device.

    Raises:
      CheckpointError: there is no adapter checkpoint, it is damaged or of a newer format, or a
        path, a shape or a rank does not fit `params`.

    Examples:
      >>> import jax.numpy as jnp, lora_jax, tempfile
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     lora_jax.save(folder, lora_jax.wrap(params, "kernel", rank=2))
      ...     lora_jax.restore(folder, params)["kernel"].rank
      2
    """
    source = Path(path).resolve()
    metadata, checksums = _read_metadata(source)
    _check_fits(source, metadata, params)
    _check_undamaged(source, checksums)
    arrays = _read_arrays(source, metadata)
    return map_with_paths(
        lambda key, leaf: metadata[key].node(leaf, arrays[key]) if key in arrays else leaf, params
    )


@dataclasses.dataclass(frozen=True)
class _ArrayMetadata:
    """What an array must be when it is read again."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, array: np.ndarray) -> "_ArrayMetadata":
        return cls(array.shape, str(array.dtype))

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "_ArrayMetadata":
        return cls(**{**entry, "shape": tuple(entry["shape"])})


@dataclasses.dataclass(frozen=True)
class _WeightMetadata:
    """What was trained at one path. A weight trained in full has no rank, alpha and axes."""

    kind: str
    shape: tuple[int, ...]
    dtype: str
    arrays: Mapping[str, _ArrayMetadata]
    rank: int | None = None
    alpha: float | list[float] | None = None
    axes: Axes | None = None
    layers: Layers | None = None
    frozen: tuple[str, ...] = ()

    @classmethod
    def of(cls, node: AdapterNode, arrays: ArraysByName) -> "_WeightMetadata":
        common: dict[str, Any] = {
            "kind": type(node).__name__,
            "shape": tuple(node.shape),
            "dtype": str(node.dtype),
            "arrays": {name: _ArrayMetadata.of(array) for name, array in arrays.items()},
        }
        if isinstance(node, FullWeight):
            return cls(**common)
        return cls(
            **common,
            rank=node.rank,
            alpha=_alpha(arrays["scale"], node.rank),
            axes=node.axes,
            layers=node.layers,
            frozen=node.frozen,
        )

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "_WeightMetadata":
        arrays = {name: _ArrayMetadata.from_json(each) for name, each in entry["arrays"].items()}
        lists = {
            name: None if entry.get(name) is None else tuple(entry[name])
            for name in ("axes", "layers")
        }
        weight = cls(
            **{
                **entry,
                **lists,
                "shape": tuple(entry["shape"]),
                "arrays": arrays,
                "frozen": tuple(entry.get("frozen", ())),
            }
        )
        if not weight._is_complete():
            raise ValueError(
                f"a {weight.kind} of {sorted(arrays)}; expected a LoRAWeight of lora_A, lora_B and "
                "scale, or a FullWeight of value"
            )
        return weight

    def node(self, weight: Any, arrays: Mapping[str, Any]) -> AdapterNode:
        """Returns the node that was saved, on another original weight."""
        if self.kind == "FullWeight":
            return FullWeight(base=weight, **arrays)
        assert self.axes is not None
        return lora_weight(weight, **arrays, axes=self.axes, layers=self.layers, frozen=self.frozen)

    def _is_complete(self) -> bool:
        if self.kind == "FullWeight":
            return set(self.arrays) == {"value"}
        optional = set(self.arrays) - {"lora_A", "lora_B", "scale"}
        return (
            self.kind == "LoRAWeight"
            and len(self.arrays) - len(optional) == 3
            and optional - {"magnitude"} in ({"initial_A", "initial_B"}, set())
        )


def _alpha(scale: np.ndarray, rank: int) -> float | list[float]:
    # For the reader: the digits that float32 does not have would only be noise.
    alpha: float | list[float] = np.round(scale.astype(np.float64) * rank, 6).tolist()
    return alpha


def _adapter_nodes(wrapped: PyTree) -> dict[str, AdapterNode]:
    nodes: dict[str, AdapterNode] = {}
    for path, node in leaves_with_paths(wrapped, is_leaf=is_adapter_node):
        if not is_adapter_node(node):
            continue
        if path in nodes:
            raise CheckpointError(
                f"`wrapped` has two adapted leaves with the path '{path}', by which a checkpoint "
                "tells them apart; rename a key that contains '/'."
            )
        nodes[path] = node
    if not nodes:
        raise CheckpointError(
            "`wrapped` has no adapters to save; expected what wrap(params, targets) returned."
        )
    return nodes


def _host_arrays(path: str, node: AdapterNode) -> ArraysByName:
    """Returns what is saved of a node: all that does not follow from the original weight."""
    arrays = {}
    for field in dataclasses.fields(node):
        leaf = getattr(node, field.name)
        if leaf is None and field.default is dataclasses.MISSING:
            raise CheckpointError(
                f"`wrapped` has no `{field.name}` at '{path}'; expected a whole tree, such as "
                "combine(adapters, frozen)."
            )
        if leaf is None or field.metadata.get("static"):
            continue
        if field.name not in _OF_THE_BASE:
            arrays[field.name] = np.asarray(leaf)
    return arrays


def _metadata_text(metadata: Mapping[str, _WeightMetadata], checksums: Mapping[str, int]) -> str:
    weights = {path: dataclasses.asdict(weight) for path, weight in metadata.items()}
    content = {
        "format": _FORMAT,
        "version": FORMAT_VERSION,
        "weights": weights,
        "crc32": checksums,
    }
    return json.dumps(content, indent=2, ensure_ascii=False)


def _checksums(folder: Path) -> dict[str, int]:
    """Returns the checksum of every file below `folder`, by its relative name."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): zlib.crc32(file.read_bytes()) for file in files}


def _check_destination(destination: Path, overwrite: bool) -> None:
    if is_free(destination):
        return
    # Replacing deletes, so it must not reach a folder that holds anything else.
    if not (destination / _METADATA_FILE).is_file():
        raise CheckpointError(
            f"`path` {destination} exists and is no adapter checkpoint; choose another folder."
        )
    if not overwrite:
        raise CheckpointError(
            f"`path` {destination} holds a checkpoint; "
            "save(path, wrapped, overwrite=True) replaces it."
        )


def _write_arrays(folder: Path, arrays: Mapping[str, ArraysByName]) -> None:
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(folder, args=ocp.args.StandardSave(_flat(arrays)))


def _read_arrays(
    source: Path, metadata: Mapping[str, _WeightMetadata]
) -> dict[str, dict[str, jax.Array]]:
    import orbax.checkpoint as ocp

    with (
        as_checkpoint_error(_damaged(source)),
        ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer,
    ):
        stored = checkpointer.restore(source / _ARRAYS_FOLDER)
    return {
        path: {
            name: _checked_array(source, _array_key(path, name), stored, expected)
            for name, expected in weight.arrays.items()
        }
        for path, weight in metadata.items()
    }


def _flat(arrays: Mapping[str, ArraysByName]) -> ArraysByName:
    return {
        _array_key(path, name): array
        for path, by_name in arrays.items()
        for name, array in by_name.items()
    }


def _array_key(path: str, name: str) -> str:
    return f"{path}/{name}"


def _checked_array(
    source: Path, key: str, stored: Mapping[str, Any], expected: _ArrayMetadata
) -> jax.Array:
    if key not in stored or _ArrayMetadata.of(stored[key]) != expected:
        raise CheckpointError(f"{_damaged(source)}: it has no array '{key}' like {expected}.")
    array = jnp.asarray(stored[key])
    if array.dtype != expected.dtype:
        raise CheckpointError(
            f"the checkpoint {source} holds '{key}' in {expected.dtype}, which JAX would cut to "
            f'{array.dtype}; call jax.config.update("jax_enable_x64", True) before restore.'
        )
    return array


def _read_metadata(source: Path) -> tuple[dict[str, _WeightMetadata], dict[str, int]]:
    with as_checkpoint_error(f"`path` {source} can't be read"):
        _check_source(source)
    with as_checkpoint_error(_damaged(source)):
        content = json.loads((source / _METADATA_FILE).read_text(encoding="utf-8"))
        stored_format, version = content["format"], int(content["version"])
    if stored_format != _FORMAT:
        raise CheckpointError(
            f"{source / _METADATA_FILE} has the format {stored_format!r}; expected {_FORMAT!r}."
        )
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"the checkpoint {source} has format version {version}, and this lora_jax reads "
            f"versions up to {FORMAT_VERSION}: upgrade lora_jax."
        )
    with as_checkpoint_error(_damaged(source)):
        weights = {path: _WeightMetadata.from_json(x) for path, x in content["weights"].items()}
        return weights, dict(content["crc32"])


def _check_undamaged(source: Path, checksums: Mapping[str, int]) -> None:
    # Before Orbax reads: it would leave threads and event loops behind on the way out.
    with as_checkpoint_error(_damaged(source)):
        for name, checksum in checksums.items():
            if zlib.crc32((source / name).read_bytes()) != checksum:
                raise CheckpointError(f"{_damaged(source)}: {name} is not as it was saved.")


def _check_source(source: Path) -> None:
    if (source / _METADATA_FILE).is_file():
        return
    if not source.exists():
        raise CheckpointError(
            f"`path` {source} does not exist; expected a folder that save wrote."
            f"{interruption_hint(source)}"
        )
    raise CheckpointError(
        f"`path` {source} is no adapter checkpoint, having no {_METADATA_FILE}; expected a folder "
        "that save wrote."
    )


def _check_fits(source: Path, metadata: Mapping[str, _WeightMetadata], params: PyTree) -> None:
    leaves = dict(leaves_with_paths(params, is_leaf=is_adapter_node))
    wrapped = [path for path, leaf in leaves.items() if is_adapter_node(leaf)]
    if wrapped:
        raise CheckpointError(
            f"`params` is wrapped already at {listed(wrapped)}; expected plain params: "
            "restore(path, unwrap(params))."
        )
    for path, weight in metadata.items():
        if path not in leaves:
            raise CheckpointError(
                f"the checkpoint {source} adapts '{path}', which `params` does not have; the "
                f"nearest paths are {listed(nearest_paths(path, leaves))}. Expected the params of "
                "the model that it was saved from."
            )
        misfit = _misfit(weight, leaves[path])
        if misfit:
            raise CheckpointError(f"the checkpoint {source} does not fit at '{path}': {misfit}")


def _misfit(weight: _WeightMetadata, leaf: Any) -> str | None:
    """Returns what keeps `weight` from standing at `leaf`, or None."""
    shape = tuple(getattr(leaf, "shape", ()))
    if shape != weight.shape:
        return f"it has a weight of shape {weight.shape} there, and `params` one of shape {shape}."
    if weight.kind == "FullWeight":
        dtype = str(getattr(leaf, "dtype", type(leaf).__name__))
        return (
            None
            if dtype == weight.dtype
            else f"that weight was trained in full as {weight.dtype}, and `params` has {dtype}; "
            f"cast it with astype('{weight.dtype}')."
        )
    return _factor_misfit(weight)


def _factor_misfit(weight: _WeightMetadata) -> str | None:
    axes, rank = weight.axes, weight.rank
    if axes is None or rank is None or len(axes) != len(weight.shape):
        return f"its axes are {axes} and its rank {rank} for a weight of shape {weight.shape}."
    if weight.layers is not None and "batch" not in axes:
        return f"it adapts the layers {weight.layers} of a weight with the axes {axes}."
    adapted = layers_shape(weight.shape, axes, weight.layers)
    A_shape, B_shape = factor_shapes(adapted, axes, rank)
    by_name = {"lora_A": A_shape, "lora_B": B_shape, "initial_A": A_shape, "initial_B": B_shape}
    by_name["magnitude"] = sizes(adapted, axes, "batch", "out")
    for name, array in weight.arrays.items():
        if name == "scale":
            continue
        expected, shape = by_name[name], array.shape
        # Stacked adapters have one more axis in front.
        if shape[-len(expected) :] != expected:
            return (
                f"its {name} has shape {shape}; expected {expected} for a weight of shape "
                f"{weight.shape} with axes {axes} and rank {rank}."
            )
    return None


def _damaged(source: Path) -> str:
    return f"the checkpoint {source} is damaged, restore another copy or save it again"
