"""The one error that says: what you passed in does not fit, and this is how to mend it."""


class InputError(Exception):
    """An argument, a file or a folder that the caller has to change."""
