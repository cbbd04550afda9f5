"""The one error that says: what you passed in does not fit, and this is how to fix it."""

import contextlib
from collections.abc import Iterator


class InputError(Exception):
    """An argument, a file or a folder that the caller has to change."""


@contextlib.contextmanager
def as_input_error() -> Iterator[None]:
    """Raises what the library has against an argument, within the block, as an `InputError`."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error
