"""Which cases of each test run where not all of them do."""

import pytest

from tests.conftest import drawn

CASES = [f"test_a.py::test_grid[{number}]" for number in range(10)]
NAMES = [*CASES, "test_a.py::test_alone", "test_b.py::test_grid[only]"]


@pytest.mark.parametrize(("share", "count"), [(0.05, 3), (0.2, 4), (0.5, 7), (1.0, 12)])
def test_a_share_of_each_test_is_kept_and_one_case_at_least(share, count):
    kept = drawn(NAMES, share, "")
    assert len(kept) == count


def test_draws_repeat_and_give_every_case_its_turn():
    assert drawn(NAMES, 0.5, "a") == drawn(NAMES[::-1], 0.5, "a")
    draws = [drawn(NAMES, 0.5, str(number)) for number in range(20)]
    assert set().union(*draws) == set(NAMES)
    assert len(set(map(frozenset, draws))) > 10
