"""The generator of rows, on factors that are small enough to check by hand."""

import itertools

from tests.battery.covering import covering_array

FACTORS = ("abcd", "pqr", "xyz", "01")


def pairs_of(rows):
    return {
        (i, row[i], j, row[j])
        for row in rows
        for i, j in itertools.combinations(range(len(row)), 2)
    }


def test_every_pair_occurs_in_few_rows():
    rows = covering_array(FACTORS, lambda row: True)
    assert pairs_of(rows) == pairs_of(itertools.product(*FACTORS))
    assert len(rows) <= 16 < len(list(itertools.product(*FACTORS)))


def test_every_pair_that_is_possible_occurs_and_no_row_is_impossible():
    def is_valid(row):
        return not (row[0] == "a" and row[1] == "p") and not (row[1] == "q" and row[3] == "1")

    rows = covering_array(FACTORS, is_valid)
    assert all(map(is_valid, rows))
    assert pairs_of(rows) == pairs_of(filter(is_valid, itertools.product(*FACTORS)))


def test_the_same_seed_gives_the_same_rows():
    first, second = (covering_array(FACTORS, lambda row: True, seed=3) for _ in range(2))
    assert first == second
