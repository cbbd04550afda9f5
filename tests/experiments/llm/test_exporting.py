"""`llm_lora export`: what PEFT, llama.cpp and transformers get."""

import numpy as np

import lora_jax
from experiments.llm_lora import main
from experiments.models.names import huggingface_rules
from experiments.models.pretrained import LanguageModel
from lora_jax.exchange import peft
from tests import tiny_llama
from tests.agreement import assert_agree
from tests.experiments.small_llm_study import assert_same, lines, restored, write_lines
from tests.tiny_tokenizer import TEMPLATE, trained


def test_other_programs_get_the_adapter(llm_arguments, llm_out, tmp_path, error_of):
    model, params, wrapped = restored(llm_arguments, llm_out)
    adapter = ["export", "--adapter", str(llm_out / "adapter")]
    rules = huggingface_rules(model.config)
    assert main([*adapter, "--to", "peft", "--out", str(tmp_path / "peft")]) == 0
    assert_same(peft.load(tmp_path / "peft", params, names=rules), wrapped)
    assert main([*adapter, "--to", "gguf", "--out", str(tmp_path / "adapter.gguf")]) == 0
    tensors = lora_jax.exchange.gguf.load(tmp_path / "adapter.gguf")
    assert len(tensors) == 2 * 7 * tiny_llama.LAYERS
    merged = tmp_path / "merged"
    assert main([*adapter, "--to", "huggingface", "--out", str(merged)]) == 0
    read = LanguageModel.read(merged)
    assert read.config == model.config
    assert_agree(read.params(), lora_jax.merge(wrapped))
    text = "hello <|user|> world"
    np.testing.assert_array_equal(read.tokenizer().encoded(text), model.tokenizer().encoded(text))
    error = error_of(main, [*adapter, "--to", "huggingface", "--out", str(merged)])
    assert "is there already; pass a name that is new" in error


def test_a_model_of_a_gguf_file_becomes_a_folder(tmp_path):
    _, tokens, merges = trained()
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if each.startswith("<|") else 1 for each in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    }
    tiny_llama.write_gguf(tmp_path / "model.gguf", "qwen2", metadata)
    write_lines(tmp_path / "examples.jsonl", lines(12))
    options = ["--model", str(tmp_path / "model.gguf"), "--data", str(tmp_path / "examples.jsonl")]
    short = ["--max-length", "32", "--validation-examples", "4", "--no-plots"]
    assert main([*options, *short, "--out", str(tmp_path / "out")]) == 0
    adapter = ["export", "--adapter", str(tmp_path / "out" / "adapter")]
    merged = tmp_path / "merged"
    assert main([*adapter, "--to", "huggingface", "--out", str(merged)]) == 0
    read, model = LanguageModel.read(merged), LanguageModel.read(tmp_path / "model.gguf")
    assert read.config == model.config
    messages = [{"role": "user", "content": "hello"}]
    np.testing.assert_array_equal(
        read.tokenizer().encoded_conversation(messages),
        model.tokenizer().encoded_conversation(messages),
    )
