"""Data sets that TensorFlow Datasets prepares and reads without TensorFlow.

Importing this module takes a second.
"""

import contextlib
import io
import logging
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

from experiments.common.console import Console
from experiments.common.errors import InputError

_PROBE_SECONDS = 5

# How many records are read at once.
_RECORDS = 1024

# Of the fields of a TFRecord file.
_LENGTH_BYTES = 8
_CHECKSUM_BYTES = 4


def builder_in(make: Callable[..., Any], data_dir: Path) -> Any:
    """Returns the builder of the data set in this folder, in any file format, or of a new one.

    Args:
      make: the builder's class, its other arguments bound.
      data_dir: where prepared data sets are.
    """
    as_prepared = make(data_dir=data_dir)
    if is_prepared(as_prepared):
        return as_prepared
    return make(data_dir=data_dir, file_format="array_record")


def is_prepared(builder: Any) -> bool:
    """Returns whether a data set is there, without TFDS's warning if it is not."""
    with _quiet():
        return builder.is_prepared()


def prepare_from_network(builder: Any, url: str, console: Console) -> None:
    """Downloads and prepares a data set.

    Raises:
      OSError: `url` can't be reached, which is found out within seconds, or the download failed.
    """
    # TFDS itself waits forever for a server that doesn't answer.
    probe = urllib.request.Request(url, method="HEAD")
    urllib.request.urlopen(probe, timeout=_PROBE_SECONDS).close()
    try:
        prepare(builder, None, url, console)
    except (tfds.download.DownloadError, NonMatchingChecksumError) as error:
        raise OSError(f"the download failed: {error}") from error


def prepare(builder: Any, manual_dir: Path | None, source: str, console: Console) -> None:
    """Prepares a data set from the files in a folder, or from the network if it is None."""
    console.note(f"Preparing {builder.name}, once, from {source} in {builder.data_dir}")
    if not console.is_terminal:
        tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False)
    with _quiet():
        try:
            builder.download_and_prepare(download_config=config)
        except PermissionError as error:
            raise InputError(
                f"--data-dir {builder.data_dir} can't be written ({error}); pass another folder"
            ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what TFDS prints and warns of; standard output is for the study's results."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def examples(builder: Any, split: str, decoders: Any = None) -> Iterator[Any]:
    """Yields the examples of a prepared split."""
    prepared: Any = tfds.builder_from_directory(builder.data_dir)
    if prepared.info.file_format is tfds.core.FileFormat.TFRECORD:
        for path in prepared.info.splits[split].filepaths:
            for record in tfrecords(Path(path)):
                yield prepared.info.features.deserialize_example_np(record, decoders=decoders)
    else:
        source = prepared.as_data_source(split, decoders=decoders)
        # Reading records one by one takes six times as long.
        for first in range(0, len(source), _RECORDS):
            yield from source.__getitems__(range(first, min(first + _RECORDS, len(source))))


def tfrecords(path: Path) -> Iterator[bytes]:
    """Yields the records of a TFRecord file, TFDS's default format.

    Each is a length, the checksum of that, so many bytes, and their checksum.
    """
    with path.open("rb") as file:
        while header := file.read(_LENGTH_BYTES + _CHECKSUM_BYTES):
            length = int.from_bytes(header[:_LENGTH_BYTES], "little")
            record = file.read(length)
            if len(record) != length or len(file.read(_CHECKSUM_BYTES)) != _CHECKSUM_BYTES:
                raise ValueError(f"{path} ends in the middle of a record")
            yield record
