"""The same weights in PyTorch: logits, gradients, and folders that either writes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from experiments.models.llama import Llama
from experiments.models.names import huggingface_rules
from experiments.models.pretrained import LanguageModel
from lora_jax.exchange import huggingface, place
from tests import tiny_llama
from tests.agreement import assert_agree, assert_identical
from tests.trained import as_if_trained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# What PEFT still asks of the models of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

MODELS = sorted(tiny_llama.CHANGES)


def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize("model_type", MODELS)
def test_logits_and_gradients_agree(tmp_path, model_type):
    folder = tmp_path / "model"
    tiny_llama.write_folder(folder, model_type)
    tokens = tiny_llama.tokens(2, 40)
    model = theirs(folder)
    outputs = model(torch.tensor(tokens, dtype=torch.long)).logits
    torch.tanh(outputs).sum().backward()

    own = Llama(tiny_llama.config(model_type))

    def loss(params):
        logits = own.apply({"params": params}, tokens)
        return jnp.sum(jnp.tanh(logits)), logits

    params = tiny_llama.params(model_type)
    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert_agree(logits, outputs.detach().numpy(), tolerance=1e-4)
    expected = place(
        {name: each.grad.numpy() for name, each in model.named_parameters()},
        params,
        names=huggingface_rules(own.config),
    )
    assert_agree(gradients, expected, tolerance=1e-4)


@pytest.mark.parametrize("model_type", MODELS)
def test_a_folder_of_transformers_is_read(tmp_path, model_type):
    """Also with what transformers writes into its settings today, and in several files."""
    configs = transformers.AutoConfig.for_model(**tiny_llama.entries(model_type))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(configs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 5)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1

    read = LanguageModel.read(tmp_path)
    assert read.config == tiny_llama.config(model_type)
    tokens = tiny_llama.tokens()
    logits = jax.jit(Llama(read.config).apply)({"params": read.params()}, tokens)
    with torch.no_grad():
        expected = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    assert_agree(logits, expected, tolerance=1e-4)


@pytest.mark.parametrize("model_type", MODELS)
def test_adapters_are_those_of_peft(tmp_path, model_type):
    """What is trained here computes there, and what PEFT writes computes here."""
    peft = pytest.importorskip("peft")
    tiny_llama.write_folder(tmp_path / "model", model_type)
    settings, params = tiny_llama.config(model_type), tiny_llama.params(model_type)
    rules, tokens = huggingface_rules(settings), tiny_llama.tokens()
    run = jax.jit(lora_jax.adapt(Llama(settings).apply))
    wrapped = as_if_trained(lora_jax.wrap(params, "attention/(q|k|v|out)|mlp/", rank=3, axes=AXES))
    lora_jax.exchange.peft.save(tmp_path / "ours", wrapped, names=rules)
    base = theirs(tmp_path / "model")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    with torch.no_grad():
        logits = adapted(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    ours = run({"params": wrapped}, tokens)
    assert_agree(ours, logits, tolerance=1e-4)
    # The premise: the adapter counts.
    assert np.abs(ours - run({"params": params}, tokens)).max() > 0.1

    adapted.save_pretrained(tmp_path / "theirs")
    loaded = lora_jax.exchange.peft.load(tmp_path / "theirs", params, names=rules)
    assert_identical(loaded, wrapped)


def test_a_merged_folder_is_loaded_by_transformers(tmp_path):
    params = tiny_llama.params("qwen2")
    wrapped = lora_jax.wrap(params, "attention/(query|out)|mlp", rank=3, axes=AXES)
    wrapped = jax.tree.map(lambda leaf: leaf + 0.05, wrapped)
    settings = tiny_llama.config("qwen2")
    huggingface.save(
        tmp_path / "merged",
        wrapped,
        names=huggingface_rules(settings),
        config=tiny_llama.entries("qwen2"),
        shard_bytes=40_000,
    )
    tokens = tiny_llama.tokens()
    ours = lora_jax.adapt(Llama(settings).apply)({"params": wrapped}, tokens)
    with torch.no_grad():
        merged = theirs(tmp_path / "merged")(torch.tensor(tokens, dtype=torch.long)).logits
    assert_agree(ours, merged.numpy(), tolerance=1e-4)


AXES = {
    "attention/(query|key|value)": ("batch", "in", "out", "out"),
    "attention/out": ("batch", "in", "in", "out"),
    "mlp": ("batch", "in", "out"),
}
