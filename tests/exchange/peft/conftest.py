"""Where PEFT is not installed, what imports it is left alone, also by the search for examples."""

import importlib.util
from collections.abc import Iterator

import jax
import pytest

from tests.exchange.peft.files import TENSORS, write_adapter

collect_ignore = [] if importlib.util.find_spec("peft") else ["make_adapters.py", "torch_models.py"]


@pytest.fixture(autouse=True, scope="module")
def ranks_promoted_as_users_do() -> Iterator[None]:
    """The models are those of PyTorch, where a bias is added to a batch as it is."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def adapter(tmp_path):
    return write_adapter(tmp_path / "adapter", TENSORS)
