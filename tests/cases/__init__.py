"""The functions that the law battery runs: one row for each way in which a weight can be used."""

from tests.cases import control, products, structure  # noqa: F401  each adds its rows
from tests.cases.case import CASES as CASES
from tests.cases.case import Case as Case
