"""What the battery's ops run under."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def ranks_promoted_as_users_do() -> Iterator[None]:
    """Ops are what users write, who multiply by a vector as it is."""
    with jax.numpy_rank_promotion("allow"):
        yield
