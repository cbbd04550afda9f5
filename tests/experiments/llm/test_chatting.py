"""`llm_lora chat`: lines, and answers that come in pieces."""

import io
import sys

import pytest

from experiments.common.console import Console
from experiments.common.errors import InputError
from experiments.llm.answers import Writer
from experiments.llm.chatting import Answerer, ChatOptions
from experiments.llm_lora import main
from tests.experiments.small_llm_study import ANSWERS


def test_a_conversation_is_answered_line_by_line(llm_out, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello?\nworld?\n\nother?\n"))
    assert main(["chat", "--adapter", str(llm_out / "adapter"), "--max-length", "100"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == ANSWERS["hello"]
    # The second answer comes after the first, which it can see.
    assert second


def test_an_answer_comes_in_pieces(llm_out):
    options = ChatOptions(adapter=llm_out / "adapter", max_length=100)
    answerer = Answerer(Writer.read(options.adapter, None, Console(to_stderr=True)), options)
    pieces = list(answerer.pieces([{"role": "user", "content": "world?"}]))
    assert "".join(pieces) == ANSWERS["world"]
    assert len(pieces) > 1
    long = [{"role": "user", "content": "hello " * 200}]
    with pytest.raises(InputError, match="there is room for 100"):
        list(answerer.pieces(long))
