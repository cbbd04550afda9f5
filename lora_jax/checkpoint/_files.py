"""What the files of a checkpoint have in common: JSON that says what it is, and checksums."""

import base64
import json
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._folders import CheckpointError, as_checkpoint_error

_OWN_CHECKSUM = "own_crc32"
_CHUNK = 1 << 20

_TYPE = "$type"
_PLAIN = (bool, int, float, str, type(None))


def signed_text(format_name: str, version: int, content: Mapping[str, Any]) -> str:
    """Returns readable JSON of `content`, its format and version, and a checksum of all three."""
    unsigned = {"format": format_name, "version": version, **content}
    signed = {**unsigned, _OWN_CHECKSUM: _json_checksum(unsigned)}
    return json.dumps(signed, indent=2, ensure_ascii=False)


def read_signed(file: Path, format_name: str, version: int, *, damaged: str) -> dict[str, Any]:
    """Returns the content of what `signed_text` wrote; errors start with `damaged`."""
    with as_checkpoint_error(damaged):
        content = json.loads(file.read_text(encoding="utf-8"))
        stored_format, stored_version = content["format"], int(content["version"])
    if stored_format != format_name:
        raise CheckpointError(f"{file} has the format {stored_format!r}; expected {format_name!r}.")
    if stored_version > version:
        raise CheckpointError(
            f"the checkpoint {file.parent} has format version {stored_version}, and this lora_jax "
            f"reads versions up to {version}: upgrade lora_jax."
        )
    # Files of earlier versions have no checksum of themselves.
    if content.pop(_OWN_CHECKSUM, None) not in (None, _json_checksum(content)):
        raise CheckpointError(f"{damaged}: {file.name} is not as it was saved.")
    return content


def file_checksums(folder: Path, below: str) -> dict[str, int]:
    """Returns the checksum of every file below a part of `folder`, by its name in `folder`."""
    files = sorted(file for file in (folder / below).rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): _file_checksum(file) for file in files}


def check_files(folder: Path, checksums: Mapping[str, int], *, damaged: str) -> None:
    """Raises a `CheckpointError`, which starts with `damaged`, unless all files are as they were.

    This comes before Orbax reads: it would leave threads and event loops behind on the way out.
    """
    escaping = [name for name in checksums if not _is_below(name)]
    if escaping:
        raise CheckpointError(
            f"the checkpoint {folder} names the file {escaping[0]!r}, which is not below that "
            "folder, and nothing was read; expected a checkpoint that lora_jax wrote."
        )
    with as_checkpoint_error(damaged):
        for name, checksum in checksums.items():
            if _file_checksum(folder / name) != checksum:
                raise CheckpointError(f"{damaged}: {name} is not as it was saved.")


def position_to_json(value: Any, place: str = "") -> Any:
    """Returns a data position in terms of JSON; `place` is where it stands within the whole."""
    if type(value) in _PLAIN:
        return value
    if type(value) in (list, tuple):
        items = [position_to_json(each, f"{place}/{i}") for i, each in enumerate(value)]
        return items if type(value) is list else {_TYPE: "tuple", "items": items}
    if type(value) is dict:
        if any(type(name) is not str or name == _TYPE for name in value):
            raise _unexpected(place, f"a dict with the keys {list(value)}")
        return {name: position_to_json(each, f"{place}/{name}") for name, each in value.items()}
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return _array_to_json(value, place)
    raise _unexpected(place, f"a {type(value).__name__}")


def position_from_json(value: Any) -> Any:
    """Returns the data position of which `position_to_json` returned this."""
    if isinstance(value, list):
        return [position_from_json(each) for each in value]
    if not isinstance(value, dict):
        return value
    if _TYPE not in value:
        return {name: position_from_json(each) for name, each in value.items()}
    if value[_TYPE] == "tuple":
        return tuple(position_from_json(each) for each in value["items"])
    array = np.frombuffer(base64.b64decode(value["data"]), jnp.dtype(value["dtype"]))
    array = array.reshape(value["shape"]).copy()
    if value[_TYPE] == "key":
        return jax.random.wrap_key_data(jnp.asarray(array), impl=value["implementation"])
    return array[()] if value[_TYPE] == "scalar" else array


def _json_checksum(content: Mapping[str, Any]) -> int:
    # Read again first, so that tuples and the keys of dicts are those that a reader gets.
    as_read = json.loads(json.dumps(content))
    return zlib.crc32(json.dumps(as_read, sort_keys=True).encode())


def _file_checksum(file: Path) -> int:
    checksum = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _is_below(name: str) -> bool:
    """Says whether `name` stays below the folder that it is joined to, on any system."""
    return not any(
        path.drive or path.root or ".." in path.parts
        for path in (PurePosixPath(name), PureWindowsPath(name))
    )


def _array_to_json(array: Any, place: str) -> dict[str, Any]:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        implementation = str(jax.random.key_impl(array))
        data = _array_to_json(np.asarray(jax.random.key_data(array)), place)
        return {**data, _TYPE: "key", "implementation": implementation}
    if array.dtype.hasobject or array.dtype.names:
        raise _unexpected(place, f"an array of {array.dtype}")
    return {
        _TYPE: "scalar" if isinstance(array, np.generic) else "array",
        "dtype": str(array.dtype),
        "shape": list(array.shape),
        "data": base64.b64encode(np.asarray(array).tobytes()).decode(),
    }


def _unexpected(place: str, what: str) -> CheckpointError:
    where = f" at '{place[1:]}'" if place else ""
    return CheckpointError(
        f"`data_position` has {what}{where}; expected numbers, text, booleans, None, arrays and "
        "random keys, in lists, tuples and dicts with text for keys. A NumPy generator is stored "
        "as `generator.bit_generator.state`."
    )
