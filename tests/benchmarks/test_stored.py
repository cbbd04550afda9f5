"""Tables of the documentation are those of the stored results."""

import json
from pathlib import Path

import pytest

from benchmarks import limit, llama_cpp
from benchmarks.peers import llm_report
from benchmarks.scale import report
from benchmarks.stored import RESULTS, ResultStore

ROOT = Path(__file__).parents[2]
# The name of a result, the document, and what makes tables of it.
SHOWN = {
    "limit_smollm2": ("benchmarks/README.md", lambda found: [limit.table(found)]),
    "llama_cpp": ("docs/exchange.md", lambda found: [llama_cpp.table(found)]),
    "peft_llm": ("benchmarks/README.md", llm_report.tables),
}


@pytest.mark.parametrize("name", SHOWN)
def test_a_stored_result_is_shown_with_its_command(name):
    document, tables = SHOWN[name]
    found = ResultStore(RESULTS).load(name)
    text = (ROOT / document).read_text()
    for table in tables(found):
        assert table.as_markdown() in text
    (command,) = found["commands"]
    assert f"--json benchmarks/results/{name}.json" in command
    assert f"`benchmarks/results/{name}.json`" in text


def test_plans_are_shown_with_their_command():
    text = (ROOT / "docs/shard.md").read_text()
    path = RESULTS / "scale" / "h100.json"
    for table in report.tables(report.read_rows(path)):
        assert table.as_markdown() in text
    (command,) = json.loads(path.read_text())["commands"]
    assert "--machine h100" in command
    assert "`benchmarks/results/scale/h100.json`" in text


def test_on_a_float32_base_llama_cpp_writes_what_jax_does():
    found = ResultStore(RESULTS).load("llama_cpp")["agreements"]
    exact = [each for each in found if each["base"] == "float32"]
    assert len(exact) == 2
    for each in exact:
        assert (each["same_texts"], each["same_choices"]) == (each["texts"], each["tokens"])
