"""The keys of files that other programs write for Stable Diffusion 1.5, all of them, as shapes."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models.unet import UNetConfig, diffusers_rules, shapes_of
from lora_jax.exchange import diffusers, kohya
from tests.exchange.image_loras import list_modules

numpy_files = pytest.importorskip("safetensors.numpy")

FOUND = json.loads(list_modules.FILE.read_text(encoding="utf-8"))
UNET, TEXT = FOUND["unet"], FOUND["text_encoder"]
RANK = 1


def factors(shape):
    """Returns the shapes of a module's two factors; a convolution's second one is of one pixel."""
    out, *rest = shape
    return (RANK, *rest), (out, RANK, *[1] * len(rest[1:]))


def in_transformer(name):
    return ".attentions." in name or name.startswith("mid_block.attentions.")


def in_convolutional_block(name):
    return any(part in name for part in (".resnets.", ".downsamplers.", ".upsamplers."))


# --- kohya-ss, sd-scripts, networks/lora.py: LoRANetwork ------------------------------------------

# `UNET_TARGET_REPLACE_MODULE`, and with `conv_dim` those of `..._CONV2D_3X3` too.
KOHYA = {
    "attention": in_transformer,
    "attention and convolutions": lambda name: in_transformer(name) or in_convolutional_block(name),
}


def kohya_keys(component, modules, chosen):
    keys = {}
    for name, shape in modules.items():
        if chosen(name):
            down, up = factors(shape)
            base = f"{component}_{name.replace('.', '_')}"
            keys |= {f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up}
            keys[f"{base}.alpha"] = ()
    return keys


# --- diffusers, examples/text_to_image/train_text_to_image_lora.py --------------------------------


def is_of_attention(name):
    return name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))


def diffusers_keys(form):
    keys = {}
    for name, shape in UNET.items():
        if is_of_attention(name):
            down, up = factors(shape)
            keys |= {form(name, "down", "A"): down, form(name, "up", "B"): up}
    return keys


def processor_key(name, direction, _):
    """Returns the key of version 0.18, `AttnProcsLayers` in `LoRAAttnProcessor`s."""
    attention, _, layer = name.partition(".to_")
    return f"unet.{attention}.processor.to_{layer.removesuffix('.0')}_lora.{direction}.weight"


DIFFUSERS = {
    "today": lambda name, _, letter: f"unet.{name}.lora_{letter}.weight",
    "before PEFT": lambda name, direction, _: f"unet.{name}.lora.{direction}.weight",
    "attention processors": processor_key,
}


@pytest.fixture(scope="module")
def unet():
    shapes = shapes_of(UNetConfig(sample_size=64, cross_attention_dim=768), jnp.bfloat16)
    return shapes, diffusers_rules(shapes)


def written(path, keys):
    tensors = {key: np.zeros(shape, np.float16) for key, shape in keys.items()}
    numpy_files.save_file(tensors, path)
    return path


@pytest.mark.parametrize("chosen", KOHYA)
def test_every_key_of_kohya_has_a_place(tmp_path, unet, chosen):
    shapes, rules = unet
    keys = kohya_keys("lora_unet", UNET, KOHYA[chosen])
    preview = kohya.preview(written(tmp_path / "file.safetensors", keys), shapes, names=rules)
    assert preview.problems == ()
    assert len(preview.rows) == len(keys) / 3


def test_keys_of_kohyas_text_encoder_are_named_or_carried_along(tmp_path, unet):
    shapes, rules = unet
    own = kohya_keys("lora_unet", UNET, in_transformer)
    text = {f"text_model.{name}": shape for name, shape in TEXT.items()}
    others = kohya_keys("lora_te", text, lambda name: True)
    path = written(tmp_path / "file.safetensors", own | others)
    assert len(kohya.preview(path, shapes, names=rules).problems) > 0
    assert set(kohya.other_tensors(path)) == set(others)


@pytest.mark.parametrize("form", DIFFUSERS)
def test_every_key_of_diffusers_has_a_place(tmp_path, unet, form):
    shapes, rules = unet
    keys = diffusers_keys(DIFFUSERS[form])
    preview = diffusers.preview(written(tmp_path / "file.safetensors", keys), shapes, names=rules)
    assert preview.problems == ()
    assert len(preview.rows) == len(keys) / 2


def test_every_module_is_one_of_this_network(unet):
    _, rules = unet
    assert set(UNET) <= {rule.name.removesuffix(".weight") for rule in rules}


def test_the_list_of_modules_is_what_diffusers_has():
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    assert list_modules.listed() == FOUND
