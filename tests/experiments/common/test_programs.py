"""Where compiled programs are kept between runs."""

from pathlib import Path

import jax
import pytest

from experiments.common.programs import keep_programs


@pytest.fixture
def no_folder_chosen():
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.usefixtures("no_folder_chosen")
def test_programs_are_kept_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_programs()
    folder = Path(jax.config.jax_compilation_cache_dir)
    assert folder == tmp_path / "lora_jax" / "programs"
    assert folder.is_dir()


@pytest.mark.usefixtures("no_folder_chosen")
def test_a_folder_that_was_chosen_stays(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    keep_programs()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)


@pytest.mark.usefixtures("no_folder_chosen")
def test_without_a_place_to_write_to_nothing_is_kept(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_programs()
    assert jax.config.jax_compilation_cache_dir is None
