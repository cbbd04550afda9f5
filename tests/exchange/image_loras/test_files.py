"""Adapters in the files of diffusers and kohya's scripts: there and back, and files of others."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax._folders import CheckpointError
from lora_jax.exchange import diffusers, kohya
from lora_jax.exchange.peft import Rule
from tests.exchange.image_loras.small_unet import (
    LAYERS,
    NAMES,
    assert_same_bits,
    params,
    wrapped,
)

numpy_files = pytest.importorskip("safetensors.numpy")

FORMATS = {"diffusers": diffusers, "kohya": kohya}
CASES = {
    "every layer": {},
    "some layers": {"targets": "to_q|conv1"},
    "scales that differ": {"targets": {"mid": {"alpha": 1}, "down": {"rank": 3}}},
    "rsLoRA": {"rslora": True},
    "DoRA": {"dora": True},
}


@pytest.fixture(params=FORMATS)
def form(request):
    return FORMATS[request.param]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(form, path, case):
    tree = wrapped(**CASES[case])
    form.save(path, tree, names=NAMES)
    assert_same_bits(form.load(path, params(), names=NAMES), tree)
    assert form.preview(path, params(), names=NAMES).problems == ()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_factors_of_half_precision(form, path, dtype):
    tree = wrapped(dtype=dtype, alpha=2)
    form.save(path, tree, names=NAMES)
    assert {each.dtype for each in numpy_files.load_file(path).values()} == {jnp.dtype(dtype)}
    assert_same_bits(form.load(path, params(), names=NAMES), tree)


def test_what_an_initialiser_moved_is_written_on_the_original_base(form, path):
    tree = wrapped(init="pissa")
    form.save(path, tree, names=NAMES)
    found = lora_jax.merge(form.load(path, params(), names=NAMES))
    expected = lora_jax.merge(tree)
    for name in LAYERS:
        block, layer = LAYERS[name][0].split("/")
        np.testing.assert_allclose(
            found[block][layer]["kernel"], expected[block][layer]["kernel"], atol=1e-5
        )


# --- keys of others ------------------------------------------------------------------------------

MODULE = "mid_block.attentions.0.attn1.to_q"
PROCESSOR = "mid_block.attentions.0.attn1.processor"
FLAT = "lora_unet_mid_block_attentions_0_attn1_to_q"
# For each kind of file: the format, the keys of lora_A, lora_B and alpha, and the adapted module.
KEYS = {
    "diffusers": (diffusers, f"unet.{MODULE}.lora_A.weight", f"unet.{MODULE}.lora_B.weight", None),
    "diffusers, one model": (diffusers, f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight", None),
    "diffusers before": (
        diffusers,
        f"unet.{MODULE}.lora.down.weight",
        f"unet.{MODULE}.lora.up.weight",
        f"unet.{MODULE}.alpha",
    ),
    "attention processors": (
        diffusers,
        f"unet.{PROCESSOR}.to_q_lora.down.weight",
        f"unet.{PROCESSOR}.to_q_lora.up.weight",
        None,
    ),
    "attention processors of one model": (
        diffusers,
        f"{PROCESSOR}.to_q_lora.down.weight",
        f"{PROCESSOR}.to_q_lora.up.weight",
        None,
    ),
    "kohya": (kohya, f"{FLAT}.lora_down.weight", f"{FLAT}.lora_up.weight", f"{FLAT}.alpha"),
    "kohya without alpha": (kohya, f"{FLAT}.lora_down.weight", f"{FLAT}.lora_up.weight", None),
}


def written(path, tensors, **metadata):
    numpy_files.save_file(tensors, path, metadata=metadata or None)
    return path


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("kind", KEYS)
def test_keys_of_other_programs(path, kind):
    form, A_key, B_key, alpha_key = KEYS[kind]
    A, B = numbers(2, 8), numbers(8, 2, seed=1)
    tensors = {A_key: A, B_key: B}
    if alpha_key is not None:
        tensors[alpha_key] = np.array(1.0, np.float32)
    found = form.load(written(path, tensors), params(), names=NAMES)["mid"]["to_q"]["kernel"]
    np.testing.assert_array_equal(found.lora_A, A.T)
    np.testing.assert_array_equal(found.lora_B, B.T)
    assert float(found.scale) == (1.0 if alpha_key is None else 0.5)


def test_the_output_layer_of_an_attention_processor(path):
    keys = [f"unet.{PROCESSOR}.to_out_lora.{part}.weight" for part in ("down", "up")]
    tensors = dict(zip(keys, (numbers(2, 8), numbers(8, 2)), strict=True))
    found = diffusers.load(written(path, tensors), params(), names=NAMES)
    assert found["mid"]["to_out"]["kernel"].rank == 2


def test_metadata_says_ranks_and_alphas(path):
    config = {"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": {"to_q": 1}}
    tensors = {
        f"unet.{module}.lora_{part}.weight": numbers(*shape)
        for module in (MODULE, "mid_block.attentions.0.attn1.to_out.0")
        for part, shape in (("A", (2, 8)), ("B", (8, 2)))
    }
    written(path, tensors, lora_adapter_metadata=json.dumps(config))
    found = diffusers.load(path, params(), names=NAMES)["mid"]
    assert float(found["to_q"]["kernel"].scale) == 0.5
    assert float(found["to_out"]["kernel"].scale) == 2.0


@pytest.mark.parametrize("layer", ["proj_in", "to_q"])
def test_linear_layers_and_convolutions_of_one_pixel_are_the_same(path, layer):
    """A file may have either, whichever the model has."""
    module = next(name for name, (own, _) in LAYERS.items() if own == f"mid/{layer}")
    flat = f"lora_unet_{module.replace('.', '_')}"
    window = () if layer == "proj_in" else (1, 1)
    A, B = numbers(2, 8), numbers(8, 2, seed=1)
    tensors = {
        f"{flat}.lora_down.weight": A.reshape(2, 8, *window),
        f"{flat}.lora_up.weight": B.reshape(8, 2, *window),
    }
    found = kohya.load(written(path, tensors), params(), names=NAMES)["mid"][layer]["kernel"]
    np.testing.assert_array_equal(found.lora_A.reshape(8, 2), A.T)


# --- other components ----------------------------------------------------------------------------

TEXT = {
    "diffusers": "text_encoder.layers.0.q_proj.lora_A.weight",
    "kohya": "lora_te_layers_0_q_proj.lora_down.weight",
}


@pytest.mark.parametrize("name", FORMATS)
def test_tensors_of_text_encoders_are_refused_left_out_or_carried_along(path, tmp_path, name):
    form, key = FORMATS[name], TEXT[name]
    tree, others = wrapped(), {TEXT[name]: numbers(2, 5)}
    form.save(path, tree, names=NAMES, others=others)
    with pytest.raises(CheckpointError, match=f"holds '{key}' of other components"):
        form.load(path, params(), names=NAMES)
    assert any(key in problem for problem in form.preview(path, params(), names=NAMES).problems)
    ignore = [key[:7]]
    assert_same_bits(form.load(path, params(), names=NAMES, ignore=ignore), tree)
    again = tmp_path / "again.safetensors"
    form.save(again, tree, names=NAMES, others=form.other_tensors(path))
    # The order of entries in a file's metadata is not fixed.
    found, expected = (numpy_files.load_file(each) for each in (again, path))
    assert found.keys() == expected.keys()
    assert all(found[each].tobytes() == expected[each].tobytes() for each in found)
    with pytest.raises(ValueError, match="of the component"):
        form.save(again, tree, names=NAMES, others=numpy_files.load_file(path), overwrite=True)


# --- what is refused -----------------------------------------------------------------------------

STRANGE = {
    "diffusers": {
        f"unet.{MODULE}.lora_B.bias": (8,),
        f"unet.{MODULE}.hada_w1_a": (8, 2),
        f"unet.{PROCESSOR}.to_q_lora.down.bias": (2,),
    },
    "kohya": {
        f"{FLAT}.lora_mid.weight": (2, 2, 3, 3),
        f"{FLAT}.hada_w1_a": (8, 2),
        f"{FLAT}.lokr_w1": (2, 2),
        "lora_other_layer.lora_down.weight": (2, 8),
    },
}


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name, keys in STRANGE.items() for key in keys]
)
def test_nothing_is_dropped_without_a_word(path, name, key):
    form = FORMATS[name]
    form.save(path, wrapped(), names=NAMES)
    tensors = {**numpy_files.load_file(path), key: numbers(*STRANGE[name][key])}
    written(path, tensors)
    with pytest.raises(CheckpointError, match="does not support"):
        form.load(path, params(), names=NAMES)
    assert any(key in problem for problem in form.preview(path, params(), names=NAMES).problems)


def test_two_tensors_for_one_place_are_refused(path):
    diffusers.save(path, wrapped("to_q"), names=NAMES)
    second = f"unet.{MODULE}.lora.down.weight"
    written(path, {**numpy_files.load_file(path), second: numbers(2, 8)})
    with pytest.raises(CheckpointError, match=f"'{second}'.* does not support"):
        diffusers.load(path, params(), names=NAMES)


@pytest.mark.parametrize("name", FORMATS)
def test_a_half_of_an_adapter_is_refused(path, name):
    form = FORMATS[name]
    form.save(path, wrapped("to_q"), names=NAMES)
    tensors = numpy_files.load_file(path)
    (up,) = (key for key in tensors if "lora_B" in key or "lora_up" in key)
    del tensors[up]
    with pytest.raises(CheckpointError, match="does not support"):
        form.load(written(path, tensors), params(), names=NAMES)


def test_errors_name_the_keys_of_the_file(form, path):
    form.save(path, wrapped("to_q"), names=NAMES)
    key = next(key for key in numpy_files.load_file(path) if "A" in key or "down" in key)
    tensors = {**numpy_files.load_file(path), key: numbers(2, 5)}
    with pytest.raises(CheckpointError, match=rf"'{key}' has shape \(2, 5\)"):
        form.load(written(path, tensors), params(), names=NAMES)


def test_a_module_without_a_place_is_refused(form, path):
    form.save(path, wrapped("to_q|to_out"), names=NAMES)
    names = [rule for rule in NAMES if "to_out" not in rule.path]
    with pytest.raises(CheckpointError, match="has no place"):
        form.load(path, params(), names=names)


def test_magnitudes_of_inputs_are_refused(path):
    kohya.save(path, wrapped("to_q", dora=True), names=NAMES)
    tensors = numpy_files.load_file(path)
    tensors[f"{FLAT}.dora_scale"] = tensors[f"{FLAT}.dora_scale"].reshape(1, 8)
    with pytest.raises(CheckpointError, match=r"dora_scale' has shape \(1, 8\)"):
        kohya.load(written(path, tensors), params(), names=NAMES)


def test_weights_that_train_in_full_have_no_place(form, path):
    tree = wrapped()
    tree["down"]["time"]["bias"] = lora_jax.FullWeight(base=jnp.ones(8), value=jnp.ones(8))
    names = [*NAMES, Rule("down_blocks.0.resnets.1.time_emb_proj.bias", "down/time/bias")]
    with pytest.raises(CheckpointError, match="in full"):
        form.save(path, tree, names=names)
    assert not path.exists()


def test_single_rows_have_no_place(form, path):
    tree = lora_jax.wrap(wrapped("to_out"), {"to_q": {"rows": [1, 2]}})
    with pytest.raises(CheckpointError, match="changes single rows at 'mid/to_q/kernel'"):
        form.save(path, tree, names=NAMES)


def test_two_modules_of_one_name_are_refused(path):
    names = [Rule("a.b_c.weight", "mid/to_q/kernel"), Rule("a_b.c.weight", "mid/to_out/kernel")]
    with pytest.raises(ValueError, match="both are called 'a_b_c'"):
        kohya.save(path, wrapped("to_q|to_out"), names=names)


def test_files_that_are_none(form, path):
    with pytest.raises(CheckpointError, match="is not a file"):
        form.load(path, params(), names=NAMES)
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="is damaged"):
        form.load(path, params(), names=NAMES)


def test_what_is_there_is_replaced_if_asked_to(form, path, tmp_path):
    form.save(path, wrapped(), names=NAMES)
    with pytest.raises(CheckpointError, match="overwrite=True"):
        form.save(path, wrapped(), names=NAMES)
    form.save(path, wrapped("to_q"), names=NAMES, overwrite=True)
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    with pytest.raises(CheckpointError, match="not a file of safetensors"):
        form.save(other, wrapped(), names=NAMES, overwrite=True)
