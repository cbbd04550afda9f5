"""Checkpoints of adapters: what was trained and what it belongs to, without the base weights.

A checkpoint is a folder with the arrays, which Orbax writes, and `adapters.json`, which says what
was trained at each adapted path.
"""

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lora_jax._folders import (
    CheckpointError,
    as_checkpoint_error,
    check_destination,
    complete_folder,
    interruption_hint,
    undisturbed,
)
from lora_jax._nodes import adapter_nodes
from lora_jax._paths import map_with_paths
from lora_jax._processes import is_shared, on_first_process
from lora_jax.checkpoint._files import check_files, file_checksums, read_signed, signed_text
from lora_jax.checkpoint._fingerprints import BaseFingerprint, base_fingerprints, check_same_base
from lora_jax.checkpoint._weights import (
    ArrayMetadata,
    WeightMetadata,
    check_fits,
    placed,
    saved_arrays,
    shardings_of,
)

FORMAT_VERSION = 2

_FORMAT = "lora_jax adapters"
_METADATA_FILE = "adapters.json"
_ARRAYS_FOLDER = "arrays"

ArraysByName = dict[str, Any]


def save(path: str | os.PathLike[str], wrapped: PyTree, *, overwrite: bool = False) -> None:
    """Writes the adapters of `wrapped`, without the frozen base, into the folder `path`.

    A fingerprint of the base is kept, by which `restore` recognises it. The folder appears when it
    is complete; one that it replaces stays until then. In a program of several processes all of
    them call `save`: each writes its part into the folder, which they share.

    Args:
      path: the folder to write; its parents are created.
      wrapped: what `wrap` returned, trained or not; sharded in any way.
      overwrite: whether to replace a checkpoint that is already at `path`.

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
    nodes = adapter_nodes(wrapped)
    arrays = {key: _local_on_host(saved_arrays(key, node)) for key, node in nodes.items()}
    metadata = {key: WeightMetadata.of(node, arrays[key]) for key, node in nodes.items()}
    bases = base_fingerprints(nodes)

    with contextlib.ExitStack() as stack:

        def begin() -> str:
            check_destination(
                destination, obstacle=_obstacle, content="a checkpoint", overwrite=overwrite
            )
            return str(stack.enter_context(complete_folder(destination, overwrite=overwrite)))

        folder = Path(on_first_process(begin))

        def complete() -> str:
            text = _metadata_text(metadata, bases, file_checksums(folder, _ARRAYS_FOLDER))
            (folder / _METADATA_FILE).write_text(text, encoding="utf-8")
            stack.close()
            return ""

        _write_arrays(folder / _ARRAYS_FOLDER, arrays)
        on_first_process(complete)


def restore(
    path: str | os.PathLike[str],
    params: PyTree,
    *,
    like: PyTree | None = None,
    check_base: bool = True,
) -> PyTree:
    """Returns `params` wrapped with the adapters that `save` wrote into the folder `path`.

    What was saved comes back bit for bit, including numbers that are not finite: a file format does
    not judge whether a run that diverged is of use.

    Args:
      path: the folder that `save` wrote.
      params: plain params of the model that the adapters belong to. Their containers and the
        weights' dtypes may differ from those at saving; paths and shapes may not.
      like: a tree that is wrapped in the same way, of arrays or of `jax.ShapeDtypeStruct`, such as
        `wrap` makes of shapes; the restored factors get the shardings of its factors, and each
        process reads its part. Without it they are on JAX's default device and not committed to it,
        and a compiled function moves them to the mesh of the weights.
      check_base: whether the adapted weights in `params` must be those that the adapters were saved
        beside. Weights without numbers (`jax.ShapeDtypeStruct`) are not checked, and checkpoints of
        earlier versions say nothing about theirs.

    Returns:
      A wrapped tree with the factors, scales and weights trained in full exactly as they were
      saved, whatever they were sharded over then.

    Raises:
      CheckpointError: there is no adapter checkpoint, it is damaged or of a newer format, or a
        path, a shape or a rank does not fit `params` or `like`; or an adapted weight has the dtype
        that it had at saving, but other numbers.

    Warns:
      BaseMismatchWarning: an adapted weight has another dtype than at saving.

    Examples:
      >>> import jax.numpy as jnp, lora_jax, tempfile
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     lora_jax.save(folder, lora_jax.wrap(params, "kernel", rank=2))
      ...     lora_jax.restore(folder, params)["kernel"].rank
      2
    """
    source = Path(path).resolve()
    stored = undisturbed(source, lambda: _read(source, params, like))
    restored = map_with_paths(stored.node, params)
    if check_base:
        check_same_base(source, stored.bases, params, restored)
    return restored


@dataclasses.dataclass(frozen=True)
class _Stored:
    """What a checkpoint holds, by path."""

    metadata: Mapping[str, WeightMetadata]
    bases: Mapping[str, BaseFingerprint]
    arrays: Mapping[str, Mapping[str, Any]]

    def node(self, path: str, leaf: Any) -> Any:
        """Returns the node at a path on an original weight, or the leaf where there is none."""
        if path not in self.arrays:
            return leaf
        return self.metadata[path].node(self.node(f"{path}/base", leaf), self.arrays[path])


def _read(source: Path, params: PyTree, like: PyTree | None) -> _Stored:
    """Returns what a checkpoint holds, having checked that it fits."""
    content = _read_metadata(source)
    with as_checkpoint_error(_damaged(source)):
        metadata = {path: WeightMetadata.from_json(x) for path, x in content["weights"].items()}
        # Earlier versions stored nothing of the base.
        saved_bases = content.get("bases", {}).items()
        bases = {path: BaseFingerprint.from_json(each) for path, each in saved_bases}
        checksums = dict(content["crc32"])
    check_fits(source, metadata, params)
    shardings = {} if like is None else shardings_of(source, metadata, like)
    check_files(source, checksums, damaged=_damaged(source))
    return _Stored(metadata, bases, _read_arrays(source, metadata, shardings))


def _local_on_host(arrays: Mapping[str, Any]) -> ArraysByName:
    """Returns arrays of NumPy, but for those that other processes hold parts of."""
    return {
        name: array if is_shared(array) else np.asarray(array) for name, array in arrays.items()
    }


def _metadata_text(
    metadata: Mapping[str, WeightMetadata],
    bases: Mapping[str, BaseFingerprint],
    checksums: Mapping[str, int],
) -> str:
    weights, fingerprints = (
        {path: dataclasses.asdict(each) for path, each in by_path.items()}
        for by_path in (metadata, bases)
    )
    content = {"weights": weights, "bases": fingerprints, "crc32": checksums}
    return signed_text(_FORMAT, FORMAT_VERSION, content)


def _obstacle(destination: Path) -> str | None:
    """Returns what keeps a checkpoint from replacing what is at `destination`, or None."""
    is_checkpoint = (destination / _METADATA_FILE).is_file()
    return None if is_checkpoint else "exists and is not an adapter checkpoint"


def _write_arrays(folder: Path, arrays: Mapping[str, ArraysByName]) -> None:
    import orbax.checkpoint as ocp

    flat = {
        _array_key(path, name): array
        for path, by_name in arrays.items()
        for name, array in by_name.items()
    }
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(folder, args=ocp.args.StandardSave(flat))


def _read_arrays(
    source: Path, metadata: Mapping[str, WeightMetadata], shardings: Mapping[Any, Any]
) -> dict[str, dict[str, jax.Array]]:
    """Returns the arrays of each weight, where `shardings` say by path and name."""
    import orbax.checkpoint as ocp

    expected = {
        (path, name): array
        for path, weight in metadata.items()
        for name, array in weight.arrays.items()
    }
    with (
        as_checkpoint_error(_damaged(source)),
        ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer,
    ):
        targets = _targets(expected, shardings) if jax.process_count() > 1 else None
        stored = checkpointer.restore(
            source / _ARRAYS_FOLDER, args=ocp.args.StandardRestore(targets)
        )
    found: dict[str, dict[str, jax.Array]] = {path: {} for path in metadata}
    for (path, name), array in expected.items():
        checked = _checked_array(source, _array_key(path, name), stored, array)
        found[path][name] = placed(checked, shardings.get((path, name)))
    return found


def _targets(
    expected: Mapping[tuple[str, str], ArrayMetadata], shardings: Mapping[Any, Any]
) -> dict[str, Any]:
    """Returns what several processes read: each its part of an array, if they share it."""
    return {
        _array_key(*key): np.empty(array.shape, jnp.dtype(array.dtype))
        if shardings.get(key) is None
        else jax.ShapeDtypeStruct(array.shape, jnp.dtype(array.dtype), sharding=shardings[key])
        for key, array in expected.items()
    }


def _array_key(path: str, name: str) -> str:
    return f"{path}/{name}"


def _checked_array(
    source: Path, key: str, stored: Mapping[str, Any], expected: ArrayMetadata
) -> jax.Array:
    if key not in stored or ArrayMetadata.of(stored[key]) != expected:
        raise CheckpointError(f"{_damaged(source)}: it has no array '{key}' like {expected}.")
    array = jnp.asarray(stored[key])
    if array.dtype != expected.dtype:
        raise CheckpointError(
            f"the checkpoint {source} holds '{key}' in {expected.dtype}, which JAX would round to "
            f'{array.dtype}; call jax.config.update("jax_enable_x64", True) before restore.'
        )
    return array


def _read_metadata(source: Path) -> dict[str, Any]:
    with as_checkpoint_error(f"`path` {source} can't be read"):
        _check_source(source)
    return read_signed(source / _METADATA_FILE, _FORMAT, FORMAT_VERSION, damaged=_damaged(source))


def _check_source(source: Path) -> None:
    if (source / _METADATA_FILE).is_file():
        return
    if not source.exists():
        raise CheckpointError(
            f"`path` {source} does not exist; expected a folder that save wrote."
            f"{interruption_hint(source)}"
        )
    raise CheckpointError(
        f"`path` {source} is not an adapter checkpoint: it has no {_METADATA_FILE}; expected a "
        "folder that save wrote."
    )


def _damaged(source: Path) -> str:
    return f"the checkpoint {source} is damaged, restore another copy or save it again"
