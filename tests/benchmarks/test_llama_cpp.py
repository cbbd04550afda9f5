"""What llama.cpp has made of an adapter, as it is stored and as the documentation shows it."""

from pathlib import Path

from benchmarks.llama_cpp import Agreement, _cells
from benchmarks.stored import RESULTS, ResultStore

DOCS = Path(__file__).parents[2] / "docs"


def test_the_table_of_the_documentation_is_that_of_the_stored_result():
    stored = ResultStore(RESULTS).load("llama_cpp")
    found = [Agreement(**each) for each in stored["agreements"]]
    assert len(found) == 4
    text = (DOCS / "exchange.md").read_text()
    for each in found:
        assert f"| {' | '.join(_cells(each))} |" in text
    for each in found[:2]:
        assert each.base == "float32"
        assert (each.same_texts, each.same_choices) == (each.texts, each.tokens)
