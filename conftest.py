"""What tests and examples in documents run under."""

from collections.abc import Iterator

import jax
import jaxtyping
import pytest

import tests.typechecking

# Checks every annotation of the library at run time. It must come before the first import of it.
jaxtyping.install_import_hook("lora_jax", f"{tests.typechecking.__name__}.checked")


@pytest.fixture(autouse=True)
def users_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs documents as a user would: optax's Adam fails under the tests' strict promotion."""
    if request.path.suffix != ".md":
        yield
        return
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
