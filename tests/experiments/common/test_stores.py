"""Cells and pretrained networks come back for exactly their settings, whole or not at all."""

from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.common.stores import BaseCheckpoint, CellStore
from experiments.common.training import Trained

SETTINGS = {"rank": 4, "alpha": 1.0, "methods": ("lora", "dora"), "ratio": None}
BASE_SETTINGS = {"seed": 0, "learning_rate": 1e-3, "hidden": [16, 12]}
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


@pytest.fixture
def trained(small_network, small_split):
    params = small_network.init(jax.random.key(0), small_split.inputs[:1])["params"]
    return Trained(params, np.arange(4, dtype=np.float32))


def test_a_network_comes_back_exactly_for_the_same_settings(trained, tmp_path, console):
    BaseCheckpoint(tmp_path / "base", BASE_SETTINGS).save(trained)
    loaded = BaseCheckpoint(tmp_path / "base", dict(BASE_SETTINGS)).load(console)
    assert loaded is not None
    assert loaded.losses.tolist() == [0, 1, 2, 3]
    same = jax.tree.map(np.array_equal, loaded.params, trained.params)
    assert all(jax.tree.leaves(same))


def test_other_settings_and_no_folder_give_no_network(trained, tmp_path, console):
    assert BaseCheckpoint(tmp_path / "base", BASE_SETTINGS).load(console) is None
    BaseCheckpoint(tmp_path / "base", BASE_SETTINGS).save(trained)
    assert BaseCheckpoint(tmp_path / "base", {**BASE_SETTINGS, "seed": 1}).load(console) is None


def test_a_damaged_network_is_reported_and_replaced(trained, tmp_path, console, capsys):
    checkpoint = BaseCheckpoint(tmp_path / "base", BASE_SETTINGS)
    checkpoint.save(trained)
    for path in (tmp_path / "base" / "settings").iterdir():
        path.write_bytes(b"")
    assert checkpoint.load(console) is None
    assert "can't be read" in capsys.readouterr().err
    checkpoint.save(trained)
    assert checkpoint.load(console) is not None
