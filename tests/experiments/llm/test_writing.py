"""`llm_lora generate`: what an adapter has learned, several of them, and what is refused."""

import io
import json
import sys

from experiments.llm_lora import main
from tests.experiments.small_llm_study import ANSWERS, model_in, write_model


def test_it_writes_what_it_has_learned(llm_out, capsys):
    adapter = ["generate", "--adapter", str(llm_out / "adapter"), "--new-tokens", "8"]
    prompts = [word for each in ANSWERS for word in ("--prompt", f"{each}?")]
    assert main([*adapter, *prompts]) == 0
    assert capsys.readouterr().out.splitlines() == list(ANSWERS.values())


def test_it_reads_standard_input_and_prints_json(llm_arguments, llm_out, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello?\n\nworld?\n"))
    drawn = ["--temperature", "0.01", "--top-p", "0.9", "--json", "--new-tokens", "8"]
    assert main(["generate", "--adapter", str(llm_out / "adapter"), *drawn]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["prompt"] for each in found] == ["hello?", "world?"]
    assert [each["answer"] for each in found] == [ANSWERS["hello"], ANSWERS["world"]]
    plain = ["--plain", "--prompt", "the", "--new-tokens", "3"]
    assert main(["generate", "--model", str(model_in(llm_arguments).path), *plain]) == 0
    assert capsys.readouterr().out.count("\n") == 1


def test_several_adapters_answer_in_one_batch(llm_arguments, llm_out, tmp_path, capsys):
    other = tmp_path / "other"
    short = ["--epochs", "1", "--rank", "2", "--no-plots", "--out", str(other)]
    assert main([*llm_arguments, *short]) == 0
    adapters = [str(llm_out / "adapter"), str(other / "adapter")]
    prompts = ["--prompt", "hello?", "--prompt", "world?", "--new-tokens", "8", "--json"]

    def answers(*chosen):
        capsys.readouterr()
        assert main(["generate", "--adapter", *chosen, *prompts]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    both = answers(*adapters)
    assert [each["adapter"] for each in both] == adapters * 2
    for place, adapter in enumerate(adapters):
        assert both[place::2] == answers(adapter)


def test_what_writing_refuses(llm_arguments, llm_out, tmp_path, error_of):
    assert "is not the folder of an adapter" in error_of(
        main, ["generate", "--adapter", str(tmp_path), "--prompt", "a"]
    )
    adapter = ["generate", "--adapter", str(llm_out / "adapter"), "--prompt", "a"]
    assert "more than the 128" in error_of(main, [*adapter, "--new-tokens", "128"])
    other = tmp_path / "other"
    write_model(other, seed=1)
    assert "base" in error_of(main, [*adapter, "--model", str(other)])
