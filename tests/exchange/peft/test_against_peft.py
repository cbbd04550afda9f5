"""Adapters that PEFT wrote, and PEFT reading those written here; each computes the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.exchange.peft import Rule, load, read_config, save
from tests.exchange.peft.models import MODELS
from tests.trained import as_if_trained

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft.utils import load_peft_weights, set_peft_model_state_dict  # noqa: E402

from tests.exchange.peft.make_adapters import RECIPES, make_adapter  # noqa: E402
from tests.exchange.peft.torch_models import inputs, twin  # noqa: E402

pytestmark = [
    # PEFT asks transformers by a name that is going away.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT looks for the patterns of parameters among the modules; it applies them all the same.
    pytest.mark.filterwarnings(
        "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"
    ),
]

# The same PyTorch model, with its parameters in a tree of another form.
FORMS = {
    "layered": ("layered", "stacked"),
    "conv2d": ("conv2d", "conv2d_output_first"),
}
CASES = [
    (recipe, form) for recipe, (name, _) in RECIPES.items() for form in FORMS.get(name, (name,))
]


def assert_close(actual, expected, tolerance=2e-6):
    expected = np.asarray(expected, np.float64)
    error = np.abs(np.asarray(actual, np.float64) - expected).max()
    assert error <= tolerance * np.abs(expected).max()


def jax_outputs(name, wrapped):
    model = MODELS[name]
    return jax.jit(lora_jax.adapt(model.apply, on_materialize="error"))(wrapped, model.inputs)


def peft_outputs(name, folder):
    """Returns what PEFT computes with an adapter; it must use every tensor, and miss none."""
    config = peft.PeftConfig.from_pretrained(folder)
    module = peft.get_peft_model(twin(name), config, autocast_adapter_dtype=False)
    tensors = load_peft_weights(folder, device="cpu")
    result = set_peft_model_state_dict(module, tensors)
    assert result.unexpected_keys == []
    assert [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key] == []
    with torch.no_grad():
        return module.eval()(inputs(name)).numpy()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Returns the folder of what PEFT writes for a recipe, made once."""
    folder = tmp_path_factory.mktemp("adapters")

    def of_recipe(recipe):
        if not (folder / recipe).exists():
            make_adapter(folder / recipe, recipe)
        return folder / recipe

    return of_recipe


class TestWrittenByPEFT:
    @pytest.mark.parametrize(("recipe", "form"), CASES)
    def test_outputs(self, adapters, recipe, form):
        folder, model = adapters(recipe), MODELS[form]
        wrapped = load(folder, model.params(), names=model.names)
        expected = np.load(folder / "outputs.npy")
        assert_close(jax_outputs(form, wrapped), expected)
        without = np.asarray(jax.jit(model.apply)(model.params(), model.inputs))
        assert np.abs(without - expected).max() > 1e-2 * np.abs(expected).max()

    @pytest.mark.parametrize(("recipe", "form"), CASES)
    def test_the_way_back(self, adapters, recipe, form, tmp_path):
        folder, model = adapters(recipe), MODELS[form]
        wrapped = load(folder, model.params(), names=model.names)
        save(tmp_path / "back", wrapped, names=model.names, config=read_config(folder))
        theirs, ours = (
            load_peft_weights(each, device="cpu") for each in (folder, tmp_path / "back")
        )
        # PEFT itself doesn't read these two again.
        redundant = {
            key for key in theirs if ".original_module." in key or ".modules_to_save." in key
        }
        assert set(ours) == set(theirs) - redundant
        for key, tensor in ours.items():
            assert torch.equal(tensor, theirs[key]), key
        name = RECIPES[recipe][0]
        if form == name:
            outputs = peft_outputs(name, tmp_path / "back")
            assert_close(outputs, np.load(folder / "outputs.npy"))

    def test_bfloat16(self, adapters, tmp_path):
        make_adapter(tmp_path / "theirs", "linear", torch.bfloat16)
        model = MODELS["stacked"]
        wrapped = load(tmp_path / "theirs", model.params(), names=model.names)
        assert wrapped["layers"]["query"]["kernel"].lora_A.dtype == jnp.bfloat16
        save(tmp_path / "ours", wrapped, names=model.names)
        ours, theirs = (
            load_peft_weights(tmp_path / each, device="cpu") for each in ("ours", "theirs")
        )
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, theirs[key])


VARIANTS = {
    "plain": {"alpha": 3},
    "rslora": {"alpha": 3, "rslora": True},
    "dora": {"alpha": 3, "dora": True},
    "thirds": {"rank": 3, "alpha": 0.7},
    "trained_in_full": {"alpha": 3, "train": "classifier"},
    "biases": {"alpha": 3, "train": ["classifier/bias", "query/bias"]},
}

OTHERS = [name for name in MODELS if name != "stacked"]
WRAPPED = [
    *(("stacked", variant) for variant in VARIANTS),
    *((name, "plain") for name in OTHERS),
    *((name, "dora") for name in OTHERS if not name.startswith("experts")),
]

BERT_NAMES = [
    Rule("{module}.weight", "{module:.+}/kernel"),
    Rule("{module}.weight", "{module:.+}/scale"),
    Rule("{module}.weight", "{module:.+}/embedding", kind="embedding"),
    Rule("{module}.bias", "{module:.+}/bias"),
]


