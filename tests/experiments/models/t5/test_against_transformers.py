"""The same weights in PyTorch: logits, gradients, texts, and folders that either writes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from experiments.models.attention import Places
from experiments.models.generation import generate
from experiments.models.names import huggingface_rules
from experiments.models.pretrained import LanguageModel
from experiments.models.t5 import T5
from experiments.models.t5.relative import buckets
from lora_jax.exchange import huggingface, place
from tests import tiny_t5
from tests.agreement import assert_agree, assert_identical, norm, relative_error
from tests.trained import as_if_trained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# What PEFT still asks of the models of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

VERSIONS = sorted(tiny_t5.CHANGES)
# A tenth of the vocabulary, so that some texts end early.
END_IDS = tuple(range(1, tiny_t5.VOCABULARY, 10))
TARGETS = "(attention|cross_attention)/(query|key|value|out)|mlp/"


def theirs(folder):
    return transformers.T5ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
    ).eval()


def in_torch(tokens):
    return torch.tensor(np.asarray(tokens), dtype=torch.long)


def their_logits(model, inputs, tokens, is_input=None):
    mask = None if is_input is None else in_torch(is_input)
    with torch.no_grad():
        return (
            model(
                input_ids=in_torch(inputs), attention_mask=mask, decoder_input_ids=in_torch(tokens)
            )
            .logits.float()
            .numpy()
        )


@pytest.mark.parametrize("both_directions", [True, False])
@pytest.mark.parametrize(
    ("count", "farthest"), [(32, 128), (32, 20), (12, 20), (4, 3), (64, 256), (6, 1000), (32, 17)]
)
def test_buckets_are_those_of_transformers(count, farthest, both_directions):
    from transformers.models.t5.modeling_t5 import T5Attention

    settings = tiny_t5.config(
        "1.0", relative_attention_num_buckets=count, relative_attention_max_distance=farthest
    )
    # Farther than the farthest, where all distances share a bucket.
    differences = np.arange(-3 * farthest, 3 * farthest + 1)
    expected = T5Attention._relative_position_bucket(
        torch.tensor(differences), both_directions, count, farthest
    )
    found = buckets(settings, both_directions=both_directions)
    rows = np.clip(differences, -farthest, farthest) + farthest
    np.testing.assert_array_equal(found[rows], expected.numpy())


@pytest.mark.parametrize("version", VERSIONS)
def test_logits_and_gradients_agree(tmp_path, version):
    tiny_t5.write_folder(tmp_path / "model", version)
    # Texts that are longer than the farthest distance, the second of them shorter.
    inputs, tokens = tiny_t5.tokens(2, 40), tiny_t5.decoder_tokens(2, 30)
    is_input = np.ones_like(inputs)
    is_input[1, 29:] = 0
    model = theirs(tmp_path / "model")
    outputs = model(
        input_ids=in_torch(inputs),
        attention_mask=in_torch(is_input),
        decoder_input_ids=in_torch(tokens),
    ).logits
    torch.tanh(outputs).sum().backward()

    own = T5(tiny_t5.config(version))
    places = Places.of(inputs, None, is_input)

    def loss(params):
        logits = own.apply({"params": params}, inputs, tokens, places)
        return jnp.sum(jnp.tanh(logits)), logits

    params = tiny_t5.params(version)
    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert_agree(logits, outputs.detach().numpy(), tolerance=1e-4)
    expected = place(
        {name: each.grad.numpy() for name, each in model.named_parameters()},
        params,
        names=huggingface_rules(own.config),
    )
    assert_agree(gradients, expected, tolerance=1e-4)


@pytest.mark.parametrize("version", VERSIONS)
def test_bfloat16_is_as_exact_as_theirs(tmp_path, version):
    tiny_t5.write_folder(tmp_path / "model", version)
    inputs, tokens = tiny_t5.tokens(), tiny_t5.decoder_tokens()
    model = theirs(tmp_path / "model")
    exact = their_logits(model, inputs, tokens)
    narrow = their_logits(model.to(torch.bfloat16), inputs, tokens)
    own = T5(tiny_t5.config(version), dtype=jnp.bfloat16)
    found = jax.jit(own.apply)({"params": tiny_t5.params(version)}, inputs, tokens)
    assert found.dtype == jnp.bfloat16
    error = relative_error(narrow, exact, norm(exact))
    assert_agree(np.asarray(found, np.float32), exact, tolerance=1.2 * error)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_folder_of_transformers_is_read(tmp_path, version):
    """Also with what transformers writes into its settings today, and in several files."""
    entries = tiny_t5.entries(version)
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**entries)).eval()
    if not entries["tie_word_embeddings"]:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 5)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]

    read = LanguageModel.read(tmp_path)
    assert read.config == tiny_t5.config(version)
    inputs, tokens = tiny_t5.tokens(), tiny_t5.decoder_tokens()
    logits = jax.jit(read.network().apply)({"params": read.params()}, inputs, tokens)
    assert_agree(logits, their_logits(model, inputs, tokens), tolerance=1e-4)


@pytest.mark.parametrize("version", VERSIONS)
def test_texts_are_those_of_transformers(tmp_path, version):
    tiny_t5.write_folder(tmp_path / "model", version)
    inputs, lengths, new = tiny_t5.tokens(3, 30), np.array([30, 17, 5]), 25
    is_input = (np.arange(30) < lengths[:, None]).astype(np.int32)
    model = theirs(tmp_path / "model")
    expected = model.generate(
        input_ids=in_torch(inputs),
        attention_mask=in_torch(is_input),
        max_new_tokens=new,
        do_sample=False,
        # The cache of transformers 5.23 has a place for each layer of the encoder, not the decoder.
        use_cache=False,
        eos_token_id=list(END_IDS),
    ).numpy()[:, 1:]
    network = T5(tiny_t5.config(version))

    @jax.jit
    def written(params):
        return generate(network.apply, params, inputs, lengths, new_tokens=new, end_ids=END_IDS)

    found = np.asarray(written(tiny_t5.params(version)))
    for own, other in zip(found, expected, strict=True):
        stops = np.flatnonzero(np.isin(other, END_IDS))
        length = stops[0] + 1 if len(stops) else len(other)
        assert own[:length].tolist() == other[:length].tolist()
        assert (own[length:] == own[length - 1]).all()


@pytest.mark.parametrize("version", VERSIONS)
def test_adapters_are_those_of_peft(tmp_path, version):
    """What is trained here computes there, and what PEFT writes computes here."""
    peft = pytest.importorskip("peft")
    tiny_t5.write_folder(tmp_path / "model", version)
    settings, params = tiny_t5.config(version), tiny_t5.params(version)
    rules = huggingface_rules(settings)
    inputs, tokens = tiny_t5.tokens(), tiny_t5.decoder_tokens()
    run = jax.jit(lora_jax.adapt(T5(settings).apply))
    axes = lora_jax.exchange.peft.preview(params, names=rules).axes
    wrapped = as_if_trained(lora_jax.wrap(params, f"({TARGETS}).*kernel", rank=3, axes=axes))
    lora_jax.exchange.peft.save(tmp_path / "ours", wrapped, names=rules)
    base = theirs(tmp_path / "model")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    ours = run({"params": wrapped}, inputs, tokens)
    assert_agree(ours, their_logits(adapted, inputs, tokens), tolerance=1e-4)
    # The premise: the adapter counts.
    assert np.abs(ours - run({"params": params}, inputs, tokens)).max() > 0.1

    adapted.save_pretrained(tmp_path / "theirs")
    loaded = lora_jax.exchange.peft.load(tmp_path / "theirs", params, names=rules)
    assert_identical(loaded, wrapped)


@pytest.mark.parametrize("version", VERSIONS)
def test_an_adapter_that_peft_made_computes_here(tmp_path, version):
    peft = pytest.importorskip("peft")
    tiny_t5.write_folder(tmp_path / "model", version)
    settings, params = tiny_t5.config(version), tiny_t5.params(version)
    config = peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=4, lora_alpha=8, target_modules=["q", "v", "wo"]
    )
    torch.manual_seed(0)
    adapted = peft.get_peft_model(theirs(tmp_path / "model"), config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) / 4)
    adapted.save_pretrained(tmp_path / "adapter")
    rules = huggingface_rules(settings)
    loaded = lora_jax.exchange.peft.load(tmp_path / "adapter", params, names=rules)
    inputs, tokens = tiny_t5.tokens(), tiny_t5.decoder_tokens()
    ours = jax.jit(lora_jax.adapt(T5(settings).apply))({"params": loaded}, inputs, tokens)
    assert_agree(ours, their_logits(adapted, inputs, tokens), tolerance=1e-4)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_merged_folder_is_loaded_by_transformers(tmp_path, version):
    settings, params = tiny_t5.config(version), tiny_t5.params(version)
    rules = huggingface_rules(settings)
    axes = lora_jax.exchange.peft.preview(params, names=rules).axes
    wrapped = as_if_trained(lora_jax.wrap(params, f"({TARGETS}).*kernel", rank=3, axes=axes))
    huggingface.save(
        tmp_path / "merged",
        wrapped,
        names=rules,
        config=tiny_t5.entries(version),
        shard_bytes=40_000,
    )
    inputs, tokens = tiny_t5.tokens(), tiny_t5.decoder_tokens()
    ours = jax.jit(lora_jax.adapt(T5(settings).apply))({"params": wrapped}, inputs, tokens)
    merged = their_logits(theirs(tmp_path / "merged"), inputs, tokens)
    assert_agree(ours, merged, tolerance=1e-4)
