"""DialogSum's files: their dialogues and summaries, and what is missing or damaged."""

import json

import pytest

from experiments.common.errors import InputError
from experiments.llm import dialogsum
from experiments.llm.dialogsum import dialogues


def written(tmp_path, monkeypatch, *entries, name="dialogsum.test.jsonl"):
    (tmp_path / name).write_text("\n".join(map(json.dumps, entries)))
    monkeypatch.setenv("DIALOGSUM_DIR", str(tmp_path))


def test_dialogues_and_all_of_their_summaries(tmp_path, monkeypatch):
    written(
        tmp_path,
        monkeypatch,
        {"dialogue": "A: hi", "summary": "They meet."},
        {"dialogue": "A: bye", "summary1": "a", "summary2": "b", "summary3": "c"},
    )
    first, second = dialogues("test")
    assert (first.text, first.summaries) == ("A: hi", ("They meet.",))
    assert second.summaries == ("a", "b", "c")
    question, answer = first.example.messages
    assert question["content"].endswith("A: hi")
    assert answer == {"role": "assistant", "content": "They meet."}


def test_the_file_of_the_authors_is_downloaded_once(tmp_path, monkeypatch):
    monkeypatch.delenv("DIALOGSUM_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    published = tmp_path / "published"
    published.mkdir()
    file = published / "dialogsum.dev.jsonl"
    file.write_text(json.dumps({"dialogue": "A: hi", "summary": "They meet."}))
    monkeypatch.setattr(dialogsum, "_ADDRESS", published.as_uri())
    (found,) = dialogues("dev")
    assert found.text == "A: hi"
    file.unlink()
    assert dialogues("dev")[0].text == "A: hi"
    with pytest.raises(InputError, match="dialogsum.test.jsonl can't be downloaded .*; set DIALOG"):
        dialogues("test")


def test_what_is_missing(tmp_path, monkeypatch):
    written(tmp_path, monkeypatch, {"dialogue": "A: hi"})
    with pytest.raises(InputError, match="line 1 has the keys dialogue; expected"):
        dialogues("test")
    with pytest.raises(InputError, match=r"has neither dialogsum.dev.jsonl nor"):
        dialogues("dev")
