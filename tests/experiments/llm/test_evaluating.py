"""`llm_lora evaluate`: answers beside those of people, and what is refused."""

import json

import pytest

from experiments.llm_lora import main
from tests.experiments.small_llm_study import lines, model_in, write_lines


def test_answers_are_compared_with_those_of_people(llm_arguments, llm_out, tmp_path, capsys):
    pytest.importorskip("rouge_score")
    test = write_lines(tmp_path / "test.jsonl", lines(10, seed=5))
    options = ["evaluate", "--data", str(test), "--new-tokens", "8", "--batch-size", "4", "--json"]
    options += ["--out", str(tmp_path / "out"), "--limit", "9"]
    assert main([*options, "--model", str(model_in(llm_arguments).path)]) == 0
    alone = json.loads(capsys.readouterr().out)["rouge"]
    assert main([*options, "--adapter", str(llm_out / "adapter"), "--base"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert (results["answers"], results["references"]) == (9, 9)
    both = results["rouge"]
    assert both["the model"] == alone["the model"]
    assert both["the model"]["rouge1"]["mean"] < 0.5
    assert both["with its adapter"]["rouge1"] == {"mean": 1, "low": 1, "high": 1}
    assert 1 <= results["perplexity"]["with its adapter"] < 1.5 < results["perplexity"]["the model"]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["rouge"] == both
    answers = (tmp_path / "out" / "answers.md").read_text()
    assert answers.count("**the model:**") == answers.count("## ") == 9
    assert "**with its adapter:** the world\n\n**People:**\n\n- the world\n" in answers


def test_summaries_are_compared_with_all_references(llm_out, tmp_path, monkeypatch, capsys):
    pytest.importorskip("rouge_score")
    entry = {"dialogue": "hello", "summary1": "a", "summary2": "b", "summary3": "c"}
    (tmp_path / "dialogsum.test.jsonl").write_text(json.dumps(entry))
    monkeypatch.setenv("DIALOGSUM_DIR", str(tmp_path))
    adapter = ["--adapter", str(llm_out / "adapter"), "--out", str(tmp_path / "out"), "--json"]
    assert main(["evaluate", "--data", "dialogsum", "--new-tokens", "4", *adapter]) == 0
    assert json.loads(capsys.readouterr().out)["references"] == 3


def test_what_evaluating_refuses(llm_out, tmp_path, error_of):
    plain = tmp_path / "plain.jsonl"
    plain.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    adapter = ["evaluate", "--adapter", str(llm_out / "adapter"), "--out", str(tmp_path)]
    assert "line 1 has a `prompt`" in error_of(main, [*adapter, "--data", str(plain)])
    assert "can't be read" in error_of(main, [*adapter, "--data", str(tmp_path / "no.jsonl")])
    base = ["evaluate", "--data", "dialogsum", "--base", "--out", str(tmp_path)]
    assert "pass --adapter DIR with it" in error_of(main, base)
