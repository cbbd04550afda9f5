"""The U-Net and its sampler beside diffusers': shapes of Stable Diffusion, cut down."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models.unet import ImageModel, Schedule, UNet, sampled, save_unet
from tests.small_unets import UNETS, given, in_torch, torch_unet, written

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module", params=UNETS)
def folder(request, tmp_path_factory):
    return request.param, written(tmp_path_factory.mktemp("unet"), request.param)


@pytest.fixture(scope="module")
def model(folder):
    found = ImageModel.read(folder[1])
    return found, found.params()


def test_predictions(folder, model):
    found, params = model
    images, times, text = given()
    expected = in_torch(torch_unet(folder[0]), images, times, text)
    ours = UNet(found.config).apply({"params": params}, images, jnp.asarray(times), text)
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_gradients_of_every_parameter(folder, model):
    found, params = model
    images, times, text = given()
    theirs = torch_unet(folder[0])
    arguments = (torch.as_tensor(images).permute(0, 3, 1, 2), torch.as_tensor(times))
    theirs(*arguments, torch.as_tensor(text)).sample.square().mean().backward()
    gradients = {name: each.grad.numpy() for name, each in theirs.named_parameters()}

    def loss(params):
        predicted = UNet(found.config).apply({"params": params}, images, jnp.asarray(times), text)
        return jnp.mean(predicted**2)

    from experiments.models.unet import diffusers_rules
    from lora_jax.exchange import place

    ours = jax.grad(loss)(params)
    expected = place(gradients, ours, names=diffusers_rules(ours))
    for leaf, its_other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, its_other, atol=1e-4)


def test_a_folder_that_diffusers_reads(folder, model, tmp_path):
    found, params = model
    save_unet(tmp_path / "again", params, found.config)
    again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "again").state_dict()
    for name, tensor in torch_unet(folder[0]).state_dict().items():
        np.testing.assert_array_equal(again[name].numpy(), tensor.numpy())


SCHEDULES = {
    "linear": {"beta_schedule": "linear"},
    "Stable Diffusion": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    },
    "velocity": {"beta_schedule": "linear", "prediction_type": "v_prediction"},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_and_targets(name):
    settings = SCHEDULES[name]
    ours = Schedule(**settings)
    names = {"beta_schedule", "beta_start", "beta_end", "prediction_type"}
    theirs = diffusers.DDPMScheduler(
        clip_sample=False, **{name: value for name, value in settings.items() if name in names}
    )
    images, times, _ = given()
    noise = np.random.default_rng(3).standard_normal(images.shape).astype(np.float32)
    arrays = [torch.as_tensor(each) for each in (images, noise, times)]
    np.testing.assert_allclose(
        ours.noised(images, noise, jnp.asarray(times)), theirs.add_noise(*arrays), atol=1e-5
    )
    expected = noise if ours.prediction_type == "epsilon" else theirs.get_velocity(*arrays)
    np.testing.assert_allclose(ours.target(images, noise, jnp.asarray(times)), expected, atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_way_back_step_by_step(name):
    ours = Schedule(**SCHEDULES[name])
    theirs = diffusers.DDIMScheduler(clip_sample=False, **SCHEDULES[name])
    theirs.set_timesteps(7)
    np.testing.assert_array_equal(ours.times_back(7), theirs.timesteps)
    images, _, _ = given()
    found, expected = jnp.asarray(images), torch.as_tensor(images)
    for number, time in enumerate(theirs.timesteps):
        predicted = np.random.default_rng(number).standard_normal(images.shape).astype(np.float32)
        found = ours.step_back(found, jnp.asarray(predicted), jnp.asarray(int(time)), 7)
        expected = theirs.step(torch.as_tensor(predicted), time, expected).prev_sample
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_samples_with_guidance(folder, model):
    found, params = model
    images, _, text = given()
    empty = np.random.default_rng(2).standard_normal((1, 5, 16)).astype(np.float32)
    theirs, scheduler = torch_unet(folder[0]), diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(4)
    expected = images
    for time in scheduler.timesteps:
        times = np.full(2, int(time))
        with_text = in_torch(theirs, expected, times, text)
        without = in_torch(theirs, expected, times, np.repeat(empty, 2, axis=0))
        predicted = torch.as_tensor(without + 3 * (with_text - without))
        expected = scheduler.step(predicted, time, torch.as_tensor(expected)).prev_sample.numpy()

    def predict(images, times, text):
        return UNet(found.config).apply({"params": params}, images, times, text)

    ours = sampled(
        predict,
        jnp.asarray(images),
        jnp.asarray(text),
        Schedule(),
        steps=4,
        guidance=3.0,
        empty=jnp.asarray(empty),
    )
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())
