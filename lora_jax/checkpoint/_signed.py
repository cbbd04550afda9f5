"""JSON files that say what they are and hold a checksum of themselves."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax._folders import CheckpointError, as_checkpoint_error

_OWN_CHECKSUM = "own_crc32"


def signed_text(format_name: str, version: int, content: Mapping[str, Any]) -> str:
    """Returns readable JSON of `content`, its format and version, and a checksum of all three."""
    unsigned = {"format": format_name, "version": version, **content}
    signed = {**unsigned, _OWN_CHECKSUM: _checksum(unsigned)}
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
    if content.pop(_OWN_CHECKSUM, None) not in (None, _checksum(content)):
        raise CheckpointError(f"{damaged}: {file.name} is not as it was saved.")
    return content


def _checksum(content: Mapping[str, Any]) -> int:
    # Read again first, so that tuples and the keys of dicts are those that a reader gets.
    as_read = json.loads(json.dumps(content))
    return zlib.crc32(json.dumps(as_read, sort_keys=True).encode())
