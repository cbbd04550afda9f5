"""Small networks and data, and a console that keeps quiet."""

import contextlib
import functools
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.common.console import Console
from experiments.data import images
from experiments.data.dataset import Split
from experiments.models.mlp import MLP


@contextlib.contextmanager
def promotion_of_users() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(autouse=True, scope="module")
def promotion_as_users_have_it() -> Iterator[None]:
    """The studies' models add a bias to a batch, and Adam takes floats to an integer power."""
    with promotion_of_users():
        yield


@pytest.fixture(autouse=True, scope="session")
def interrupts_that_arrive() -> Iterator[None]:
    """Lets Ctrl-C raise, also where the tests are a job in the background, which ignores it."""
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, earlier)


@pytest.fixture(autouse=True, scope="session")
def digits_once() -> Iterator[None]:
    """Makes the images of digits once, of which every run of a study reads all."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(images, "digits", functools.cache(images.digits))
        yield


@pytest.fixture
def console() -> Console:
    return Console(to_stderr=True)


@pytest.fixture
def small_network() -> MLP:
    return MLP(hidden=(16, 12), classes=3)


@pytest.fixture
def small_split() -> Split:
    """Sixty rows whose largest of the first three numbers is their class."""
    inputs = np.random.default_rng(0).standard_normal((60, 5), np.float32)
    return Split(inputs, inputs[:, :3].argmax(axis=1).astype(np.int32))


@pytest.fixture
def error_of(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Returns a function that runs a command with wrong arguments, and returns its error."""

    def error_of(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> str:
        capsys.readouterr()
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error

    return error_of


@pytest.fixture(scope="session")
def llm_arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Returns the arguments of a small study on a language model."""
    for module in ("safetensors", "tokenizers", "jinja2", "gguf"):
        pytest.importorskip(module)
    from tests.experiments.small_llm_study import write_study

    with promotion_of_users():
        return write_study(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="session")
def llm_out(llm_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder that such a study has left."""
    from experiments.llm_lora import main

    folder = tmp_path_factory.mktemp("llm-run")
    with promotion_of_users():
        assert main([*llm_arguments, "--out", str(folder)]) == 0
    return folder
