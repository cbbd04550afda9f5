"""A few rows of a product in which each pair of values occurs that occurs in any row."""

import itertools
import random
from collections.abc import Callable, Container, Hashable, Sequence

Values = tuple[Hashable, ...]
Pair = tuple[int, Hashable, int, Hashable]

# Of so many rows the best is taken.
_DRAWS = 64


def covering_array(
    factors: Sequence[Sequence[Hashable]],
    is_valid: Callable[[Values], bool],
    *,
    prefers: Callable[[Values], bool] = lambda values: False,
    seed: int = 0,
) -> list[Values]:
    """Returns valid rows, one value of each factor, that hold every pair that valid rows hold.

    Greedy: each pair that is missing is completed at random several times, and the row that brings
    most other missing pairs is taken; of several such rows one that `prefers` says yes to. The same
    arguments give the same rows.
    """
    generator = random.Random(seed)
    # A row has one pair of the two longest factors: their pairs need most rows, and come first.
    chosen_two = sorted(
        itertools.combinations(range(len(factors)), 2),
        key=lambda two: -len(factors[two[0]]) * len(factors[two[1]]),
    )
    missing = dict.fromkeys(
        (i, first, j, second)
        for i, j in chosen_two
        for first, second in itertools.product(factors[i], factors[j])
    )
    chosen: list[Values] = []
    while missing:
        pair = next(iter(missing))
        found = _completions(pair, factors, is_valid, generator)
        if not found:
            del missing[pair]
            continue
        best = max(found, key=lambda row: (_count(row, missing), prefers(row)))
        chosen.append(best)
        for covered in _pairs(best):
            missing.pop(covered, None)
    return chosen


def _completions(
    pair: Pair,
    factors: Sequence[Sequence[Hashable]],
    is_valid: Callable[[Values], bool],
    generator: random.Random,
) -> list[Values]:
    """Returns valid rows with a pair, drawn at random; none only where there is none."""
    i, first, j, second = pair
    choices = [list(factor) for factor in factors]
    choices[i], choices[j] = [first], [second]
    drawn = (tuple(map(generator.choice, choices)) for _ in range(_DRAWS))
    found = [row for row in drawn if is_valid(row)]
    return found or list(itertools.islice(filter(is_valid, itertools.product(*choices)), 1))


def _count(row: Values, missing: Container[Pair]) -> int:
    return sum(pair in missing for pair in _pairs(row))


def _pairs(row: Values) -> list[Pair]:
    numbered = list(enumerate(row))
    return [(*first, *second) for first, second in itertools.combinations(numbered, 2)]
