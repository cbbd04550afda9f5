"""Small networks and data, and a console that keeps quiet."""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
import pytest

from experiments.common.console import Console
from experiments.data import images
from experiments.data.dataset import Split
from experiments.models.mlp import MLP


@pytest.fixture(autouse=True, scope="module")
def promotion_as_users_have_it() -> Iterator[None]:
    """The studies' models add a bias to a batch, and Adam takes floats to an integer power."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


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
