"""The pretrained network on disk is reused where it fits, and only there."""

import jax
import numpy as np
import pytest

from experiments.base_checkpoint import BaseCheckpoint
from experiments.training import Trained

SETTINGS = {"seed": 0, "learning_rate": 1e-3, "hidden": [16, 12]}


@pytest.fixture
def trained(small_network, small_split):
    params = small_network.init(jax.random.key(0), small_split.inputs[:1])["params"]
    return Trained(params, np.arange(4, dtype=np.float32))


def test_the_same_settings_bring_it_back_exactly(trained, tmp_path, console):
    BaseCheckpoint(tmp_path / "base", SETTINGS).save(trained)
    loaded = BaseCheckpoint(tmp_path / "base", dict(SETTINGS)).load(console)
    assert loaded is not None
    assert loaded.losses.tolist() == [0, 1, 2, 3]
    same = jax.tree.map(np.array_equal, loaded.params, trained.params)
    assert all(jax.tree.leaves(same))


def test_other_settings_and_no_folder_bring_nothing(trained, tmp_path, console):
    assert BaseCheckpoint(tmp_path / "base", SETTINGS).load(console) is None
    BaseCheckpoint(tmp_path / "base", SETTINGS).save(trained)
    assert BaseCheckpoint(tmp_path / "base", {**SETTINGS, "seed": 1}).load(console) is None


def test_a_damaged_one_is_told_and_replaced(trained, tmp_path, console, capsys):
    checkpoint = BaseCheckpoint(tmp_path / "base", SETTINGS)
    checkpoint.save(trained)
    for path in (tmp_path / "base" / "settings").iterdir():
        path.write_bytes(b"")
    assert checkpoint.load(console) is None
    assert "can't be read" in capsys.readouterr().err
    checkpoint.save(trained)
    assert checkpoint.load(console) is not None
