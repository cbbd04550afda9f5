"""Soft prompts in PEFT's files: both ways, beside PEFT itself, and what is refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.checkpoint import CheckpointError
from lora_jax.exchange import peft

pytest.importorskip("safetensors")

PROMPT = np.random.default_rng(0).standard_normal((5, 12)).astype(np.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_prompt_comes_back_to_the_bit(tmp_path, dtype):
    prompt = jnp.asarray(PROMPT, dtype)
    peft.save_prompt(tmp_path / "prompt", prompt, config={"task_type": "CAUSAL_LM"})
    found = peft.load_prompt(tmp_path / "prompt")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, prompt)
    config = json.loads((tmp_path / "prompt" / "adapter_config.json").read_text())
    assert (config["num_virtual_tokens"], config["token_dim"]) == (5, 12)
    assert config["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_peft_writes_what_is_read(tmp_path, task_type):
    theirs, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    sizes = {"vocab_size": 20, "num_layers": 1, "num_heads": 2}
    model = (
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=20,
                hidden_size=12,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
            )
        )
        if task_type == "CAUSAL_LM"
        else transformers.T5ForConditionalGeneration(
            transformers.T5Config(**sizes, d_model=12, d_kv=6, d_ff=16, decoder_start_token_id=0)
        )
    )
    config = theirs.PromptTuningConfig(task_type=task_type, num_virtual_tokens=5)
    prompted = theirs.get_peft_model(model, config)
    prompted.save_pretrained(tmp_path / "theirs")
    expected = prompted.get_prompt_embedding_to_save("default")[:5].numpy()
    np.testing.assert_array_equal(peft.load_prompt(tmp_path / "theirs"), expected)
    # And the other way round.
    peft.save_prompt(tmp_path / "ours", jnp.asarray(PROMPT), config={"task_type": task_type})
    loaded = theirs.PeftModel.from_pretrained(prompted.get_base_model(), tmp_path / "ours")
    found = loaded.get_prompt_embedding_to_save("default").numpy()
    np.testing.assert_array_equal(found, PROMPT)


def written(folder, tensors, **config):
    from safetensors.numpy import save_file

    folder.mkdir()
    entries = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5, **config}
    (folder / "adapter_config.json").write_text(json.dumps(entries))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({"prompt_embeddings": PROMPT}, {"peft_type": "LORA"}, "An adapter is read by `load`"),
        ({"prompt_embeddings": PROMPT}, {"peft_type": "IA3"}, "has `peft_type` 'IA3'; expected"),
        ({"other": PROMPT}, {}, "holds other; expected 'prompt_embeddings' alone"),
        ({"prompt_embeddings": PROMPT, "b": PROMPT}, {}, "holds b, prompt_embeddings; expected"),
        ({"prompt_embeddings": PROMPT}, {"num_virtual_tokens": 4}, "num_virtual_tokens 4"),
        ({"prompt_embeddings": PROMPT}, {"num_virtual_tokens": None}, "num_virtual_tokens None"),
        ({"prompt_embeddings": PROMPT[0]}, {}, r"of shape \(12,\); expected"),
        ({"prompt_embeddings": PROMPT * np.nan}, {}, "not finite"),
    ],
)
def test_folders_that_hold_something_else(tmp_path, tensors, config, message):
    with pytest.raises(CheckpointError, match=message):
        peft.load_prompt(written(tmp_path / "folder", tensors, **config))


def test_vectors_for_a_decoder_are_left_out(tmp_path):
    """PEFT's default for an encoder-decoder, which does not use them."""
    both = np.concatenate([PROMPT, PROMPT + 1])
    folder = written(tmp_path / "folder", {"prompt_embeddings": both})
    np.testing.assert_array_equal(peft.load_prompt(folder), PROMPT)


@pytest.mark.wrong_types
def test_what_can_not_be_read_or_written(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        peft.load_prompt(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"has the shape \(12,\); expected \(tokens, width\)"):
        peft.save_prompt(tmp_path / "one", jnp.asarray(PROMPT[0]))
    with pytest.raises(CheckpointError, match="not finite"):
        peft.save_prompt(tmp_path / "one", jnp.asarray(PROMPT) * np.inf)
    peft.save_prompt(tmp_path / "one", jnp.asarray(PROMPT))
    with pytest.raises(CheckpointError, match="overwrite"):
        peft.save_prompt(tmp_path / "one", jnp.asarray(PROMPT))
    peft.save_prompt(tmp_path / "one", jnp.asarray(PROMPT) + 1, overwrite=True)
    np.testing.assert_array_equal(peft.load_prompt(tmp_path / "one"), PROMPT + 1)
    with pytest.raises(CheckpointError, match="A soft prompt is read by `load_prompt`"):
        peft.read_config(tmp_path / "one")
