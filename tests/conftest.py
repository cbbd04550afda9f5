"""What every test runs under: strict dtype promotion, and eight devices on a plain CPU."""

from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_num_cpu_devices", 8)
# Compiling is most of what the suite does. Tests that read the compiled program turn this off.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True, scope="module")
def no_programs_of_other_modules() -> Iterator[None]:
    """Frees the compiled programs of each test module, which would add up to gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def optimised() -> Iterator[None]:
    """Lets a test read costs off the program that a user would run."""
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


@pytest.fixture
def float64() -> Iterator[None]:
    """Lets a test compute its reference in float64, which JAX otherwise truncates to float32."""
    with jax.enable_x64(True):
        yield
