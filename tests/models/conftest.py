"""What models that others wrote run under."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def ranks_promoted_as_users_do() -> Iterator[None]:
    """Most of them add a bias to a batch as it is."""
    with jax.numpy_rank_promotion("allow"):
        yield
