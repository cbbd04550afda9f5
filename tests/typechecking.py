"""How annotations of the library are checked while tests run."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jaxtyping
import optax
from beartype import BeartypeConf, FrozenDict, beartype

# As PEP 484 has it, an int is a float. Optax's trees refer to themselves by a name that is found in
# their own module alone.
_checked = beartype(
    conf=BeartypeConf(is_pep484_tower=True, hint_overrides=FrozenDict({optax.OptState: Any}))
)


def checked(function: Any) -> Any:
    """Returns a function that checks its annotations, unless it is one within another.

    That is made anew in each call, and writing its checks would take longer than the call.
    """
    return function if "<locals>" in function.__qualname__ else _checked(function)


@contextlib.contextmanager
def annotations_unchecked() -> Iterator[None]:
    """Calls the library as users do: checks take about as long as tracing."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
