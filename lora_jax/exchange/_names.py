"""Which tensors of a file a reader is asked for."""

from collections.abc import Collection, Iterable
from pathlib import Path

from lora_jax._paths import listed, nearest_paths


def check_names(source: Path, names: Collection[str] | None, held: Iterable[str]) -> list[str]:
    """Returns the names of the tensors to read, in the order of the file.

    Args:
      source: the file or folder, for errors.
      names: the names that are asked for; None for all.
      held: those in the file.

    Raises:
      TypeError: `names` is text.
      ValueError: the file does not hold one of them.
    """
    own = list(held)
    if names is None:
        return own
    if isinstance(names, str):
        raise TypeError(f"`names` is {names!r}; expected several, such as [{names!r}].")
    known = set(own)
    missing = [name for name in names if name not in known]
    if missing:
        near = nearest_paths(missing[0], own)
        raise ValueError(
            f"`names` has {listed(missing)}, which {source} does not hold; the nearest that it "
            f"holds to the first are {listed(near)}."
        )
    return [name for name in own if name in set(names)]
