"""Files are whole or absent, and folders that can't be written are named at once."""

import json

import pytest

from experiments.common.errors import InputError
from experiments.common.files import (
    atomic_path,
    bytes_in,
    used_alone,
    writable_folder,
    write_json,
)


def test_a_file_that_fails_halfway_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail_halfway():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_halfway()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_comes_back(tmp_path):
    write_json(tmp_path / "metrics.json", {"accuracy": 0.5})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"accuracy": 0.5}


def test_a_folder_is_made_with_its_parents(tmp_path):
    assert writable_folder(tmp_path / "a" / "b", "--out").is_dir()


def test_a_folder_that_cannot_be_is_named_with_its_option(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--out .*file/below can't be written"):
        writable_folder(tmp_path / "file" / "below", "--out")


def test_the_size_of_a_folder_is_that_of_all_its_files(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "one").write_bytes(bytes(3))
    (tmp_path / "below" / "two").write_bytes(bytes(4))
    assert bytes_in(tmp_path) == 7


def test_a_folder_is_used_by_one_run_at_a_time(tmp_path):
    with (
        used_alone(tmp_path, "--out"),
        pytest.raises(InputError, match="used by another run"),
        used_alone(tmp_path, "--out"),
    ):
        pass
    with used_alone(tmp_path, "--out"):
        pass
