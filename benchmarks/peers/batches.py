"""Batches in a file that every contender reads: the same data, in the same order."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Batch = Mapping[str, NDArray[np.generic]]


def write_batches(path: Path, batches: Sequence[Batch]) -> None:
    """Writes batches, whose shapes may differ, as one npz file."""
    np.savez(
        path,
        **{
            f"{number}/{name}": array
            for number, batch in enumerate(batches)
            for name, array in batch.items()
        },
    )


def read_batches(path: Path) -> list[dict[str, NDArray[np.generic]]]:
    """Returns the batches of a file, in their order."""
    found: dict[int, dict[str, NDArray[np.generic]]] = {}
    with np.load(path) as stored:
        for key in stored.files:
            number, name = key.split("/")
            found.setdefault(int(number), {})[name] = stored[key]
    return [found[number] for number in sorted(found)]
