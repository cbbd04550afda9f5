"""How annotations of the library are checked while tests run."""

import contextlib
from collections.abc import Iterator

import jaxtyping
from beartype import BeartypeConf, beartype

# As PEP 484 has it, an int is a float.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


@contextlib.contextmanager
def annotations_unchecked() -> Iterator[None]:
    """Calls the library as users do: checks take about as long as tracing."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
