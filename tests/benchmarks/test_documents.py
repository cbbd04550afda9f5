"""Tables of the documentation are those of the stored results."""

import json

import pytest

from benchmarks import documents
from benchmarks.documents import SHOWN, main, names_in, with_results
from benchmarks.stored import RESULTS, ResultStore

DOCUMENTS = {str(path.relative_to(documents.ROOT)): path for path in documents.documents()}
FILES = {str(path.relative_to(RESULTS).with_suffix("")): path for path in RESULTS.rglob("*.json")}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_shows_what_is_stored(name):
    text = DOCUMENTS[name].read_text()
    assert text == with_results(text), "python -m benchmarks.documents"


@pytest.mark.parametrize("name", FILES)
def test_every_result_is_shown(name):
    shown = [
        each
        for each in SHOWN
        if any(FILES[name] in RESULTS.glob(f"{pattern}.json") for pattern in SHOWN[each].files)
    ]
    in_documents = {each for path in DOCUMENTS.values() for each in names_in(path.read_text())}
    assert in_documents.intersection(shown)


@pytest.mark.parametrize("name", FILES)
def test_a_result_has_the_command_that_wrote_it(name):
    commands = json.loads(FILES[name].read_text())["commands"]
    for command in commands:
        assert command.startswith("python -m ")
        _, is_json, path = command.partition("--json ")
        assert not is_json or path.split()[0] == f"benchmarks/results/{name}.json"


@pytest.fixture
def document(tmp_path, monkeypatch):
    """Returns a document with one region, empty, beside text that is not to be touched."""
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    path = tmp_path / "README.md"
    path.write_text("A\n\n<!-- results: limit_smollm2 -->\nold\n<!-- end of results -->\n\nZ\n")
    return path


def test_the_command_writes_what_is_stored_and_nothing_else(document, capsys):
    assert main([]) == 0
    assert capsys.readouterr().out.split() == ["README.md"]
    text = document.read_text()
    assert text.startswith("A\n\n<!-- results: limit_smollm2 -->\n\n**30 layers, embed 576")
    assert text.endswith("<!-- end of results -->\n\nZ\n")
    assert "| 8 | limit |" in text
    assert "`python -m benchmarks.limit --model smollm2 --json benchmarks/results/" in text
    assert "old" not in text
    assert main(["--check"]) == 0
    assert main([]) == 0
    assert document.read_text() == text


def test_the_command_checks_without_writing(document, capsys):
    text = document.read_text()
    assert main(["--check"]) == 1
    assert "README.md: not what is stored" in capsys.readouterr().err
    assert document.read_text() == text


def test_another_name_is_refused(document, capsys):
    document.write_text(document.read_text().replace("limit_smollm2", "nothing"))
    assert main([]) == 2
    assert "no result nothing is shown; one of compiled_cost" in capsys.readouterr().err


def test_a_region_without_an_end_is_refused(document, capsys):
    text = document.read_text()
    document.write_text(text.replace("<!-- end of results -->\n", "") + text)
    assert main([]) == 2
    assert "lacks its line `<!-- end of results -->`" in capsys.readouterr().err


def test_on_a_float32_base_llama_cpp_writes_what_jax_does():
    found = ResultStore(RESULTS).load("llama_cpp")["agreements"]
    exact = [each for each in found if each["base"] == "float32"]
    assert len(exact) == 2
    for each in exact:
        assert (each["same_texts"], each["same_choices"]) == (each["texts"], each["tokens"])
