"""Files of adapters beside diffusers: one written here gives the same images there, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from experiments.models.unet import ImageModel, UNet, diffusers_rules
from lora_jax.exchange import diffusers as of_diffusers
from lora_jax.exchange import kohya
from tests.small_unets import UNETS, given, in_torch, written
from tests.trained import as_if_trained

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

FORMATS = {"diffusers": of_diffusers, "kohya": kohya}
# Two ranks, two scales, and every kind of layer: linear, one pixel, a window, with strides.
TARGETS = {
    "attn1|attn2|proj_in": {"rank": 4, "alpha": 2},
    "conv1|conv_shortcut|time_emb_proj|downsamplers_0": {"rank": 3, "alpha": 6},
}


@pytest.fixture(scope="module", params=UNETS)
def model(request, tmp_path_factory):
    folder = written(tmp_path_factory.mktemp("unet"), request.param)
    found = ImageModel.read(folder)
    return folder, UNet(found.config), found.params()


def wrapped(params, **settings):
    axes = {rule.path: rule.axes for rule in diffusers_rules(params) if rule.axes}
    return as_if_trained(lora_jax.wrap(params, TARGETS, axes=axes, **settings))


def predicted(network, tree):
    images, times, text = given()
    with jax.numpy_rank_promotion("allow"):
        return lora_jax.adapt(network.apply)({"params": tree}, images, jnp.asarray(times), text)


def loaded_there(folder, file):
    """Returns the model of diffusers with an adapter, as its pipelines load it."""
    theirs = diffusers.UNet2DConditionModel.from_pretrained(folder)
    loader = diffusers.loaders.StableDiffusionLoraLoaderMixin
    tensors, alphas, metadata = loader.lora_state_dict(
        str(file), unet_config=theirs.config, return_lora_metadata=True
    )
    loader.load_lora_into_unet(tensors, network_alphas=alphas, unet=theirs, metadata=metadata)
    return theirs


# diffusers leaves the magnitudes in files of kohya's scripts out.
@pytest.mark.parametrize(
    ("name", "dora"), [("diffusers", False), ("diffusers", True), ("kohya", False)]
)
def test_a_file_written_here_is_the_same_adapter_there(model, tmp_path, name, dora):
    folder, network, params = model
    tree, path = wrapped(params, dora=dora), tmp_path / "adapter.safetensors"
    FORMATS[name].save(path, tree, names=diffusers_rules(params))
    expected = predicted(network, tree)
    np.testing.assert_allclose(in_torch(loaded_there(folder, path), *given()), expected, atol=1e-4)
    # The premise: it does something.
    assert np.abs(expected - predicted(network, params)).max() > 0.1


def test_a_file_written_there_is_the_same_adapter_here(model, tmp_path):
    folder, network, params = model
    theirs = diffusers.UNet2DConditionModel.from_pretrained(folder)
    layers = ["to_q", "to_out.0", "conv1", "proj_in"]
    theirs.add_adapter(peft.LoraConfig(r=4, lora_alpha=6, target_modules=layers))
    torch.manual_seed(1)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    theirs.save_lora_adapter(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    tree = of_diffusers.load(path, params, names=diffusers_rules(params))
    np.testing.assert_allclose(predicted(network, tree), in_torch(theirs, *given()), atol=1e-4)
    assert np.abs(predicted(network, tree) - predicted(network, params)).max() > 0.1
