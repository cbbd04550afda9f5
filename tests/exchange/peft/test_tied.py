"""A leaf that PyTorch knows as two parameters: the embedding that the output layer shares."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import CheckpointError
from lora_jax.exchange.peft import Rule, load, preview, read_config, save
from tests.agreement import assert_agree, relative_error
from tests.trained import as_if_trained

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

# PEFT warns of tied weights in several ways; what it computes is looked at here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
TOKENS = torch.arange(10).reshape(2, 5)


def names(tied):
    return [
        Rule(EMBEDDING, "embed/embedding", kind="embedding", tied=tied),
        Rule(QUERY, "query/kernel"),
    ]


# The same leaf, by the name of its other use.
def head_names(tied):
    return [Rule(HEAD, "embed/embedding", axes=("out", "in"), tied=tied), *names(False)[1:]]


@functools.cache
def config():
    sizes = {"vocab_size": 13, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 8}
    return transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=True)


def model(state=None):
    torch.manual_seed(0)
    module = transformers.LlamaForCausalLM(config()).eval()
    if state is not None:
        module.load_state_dict(state, strict=False)
    return module


def params():
    state = model().state_dict()
    embedding, query = (jnp.asarray(state[name].numpy()) for name in (EMBEDDING, QUERY))
    return {"embed": {"embedding": embedding}, "query": {"kernel": query.T}}


def logits(module):
    with torch.no_grad():
        return module(TOKENS).logits.numpy()


def merged_logits(wrapped):
    """Returns the logits with one weight for both uses, as a JAX model of this tree has them."""
    merged = lora_jax.merge(wrapped)
    weights = {EMBEDDING: merged["embed"]["embedding"], QUERY: merged["query"]["kernel"].T}
    state = {name: torch.from_numpy(np.array(weight)) for name, weight in weights.items()}
    return logits(model({**state, HEAD: state[EMBEDDING]}))


TIED = {"ensure_weight_tying": True}
IN_FULL = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
HEAD_IN_FULL = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
OTHER_SCALE = {"alpha_pattern": {"lm_head": 5}}
REFUSED = {
    "the embedding": ({"target_modules": ["embed_tokens"]}, f"adapts only '{EMBEDDING}'"),
    "the head": ({"target_modules": ["lm_head"]}, f"adapts only '{HEAD}'"),
    "each by itself": ({"target_modules": ["embed_tokens", "lm_head"]}, "each in its own way"),
    "other scales": ({"target_modules": ["embed_tokens"], **OTHER_SCALE, **TIED}, "its own way"),
    "magnitudes": ({"target_modules": ["lm_head"], "use_dora": True, **TIED}, "DoRA's magnitudes"),
    "the embedding in full": (IN_FULL, f"trains only '{EMBEDDING}'"),
    "the head in full": (HEAD_IN_FULL, f"trains only '{HEAD}'"),
}
CARRIED = {
    "by the embedding": {"target_modules": ["embed_tokens", "q_proj"], **TIED},
    "by the head": {"target_modules": ["lm_head"], **TIED},
    "by an expression": {"target_modules": ".*(embed_tokens|q_proj)", **TIED},
    "rslora": {"target_modules": ["embed_tokens"], "use_rslora": True, **TIED},
    "in full": {**IN_FULL, **TIED},
    "in full by the head": {**HEAD_IN_FULL, **TIED},
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Returns the folder that PEFT writes for a config, and its logits; each made once."""
    folder = tmp_path_factory.mktemp("tied")

    @functools.cache
    def of_options(name):
        options = {**CARRIED, **{name: options for name, (options, _) in REFUSED.items()}}[name]
        config = peft.LoraConfig(r=2, lora_alpha=3, task_type="CAUSAL_LM", **options)
        module = peft.get_peft_model(model(), config)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape))
        module.eval().save_pretrained(folder / name)
        return folder / name, logits(module)

    return of_options


@pytest.mark.parametrize("made", REFUSED)
class TestRefused:
    def test_by_name(self, adapters, made):
        folder, _ = adapters(made)
        with pytest.raises(CheckpointError, match=f"{REFUSED[made][1]}.*'embed/embedding' is both"):
            load(folder, params(), names=names(HEAD))
        problems = preview(params(), names=names(HEAD), path=folder).problems
        assert any(REFUSED[made][1] in problem for problem in problems)

    @pytest.mark.parametrize("rules", [names, head_names])
    def test_where_the_other_name_is_not_known(self, adapters, made, rules):
        folder, _ = adapters(made)
        with pytest.raises(CheckpointError, match=r"'embed/embedding' (is both|too).*tied='"):
            load(folder, params(), names=rules(True))