def tiny_bert():
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 20}
    config = transformers.BertConfig(**sizes, num_hidden_layers=2, max_position_embeddings=6)
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config).eval()


def hugging_face_layout(state):
    """Returns a tree with a PyTorch model's own module names, as Flax calls the weights."""
    tree = {}
    for name, tensor in state.items():
        *modules, parameter = name.split(".")
        leaf = tensor.numpy()
        if parameter == "weight" and "LayerNorm" in name:
            parameter = "scale"
        elif parameter == "weight" and "embeddings" in name:
            parameter = "embedding"
        elif parameter == "weight":
            parameter, leaf = "kernel", leaf.T
        place = tree
        for module in modules:
            place = place.setdefault(module, {})
        place[parameter] = jnp.asarray(leaf)
    return tree


class TestReadByPEFT:
    @pytest.mark.parametrize(("name", "variant"), WRAPPED)
    def test_outputs(self, name, variant, tmp_path):
        model = MODELS[name]
        settings = {"rank": 2, **VARIANTS[variant]}
        wrapped = as_if_trained(
            lora_jax.wrap(model.params(), model.targets, axes=model.axes or None, **settings)
        )
        save(tmp_path / "adapter", wrapped, names=model.names)
        expected = jax_outputs(name, wrapped)
        assert_close(peft_outputs(name, tmp_path / "adapter"), expected)

    def test_each_place_of_its_own(self, tmp_path):
        model = MODELS["layered"]
        targets = {
            "layer_0/query": {"rank": 2, "alpha": 3},
            "layer_1/query": {"rank": 3, "alpha": 3},
            "layer_1/dense": {"rank": 3, "alpha": 0.1},
            "layer_2": {"rank": 4, "alpha": 7, "rslora": True},
        }
        wrapped = as_if_trained(lora_jax.wrap(model.params(), targets, axes=model.axes))
        save(tmp_path / "adapter", wrapped, names=model.names)
        assert_close(peft_outputs("layered", tmp_path / "adapter"), jax_outputs("layered", wrapped))

    def test_some_layers_of_a_stack(self, tmp_path):
        model = MODELS["stacked"]
        wrapped = lora_jax.wrap(
            model.params(), ("query", "dense"), rank=2, axes=model.axes, layers=(0, 2)
        )
        wrapped = as_if_trained(wrapped)
        save(tmp_path / "adapter", wrapped, names=model.names)
        assert_close(peft_outputs("stacked", tmp_path / "adapter"), jax_outputs("stacked", wrapped))

    @pytest.mark.parametrize("dora", [False, True])
    def test_a_base_that_an_initialiser_changed(self, tmp_path, dora):
        def half_taken_out(key, weight2d, rank, scale):
            lora_A = jax.random.normal(key, (weight2d.shape[0], rank))
            lora_B = jax.random.normal(key, (rank, weight2d.shape[1]))
            return weight2d - scale * lora_A @ lora_B, lora_A, lora_B

        model = MODELS["stacked"]
        wrapped = lora_jax.wrap(
            model.params(), model.targets, rank=2, axes=model.axes, init=half_taken_out, dora=dora
        )
        wrapped = as_if_trained(wrapped)
        save(
            tmp_path / "adapter", wrapped, names=model.names, config={"init_lora_weights": "pissa"}
        )
        assert read_config(tmp_path / "adapter")["init_lora_weights"] is True
        assert read_config(tmp_path / "adapter")["r"] == 4
        assert_close(
            peft_outputs("stacked", tmp_path / "adapter"), jax_outputs("stacked", wrapped), 1e-5
        )

    def test_bert(self, tmp_path):
        """A model of transformers; for its task PEFT asks for the classifier, trained or not."""
        bert = tiny_bert()
        params = hugging_face_layout(bert.state_dict())
        wrapped = as_if_trained(lora_jax.wrap(params, "query/kernel", rank=2, alpha=3))
        config = {"task_type": "SEQ_CLS", "lora_dropout": 0.1}
        save(tmp_path / "ours", wrapped, names=BERT_NAMES, config=config)
        loaded = peft.PeftModel.from_pretrained(bert, tmp_path / "ours")
        loaded.save_pretrained(tmp_path / "theirs")
        back = load(tmp_path / "theirs", params, names=BERT_NAMES)
        assert type(back["classifier"]["kernel"]) is lora_jax.FullWeight
        merged = loaded.merge_and_unload().state_dict()
        for actual, expected in zip(
            jax.tree.leaves(lora_jax.merge(back)),
            jax.tree.leaves(hugging_face_layout(merged)),
            strict=True,
        ):
            assert_close(actual, expected)

    def test_from_pretrained(self, tmp_path):
        """PEFT's own entry point warns of missing tensors, and warnings are errors here."""
        model = MODELS["layered"]
        wrapped = lora_jax.wrap(
            model.params(), model.targets, rank=2, axes=model.axes, train="classifier"
        )
        wrapped = as_if_trained(wrapped)
        save(tmp_path / "adapter", wrapped, names=model.names)
        loaded = peft.PeftModel.from_pretrained(twin("layered"), tmp_path / "adapter")
        with torch.no_grad():
            actual = loaded(inputs("layered")).numpy()
        assert_close(actual, jax_outputs("layered", wrapped))
