"""Unmodified models of Tunix, by the lines in docs/exchange.md: `make test-tunix`."""

import dataclasses
import importlib.util
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lora_jax
from lora_jax.exchange import place
from lora_jax.exchange.peft import load, preview, ready_rules, save
from tests.agreement import assert_agree
from tests.trained import as_if_trained

if importlib.util.find_spec("tunix") is None:
    pytest.skip("Tunix is not installed", allow_module_level=True)

# What Tunix and the packages that it imports warn of is looked at by those who write them.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from tunix.models.gemma import model as gemma
    from tunix.models.gemma3 import model as gemma3
    from tunix.models.llama3 import model as llama3
    from tunix.models.qwen2 import model as qwen2
    from tunix.models.qwen3 import model as qwen3

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::lora_jax.MaterializationWarning"),
]

PAGE = Path(__file__).parents[3] / "docs" / "exchange.md"
VOCABULARY, WIDTH, HIDDEN, HEADS, KEY_HEADS, HEAD_WIDTH, LAYERS, EXPERTS = 19, 8, 12, 4, 2, 4, 2, 3
# Tunix's Llama and Qwen 3 turn by this base, whatever their config has.
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000}}
SIZES = {
    "num_layers": LAYERS,
    "embed_dim": WIDTH,
    "hidden_dim": HIDDEN,
    "num_heads": HEADS,
    "head_dim": HEAD_WIDTH,
    "num_kv_heads": KEY_HEADS,
}
TABLE = {"vocab_size": VOCABULARY, "rope_theta": 1_000_000, "norm_eps": 1e-6}
GEMMA_SIZES = {**SIZES, "num_embed": VOCABULARY}
WINDOW = {"sliding_window_size": 4}
HUGGINGFACE_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "head_dim": HEAD_WIDTH,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}


@dataclasses.dataclass(frozen=True)
class Model:
    """A small model of Tunix's, and what Hugging Face's config has for its twin.

    Attributes:
      make: returns the module.
      model_type: the architecture.
      config: what its config has besides the sizes.
    """

    make: Callable[[], nnx.Module]
    model_type: str
    config: dict[str, Any]


def of_llama(**options):
    return lambda: llama3.Llama3(llama3.ModelConfig(**SIZES, **TABLE, **options), rngs=nnx.Rngs(0))


def of_qwen2(**options):
    return lambda: qwen2.Qwen2(qwen2.ModelConfig(**SIZES, **TABLE, **options), rngs=nnx.Rngs(0))


def of_qwen3(**options):
    return lambda: qwen3.Qwen3(qwen3.ModelConfig(**SIZES, **TABLE, **options), rngs=nnx.Rngs(0))


def of_gemma(config, **options):
    sizes = {**GEMMA_SIZES, **options}
    return lambda: gemma.Gemma(dataclasses.replace(config(), **sizes), rngs=nnx.Rngs(0))


def of_gemma3(**options):
    sizes = {**GEMMA_SIZES, **WINDOW, **options}
    config = gemma3.ModelConfig(**sizes, param_dtype=jnp.float32)
    return lambda: gemma3.Gemma3(config, rngs=nnx.Rngs(0))


UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
MIXTURE = {"num_experts": EXPERTS, "num_experts_per_tok": 2}
SLIDING = {**TIED, "sliding_window": 4, "query_pre_attn_scalar": HEAD_WIDTH}
MODELS = {
    "llama": Model(of_llama(weight_tying=False), "llama", {**UNTIED, **ROPE}),
    "llama, tied": Model(of_llama(weight_tying=True), "llama", {**TIED, **ROPE}),
    "qwen2": Model(of_qwen2(), "qwen2", {**UNTIED, **ROPE}),
    "qwen3": Model(of_qwen3(use_tied_embedding=True), "qwen3", {**TIED, **ROPE}),
    "qwen3_moe": Model(
        of_qwen3(**MIXTURE),
        "qwen3_moe",
        {**UNTIED, **ROPE, **MIXTURE, "moe_intermediate_size": HIDDEN, "norm_topk_prob": True},
    ),
    "gemma": Model(of_gemma(gemma.ModelConfig.gemma_2b), "gemma", TIED),
    "gemma2": Model(of_gemma(gemma.ModelConfig.gemma2_2b, **WINDOW), "gemma2", SLIDING),
    "gemma3": Model(of_gemma3(), "gemma3_text", SLIDING),
    "gemma3, one leaf": Model(
        of_gemma3(num_kv_heads=HEADS), "gemma3_text", {**SLIDING, "num_key_value_heads": HEADS}
    ),
}
LENGTH = 5
TOKENS = np.arange(2 * LENGTH).reshape(2, LENGTH) % VOCABULARY
POSITIONS = jnp.broadcast_to(jnp.arange(LENGTH), TOKENS.shape)
MASK = jnp.tril(jnp.ones((2, LENGTH, LENGTH), bool))