def test_without_the_rule_both_uses_would_change(adapters):
    folder, expected = adapters("the embedding")
    loaded = load(folder, params(), names=names(False))
    assert relative_error(merged_logits(loaded), expected, np.linalg.norm(expected)) > 0.1


@pytest.mark.parametrize("made", CARRIED)
class TestCarried:
    @pytest.mark.parametrize("rules", [names, head_names])
    def test_and_written_again(self, adapters, made, rules, tmp_path):
        folder, expected = adapters(made)
        rules = rules(HEAD if rules is names else EMBEDDING)
        loaded = load(folder, params(), names=rules)
        assert_agree(merged_logits(loaded), expected)
        save(tmp_path / "back", loaded, names=rules, config=read_config(folder))
        back = peft.PeftModel.from_pretrained(model(), tmp_path / "back")
        assert_agree(logits(back), expected)
        assert back.peft_config["default"].ensure_weight_tying

    def test_preview_says_both_names(self, adapters, made):
        folder, _ = adapters(made)
        shown = preview(params(), names=names(HEAD), path=folder)
        assert shown.problems == ()
        assert shown.rows[0][0] == f"{EMBEDDING} = {HEAD}"


class TestWrittenHere:
    @pytest.mark.parametrize("options", [{}, {"rslora": True}, {"init": "pissa"}])
    def test_peft_computes_the_same(self, tmp_path, options):
        wrapped = as_if_trained(
            lora_jax.wrap(params(), ["embed", "query"], rank=2, alpha=3, **options)
        )
        save(tmp_path / "adapter", wrapped, names=names(HEAD))
        theirs = peft.PeftModel.from_pretrained(model(), tmp_path / "adapter")
        assert_agree(logits(theirs), merged_logits(wrapped))

    @pytest.mark.parametrize(
        "options", [{"targets": "embed"}, {"targets": "query", "train": "embed"}]
    )
    def test_where_the_other_name_is_not_known(self, tmp_path, options):
        wrapped = lora_jax.wrap(params(), rank=2, **options)
        with pytest.raises(CheckpointError, match=r"'embed/embedding'.*only the first.*tied='lm"):
            save(tmp_path / "adapter", wrapped, names=names(True))
        assert "only the first" in preview(wrapped, names=names(True)).problems[0]

    def test_magnitudes(self, tmp_path):
        wrapped = lora_jax.wrap(params(), "embed", rank=2, dora=True)
        with pytest.raises(CheckpointError, match=r"magnitudes \(DoRA\) at 'embed.*other norms"):
            save(tmp_path / "adapter", wrapped, names=names(HEAD))

    def test_nothing_is_tied_that_is_not_adapted(self, tmp_path):
        wrapped = lora_jax.wrap(params(), "query", rank=2)
        config = {"ensure_weight_tying": True}
        for tied in (True, HEAD, False):
            save(tmp_path / str(tied), wrapped, names=names(tied), config=config)
            assert not read_config(tmp_path / str(tied))["ensure_weight_tying"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "c.weight", "path": "c", "kind": "conv"}, "'embedding' and a 'linear' share"),
        ({"name": "c.weight", "path": "c", "transposed": True}, "neither transposed"),
        ({"name": "c.{n}.weight", "path": "c"}, "nor a stack"),
        ({"name": "c.weight", "path": "c", "tied": "d.{n}.weight"}, "the same fields"),
    ],
)
def test_rules_that_contradict_themselves(options, message):
    with pytest.raises(ValueError, match=message):
        Rule(**{"tied": True, **options})


def test_a_name_that_another_leaf_has():
    rules = [*names(HEAD), Rule(HEAD, "head/kernel")]
    tree = {**params(), "head": {"kernel": jnp.ones((8, 13))}}
    with pytest.raises(ValueError, match=f"the same PyTorch name '{HEAD}'"):
        preview(tree, names=rules)


def test_fields():
    rule = Rule("{m}.tokens.weight", "{m:.+}/embed", kind="embedding", tied="{m}.head.weight")
    tree = {"a": {"b": {"embed": jnp.ones((5, 3))}}}
    shown = preview(tree, names=[rule])
    assert shown.rows[0][0] == "a.b.tokens.weight = a.b.head.weight"
