"""Finished cells come back for exactly their settings, whole or not at all."""

from pathlib import Path

import pytest

from experiments.cell_store import CellStore

SETTINGS = {"rank": 4, "alpha": 1.0, "methods": ("lora", "dora"), "ratio": None}
RESULT = {"accuracy": 0.1 + 0.2, "wrong_counts": [1, 2], "times": {"lora": 1.5}}


@pytest.fixture
def store(tmp_path, console):
    return CellStore(tmp_path / "cells", console)


def test_a_cell_comes_back_exactly(store):
    assert store.load(SETTINGS) is None
    store.save(SETTINGS, RESULT)
    assert store.load(dict(reversed(SETTINGS.items()))) == RESULT


@pytest.mark.parametrize(
    "changed",
    [{"rank": 5}, {"alpha": 1.5}, {"methods": ("dora", "lora")}, {"ratio": 2.0}, {"seed": 0}],
)
def test_other_settings_find_nothing_and_overwrite_nothing(store, changed):
    store.save(SETTINGS, RESULT)
    assert store.load({**SETTINGS, **changed}) is None
    store.save({**SETTINGS, **changed}, {"accuracy": 0.5})
    assert store.load(SETTINGS) == RESULT


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"null", b"\xff\xfe"], ids=repr)
def test_a_damaged_file_is_told_and_replaced(store, content, capsys):
    store.save(SETTINGS, RESULT)
    (path,) = store.folder.iterdir()
    path.write_bytes(content)
    assert store.load(SETTINGS) is None
    assert "can't be read" in capsys.readouterr().err
    store.save(SETTINGS, RESULT)
    assert store.load(SETTINGS) == RESULT


def test_a_file_of_other_settings_under_this_name_is_not_taken(store):
    store.save(SETTINGS, RESULT)
    (path,) = store.folder.iterdir()
    path.write_text(path.read_text().replace('"rank": 4', '"rank": 5'))
    assert store.load(SETTINGS) is None


def test_an_interrupted_write_leaves_the_earlier_cell(store, monkeypatch):
    store.save(SETTINGS, RESULT)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.save(SETTINGS, {"accuracy": 0.5})
    assert store.load(SETTINGS) == RESULT
    assert len(list(store.folder.iterdir())) == 1


def test_discarding_forgets_that_cell_alone(store):
    other = {**SETTINGS, "rank": 8}
    store.save(SETTINGS, RESULT)
    store.save(other, RESULT)
    store.discard(SETTINGS)
    store.discard(SETTINGS)
    assert store.load(SETTINGS) is None
    assert store.load(other) == RESULT
