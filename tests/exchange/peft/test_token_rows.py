"""Rows of single tokens: what PEFT trains with `trainable_token_indices`."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax
from lora_jax import CheckpointError
from lora_jax.exchange.peft import Rule, load, preview, read_config, save
from tests.agreement import assert_agree
from tests.trained import as_if_trained

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

# PEFT warns of tied weights in several ways; what it computes is looked at here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
DELTA = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
HEAD_DELTA = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"
TOKENS = torch.tensor([[0, 3, 2, 7, 3], [5, 6, 7, 8, 12]])


@functools.cache
def config(*, is_tied):
    sizes = {"vocab_size": 13, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 8}
    return transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=is_tied)


def model(state=None, *, is_tied):
    torch.manual_seed(0)
    module = transformers.LlamaForCausalLM(config(is_tied=is_tied)).eval()
    if state is not None:
        module.load_state_dict(state, strict=False)
    return module


def names(*, is_tied):
    rules = [
        Rule(EMBEDDING, "embed/embedding", kind="embedding", tied=HEAD if is_tied else False),
        Rule(QUERY, "query/kernel"),
    ]
    return rules if is_tied else [*rules, Rule(HEAD, "head/kernel")]


def params(*, is_tied):
    state = {
        name: jnp.asarray(t.numpy()) for name, t in model(is_tied=is_tied).state_dict().items()
    }
    tree = {"embed": {"embedding": state[EMBEDDING]}, "query": {"kernel": state[QUERY].T}}
    return tree if is_tied else {**tree, "head": {"kernel": state[HEAD].T}}


def logits(module):
    with torch.no_grad():
        return module(TOKENS).logits.numpy()


def merged_logits(wrapped):
    """Returns the logits of the merged weights, as a JAX model of this tree has them."""
    merged = lora_jax.merge(wrapped)
    is_tied = "head" not in merged
    weights = {EMBEDDING: merged["embed"]["embedding"], QUERY: merged["query"]["kernel"].T}
    weights[HEAD] = weights[EMBEDDING] if is_tied else merged["head"]["kernel"].T
    state = {name: torch.from_numpy(np.array(weight)) for name, weight in weights.items()}
    return logits(model(state, is_tied=is_tied))


# By the kind of model and what PEFT is told.
OF_PEFT = {
    "a list, tied": (True, [3, 7]),
    "a list": (False, [7, 3, 12]),
    "the embedding, tied": (True, {"embed_tokens": [3]}),
    "the embedding and the head": (False, {"embed_tokens": [3, 7], "lm_head": [12, 7, 0]}),
    "the head": (False, {"lm_head": [7, 2]}),
}
# By the kind of model and what `wrap` is told.
OF_WRAP = {
    "tied": (True, {"embed": {"rows": [7, 3]}}),
    "the embedding": (False, {"embed": {"rows": [12]}}),
    "the embedding and the head": (False, {"embed": {"rows": [3]}, "head": {"rows": [7, 2]}}),
}


def changed_by_peft(folder, *, is_tied, rows, **options):
    """Writes an adapter as PEFT does, and returns its logits."""
    made = peft.LoraConfig(
        r=2, task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=rows
    )
    module = peft.get_peft_model(model(is_tied=is_tied), made)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    module.eval().save_pretrained(folder, **options)
    return logits(module)


@pytest.mark.parametrize("made", OF_PEFT)
@pytest.mark.parametrize("whole", [False, True], ids=["rows", "with the tables"])
def test_what_peft_wrote_is_read_and_written_again(made, whole, tmp_path):
    is_tied, rows = OF_PEFT[made]
    expected = changed_by_peft(
        tmp_path / "peft", is_tied=is_tied, rows=rows, save_embedding_layers=whole
    )
    rules, plain = names(is_tied=is_tied), params(is_tied=is_tied)
    loaded = load(tmp_path / "peft", plain, names=rules)
    assert_agree(merged_logits(loaded), expected)
    node = loaded["head" if "head" in made else "embed"]
    weight = node["kernel" if "head" in made else "embedding"]
    assert isinstance(weight.lora_A, lora_jax.RowSelection)
    save(tmp_path / "back", loaded, names=rules, config=read_config(tmp_path / "peft"))
    back = peft.PeftModel.from_pretrained(model(is_tied=is_tied), tmp_path / "back")
    assert_agree(logits(back), expected)


@pytest.mark.parametrize("made", OF_WRAP)
def test_what_is_written_computes_the_same_in_peft(made, tmp_path):
    is_tied, rows = OF_WRAP[made]
    rules = names(is_tied=is_tied)
    plain = params(is_tied=is_tied)
    axes = None if is_tied else {"head/kernel": ("out", "in")}
    wrapped = as_if_trained(lora_jax.wrap(plain, {**rows, "query": {}}, rank=2, axes=axes))
    save(tmp_path, wrapped, names=rules)
    module = peft.PeftModel.from_pretrained(model(is_tied=is_tied), tmp_path)
    assert_agree(logits(module), merged_logits(wrapped))
    loaded = load(tmp_path, plain, names=rules)
    for name, leaf in (("embed", "embedding"), ("head", "kernel")):
        if name in rows:
            was, now = wrapped[name][leaf], loaded[name][leaf]
            assert (now.axes, now.frozen) == (was.axes, was.frozen)
            np.testing.assert_array_equal(now.lora_A.rows, was.lora_A.rows)
            assert_agree(now.lora_B, was.lora_B)
    assert not preview(plain, names=rules, path=tmp_path).problems


def test_by_the_name_of_the_head(tmp_path):
    expected = changed_by_peft(tmp_path / "peft", is_tied=True, rows=[3, 7])
    rule = Rule(HEAD, "embed/embedding", axes=("out", "in"), tied=EMBEDDING)
    rules = [rule, *names(is_tied=True)[1:]]
    loaded = load(tmp_path / "peft", params(is_tied=True), names=rules)
    assert loaded["embed"]["embedding"].axes == ("in", "out")
    assert_agree(merged_logits(loaded), expected)
    save(tmp_path / "back", loaded, names=rules)
    assert list(read_config(tmp_path / "back")["trainable_token_indices"]) == [EMBEDDING[:-7]]
    back = peft.PeftModel.from_pretrained(model(is_tied=True), tmp_path / "back")
    assert_agree(logits(back), expected)


def test_a_table_of_half_precision_keeps_its_rows(tmp_path):
    plain = params(is_tied=True)
    plain["embed"]["embedding"] = plain["embed"]["embedding"].astype(jnp.bfloat16)
    targets = {"embed": {"rows": [3, 7]}, "query": {}}
    wrapped = as_if_trained(lora_jax.wrap(plain, targets, rank=2))
    save(tmp_path, wrapped, names=names(is_tied=True))
    loaded = load(tmp_path, plain, names=names(is_tied=True))
    weight, was = loaded["embed"]["embedding"], wrapped["embed"]["embedding"]
    assert weight.lora_B.dtype == jnp.float32
    assert_agree(weight.lora_B, was.lora_B)


def edited(folder, change):
    """Writes an adapter of PEFT, with its config and its tensors changed."""
    changed_by_peft(folder, is_tied=True, rows=[3, 7])
    config_file, tensors_file = (
        folder / f"adapter_{name}" for name in ("config.json", "model.safetensors")
    )
    content, tensors = json.loads(config_file.read_text()), load_file(tensors_file)
    change(content, tensors)
    config_file.write_text(json.dumps(content))
    save_file(tensors, tensors_file)


REFUSED = {
    "a row beyond the table": (
        lambda content, tensors: content.update(trainable_token_indices=[3, 13]),
        "has '13' for 'embed/embedding' .* numbers below 13",
    ),
    "a row twice": (
        lambda content, tensors: content.update(trainable_token_indices=[3, 3]),
        "has a number twice",
    ),
    "another number of rows": (
        lambda content, tensors: content.update(trainable_token_indices=[3]),
        r"has shape \(2, 8\); expected \(1, 8\)",
    ),
    "no numbers": (
        lambda content, tensors: content.pop("trainable_token_indices"),
        "the config has `trainable_token_indices` None",
    ),
    "no rows": (lambda content, tensors: tensors.pop(DELTA), "no tensor has these rows"),
    "text": (
        lambda content, tensors: content.update(trainable_token_indices=["a"]),
        "expected a list of whole numbers",
    ),
    "rows of the head alone": (
        lambda content, tensors: tensors.update({HEAD_DELTA: tensors.pop(DELTA)}),
        "another way than the embedding",
    ),
    "other rows of the head": (
        lambda content, tensors: tensors.update({HEAD_DELTA: 2 * tensors[DELTA]}),
        "another way than the embedding",
    ),
}


@pytest.mark.parametrize("made", REFUSED)
def test_refused_to_load(made, tmp_path):
    change, message = REFUSED[made]
    edited(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, params(is_tied=True), names=names(is_tied=True))


def test_refused_to_save(tmp_path):
    plain = params(is_tied=True)
    alone = lora_jax.wrap(plain, {"embed": {"rows": [3]}})
    with pytest.raises(CheckpointError, match="no low-rank adapters"):
        save(tmp_path, alone, names=names(is_tied=True))
    both = lora_jax.wrap(lora_jax.wrap(plain, ".*", rank=2), {"embed": {"rows": [3]}})
    with pytest.raises(CheckpointError, match="an adapter on another one"):
        save(tmp_path, both, names=names(is_tied=True))
    wrapped = lora_jax.wrap(plain, {"embed": {}, "query": {"rows": [3]}}, rank=2)
    transposed = Rule(QUERY, "query/kernel", transposed=True)
    with pytest.raises(CheckpointError, match="has rows of 'query/kernel', which is transposed"):
        save(tmp_path, wrapped, names=[names(is_tied=True)[0], transposed])
