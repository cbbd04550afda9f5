"""TFRecord files, TensorFlow Datasets' default format, read without TensorFlow."""

from collections.abc import Iterator
from pathlib import Path

_LENGTH_BYTES = 8
_CHECKSUM_BYTES = 4


def tfrecords(path: Path) -> Iterator[bytes]:
    """Yields the records: each is a length, its checksum, that many bytes, their checksum."""
    with path.open("rb") as file:
        while header := file.read(_LENGTH_BYTES + _CHECKSUM_BYTES):
            length = int.from_bytes(header[:_LENGTH_BYTES], "little")
            record = file.read(length)
            if len(record) != length or len(file.read(_CHECKSUM_BYTES)) != _CHECKSUM_BYTES:
                raise ValueError(f"{path} ends in the middle of a record")
            yield record
