"""A few rows of a product in which each pair of values occurs that occurs in any row."""

import itertools
import random
from collections.abc import Callable, Hashable, Sequence

Values = tuple[Hashable, ...]


def covering_array(
    factors: Sequence[Sequence[Hashable]], is_valid: Callable[[Values], bool], *, seed: int = 0
) -> list[Values]:
    """Returns valid rows, one value of each factor, that hold every pair that valid rows hold.

    Greedy: each pair that is missing is completed to the row that brings most other missing pairs.
    The same arguments give the same rows.
    """
    valid = [row for row in itertools.product(*factors) if is_valid(row)]
    random.Random(seed).shuffle(valid)
    rows_with: dict[tuple[int, Hashable, int, Hashable], list[Values]] = {}
    for row in valid:
        for pair in _pairs(row):
            rows_with.setdefault(pair, []).append(row)
    missing = dict.fromkeys(sorted(rows_with, key=lambda pair: len(rows_with[pair])))
    chosen: list[Values] = []
    while missing:
        pair = next(iter(missing))
        best = max(rows_with[pair], key=lambda row: sum(p in missing for p in _pairs(row)))
        chosen.append(best)
        for covered in _pairs(best):
            missing.pop(covered, None)
    return chosen


def _pairs(row: Values) -> list[tuple[int, Hashable, int, Hashable]]:
    numbered = list(enumerate(row))
    return [(*first, *second) for first, second in itertools.combinations(numbered, 2)]