@pytest.fixture(autouse=True)
def dtypes_promoted_as_users_do():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


def rules(model):
    return ready_rules(model.model_type, "tunix", tied=model.config["tie_word_embeddings"])


def logits(model, tokens=TOKENS):
    return model(tokens, POSITIONS, None, MASK)[0]


def adapted(graphdef):
    """Returns the logits as a function of a wrapped tree; building W + AB is an error."""
    return lora_jax.adapt(
        lambda params: logits(nnx.merge(graphdef, params)), on_materialize="error"
    )


def loss_of(model, batch):
    """Returns the mean cross-entropy of each next token."""
    shares = jax.nn.log_softmax(logits(model, batch))
    return -jnp.take_along_axis(shares[:, :-1], batch[:, 1:, None], axis=-1).mean()


def lines_of_the_page():
    section = PAGE.read_text(encoding="utf-8").partition("## An unmodified Tunix model")[2]
    found = re.search("```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_page_has_ten_lines():
    _, lines = lines_of_the_page().strip().split("\n\n")
    assert len(lines.splitlines()) == 10


def test_the_lines_of_the_page(model, tmp_path):
    made = {
        "model": model.make(),
        "config": {"model_type": model.model_type, **model.config},
        "batches": [TOKENS, TOKENS],
        "loss_of": loss_of,
        "tx": lora_jax.optimizer(optax.adam(1e-2)),
        "folder": tmp_path / "adapter",
    }
    before = float(loss_of(made["model"], TOKENS))
    exec(compile(lines_of_the_page(), PAGE, "exec"), made)
    wrapped = made["wrapped"]
    assert float(made["loss"](wrapped, TOKENS)) < before
    loaded = load(made["folder"], made["params"], names=made["names"])
    jax.tree.map(np.testing.assert_array_equal, loaded, wrapped)
    apply = adapted(made["graphdef"])
    np.testing.assert_array_equal(apply(loaded), apply(wrapped))
    assert_agree(apply(wrapped), logits(nnx.merge(made["graphdef"], lora_jax.merge(wrapped))))


def test_every_leaf_has_a_rule(model):
    params = nnx.state(model.make(), nnx.Param)
    found = preview(params, names=rules(model))
    assert (found.problems, found.without_rule) == ((), ())
    assert len(found.rows) == len(jax.tree.leaves(params))


def test_logits_are_those_of_peft(model, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    from safetensors.numpy import load_file

    def their_logits(module):
        with torch.no_grad():
            return module.eval()(torch.tensor(TOKENS)).logits.numpy()

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        model.model_type, **{**HUGGINGFACE_SIZES, **model.config}
    )
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    theirs.save_pretrained(tmp_path / "model")
    graphdef, params = nnx.split(model.make(), nnx.Param)
    params = place(load_file(tmp_path / "model" / "model.safetensors"), params, names=rules(model))
    assert_agree(adapted(graphdef)(params), their_logits(theirs), tolerance=1e-4)
    axes = preview(params, names=rules(model)).axes
    wrapped = as_if_trained(lora_jax.wrap(params, ".*_(proj|einsum)", rank=2, axes=axes))
    save(tmp_path / "adapter", wrapped, names=rules(model))
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", attn_implementation="eager"
    )
    with_adapter = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert_agree(adapted(graphdef)(wrapped), their_logits(with_adapter), tolerance=1e-4)
