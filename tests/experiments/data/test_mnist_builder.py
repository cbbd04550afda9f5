"""IDX files: what is read, and what is refused."""

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest

from experiments.common.errors import InputError
from experiments.data.mnist_builder import FILES, check_originals, read_idx


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def originals(tmp_path) -> tuple[Path, dict[str, str]]:
    """Returns a folder with four files, and the checksums by which they are known."""
    for name in FILES:
        write_idx(tmp_path / name, np.zeros(3, np.uint8))
    checksums = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in FILES}
    return tmp_path, checksums


@pytest.mark.parametrize("shape", [(5,), (3, 28, 28)])
def test_reads_what_was_written(tmp_path, shape):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    write_idx(tmp_path / "array.gz", array)
    assert np.array_equal(read_idx(tmp_path / "array.gz"), array)


def test_refuses_a_file_of_another_kind(tmp_path):
    path = tmp_path / "array.gz"
    path.write_bytes(gzip.compress(b"not IDX at all"))
    with pytest.raises(ValueError, match=r"array\.gz is not an IDX file"):
        read_idx(path)


def test_originals_pass(originals):
    check_originals(*originals)


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match=r"--mnist-dir .*nowhere, which is not a folder"):
        check_originals(tmp_path / "nowhere", {})


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(originals, name):
    folder, checksums = originals
    (folder / name).unlink()
    with pytest.raises(InputError, match=rf"{name} is missing.*Fetch it again"):
        check_originals(folder, checksums)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(originals, name):
    folder, checksums = originals
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(InputError, match=rf"{name} is damaged or another file.*Fetch it again"):
        check_originals(folder, checksums)
