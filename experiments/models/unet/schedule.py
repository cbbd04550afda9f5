"""Noise schedules, and the way back from noise to an image.

The names of settings are those of diffusers' `scheduler_config.json`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from experiments.models.unet.layers import Image, Text

Predict = Callable[[Image, Int[Array, " batch"], Text], Image]


@dataclasses.dataclass(frozen=True)
class Schedule:
    r"""How much noise an image has at each time.

    $x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1 - \bar\alpha_t}\,\epsilon$

    Attributes:
      num_train_timesteps: the number of times.
      beta_start: the variance of the noise that the first step adds.
      beta_end: that of the last one.
      beta_schedule: how it grows: `"linear"`, or `"scaled_linear"`, in which its root grows evenly.
      prediction_type: what a model predicts: `"epsilon"`, the noise, or `"v_prediction"`,
        $\sqrt{\bar\alpha_t}\,\epsilon - \sqrt{1 - \bar\alpha_t}\,x_0$ (Salimans and Ho, 2022).
      steps_offset: what is added to the times of the way back.
      set_alpha_to_one: whether the way back ends without noise, and not with that of time 0.

    Source: Ho et al., Denoising Diffusion Probabilistic Models, 2020, equation 4.
    """

    num_train_timesteps: int = 1_000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: Literal["linear", "scaled_linear"] = "linear"
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    steps_offset: int = 0
    set_alpha_to_one: bool = True

    @property
    def signal(self) -> Float[Array, " times"]:
        r"""$\bar\alpha_t$ of each time: the share of an image's variance that is left."""
        start, end, count = self.beta_start, self.beta_end, self.num_train_timesteps
        if self.beta_schedule == "linear":
            betas = jnp.linspace(start, end, count, dtype=jnp.float32)
        else:
            betas = jnp.linspace(start**0.5, end**0.5, count, dtype=jnp.float32) ** 2
        return jnp.cumprod(1 - betas)

    def noised(self, images: Image, noise: Image, times: Int[Array, " batch"]) -> Image:
        """Returns images with the noise of their times."""
        kept, added = self._shares(times)
        return kept * images + added * noise

    def target(self, images: Image, noise: Image, times: Int[Array, " batch"]) -> Image:
        """Returns what a model should predict of noised images."""
        if self.prediction_type == "epsilon":
            return noise
        kept, added = self._shares(times)
        return kept * noise - added * images

    def times_back(self, steps: int) -> Int[Array, " steps"]:
        """Returns the times of the way back, evenly spread, the noisiest first."""
        if not 1 <= steps <= self.num_train_timesteps:
            raise ValueError(
                f"`steps` is {steps}; expected 1 to {self.num_train_timesteps}, the times of the "
                "schedule."
            )
        stride = self.num_train_timesteps // steps
        return jnp.arange(steps - 1, -1, -1, dtype=jnp.int32) * stride + self.steps_offset

    def step_back(self, images: Image, predicted: Image, time: Int[Array, ""], steps: int) -> Image:
        r"""Returns images with the noise of the time before, without new noise.

        $x_s = \sqrt{\bar\alpha_s}\,\hat x_0 + \sqrt{1 - \bar\alpha_s}\,\hat\epsilon$

        Args:
          images: the images at `time`.
          predicted: what the model predicts of them.
          time: the time.
          steps: the number of steps of the way back.

        Source: Song et al., Denoising Diffusion Implicit Models, 2021, equation 12 with no noise.
        """
        signal = self.signal
        before = time - self.num_train_timesteps // steps
        last = jnp.float32(1.0) if self.set_alpha_to_one else signal[0]
        own = signal[time]
        next_signal = jnp.where(before >= 0, signal[jnp.maximum(before, 0)], last)
        if self.prediction_type == "epsilon":
            noise = predicted
            clean = (images - jnp.sqrt(1 - own) * noise) / jnp.sqrt(own)
        else:
            clean = jnp.sqrt(own) * images - jnp.sqrt(1 - own) * predicted
            noise = jnp.sqrt(own) * predicted + jnp.sqrt(1 - own) * images
        return jnp.sqrt(next_signal) * clean + jnp.sqrt(1 - next_signal) * noise

    def _shares(self, times: Int[Array, " batch"]) -> tuple[Array, Array]:
        """Returns how much of an image and how much noise there is at each time."""
        own = self.signal[times][:, None, None, None]
        return jnp.sqrt(own), jnp.sqrt(1 - own)


def sampled(
    predict: Predict,
    noise: Image,
    text: Text,
    schedule: Schedule,
    *,
    steps: int,
    guidance: float = 1.0,
    empty: Text | None = None,
) -> Image:
    r"""Returns the images that a model makes of noise, without drawing anything.

    With guidance g, the prediction is that without text, plus g times what the text changes:
    $\epsilon_\emptyset + g\,(\epsilon_{text} - \epsilon_\emptyset)$.

    Args:
      predict: the model, `(images, times, text) -> prediction`.
      noise: what it begins with.
      text: the encoded text of each image.
      schedule: the noise that it was trained with.
      steps: how often it is called.
      guidance: how much more it follows the text than no text.
      empty: the encoded empty text, (1, tokens, text); needed unless `guidance` is 1.

    Source: Song et al. 2021; Ho and Salimans, Classifier-Free Diffusion Guidance, 2022, equation 6.
    """
    is_guided = guidance != 1.0
    if is_guided and empty is None:
        raise ValueError(f"`guidance` is {guidance} and `empty` is None; expected the empty text.")

    def predicted(images: Image, time: Any) -> Image:
        times = jnp.full(len(images), time)
        if not is_guided:
            return predict(images, times, text)
        without = jnp.broadcast_to(empty, text.shape)
        # One call for both, as one batch.
        images, times = (jnp.concatenate([each, each]) for each in (images, times))
        both = predict(images, times, jnp.concatenate([without, text]))
        unconditional, conditional = jnp.split(both, 2)
        return unconditional + guidance * (conditional - unconditional)

    def step(images: Image, time: Any) -> tuple[Image, None]:
        return schedule.step_back(images, predicted(images, time), time, steps), None

    return jax.lax.scan(step, noise, schedule.times_back(steps))[0]
