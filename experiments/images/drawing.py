"""Pictures that the U-Net draws, and how many of them are recognised."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

import lora_jax
from experiments.common.console import Console
from experiments.images.classifier import Judge
from experiments.images.options import DrawingOptions
from experiments.images.task import FOLDED, ImageTask, unfolded
from experiments.models.unet import Predict, UNet, sampled

DIGITS = tuple(range(10))


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Pictures of each digit, and how many of them are recognised as it.

    Attributes:
      pictures: (digits, pictures, side, side).
      recognised: the share of each digit's pictures.
    """

    pictures: NDArray[np.float32]
    recognised: Mapping[int, float]

    def mean_of(self, digits: Any) -> float:
        """Returns the mean share of these digits; not a number if there are none."""
        shares = [self.recognised[digit] for digit in digits]
        return float(np.mean(shares)) if shares else float("nan")


class Draftsman:
    """Draws the same noise with whatever weights it is given, compiled once for each structure."""

    def __init__(
        self, task: ImageTask, judge: Judge, options: DrawingOptions, *, seed: int
    ) -> None:
        self._task, self._judge, self._options = task, judge, options
        shape = (options.drawn, *FOLDED)
        self._noise = np.random.default_rng((seed, 5)).standard_normal(shape, np.float32)
        predict = lora_jax.adapt(UNet(task.config).apply)

        def draw(tree: Any, noise: Any, text: Any) -> Any:
            return self._sampled(lambda *given: predict({"params": tree}, *given), noise, text)

        self._draw = jax.jit(draw)

    def drawn(self, tree: Any, console: Console, *, description: str) -> Drawn:
        """Returns pictures of all digits."""
        pictures, recognised = [], {}
        with console.progress(description, len(DIGITS)) as progress:
            for digit in DIGITS:
                text = self._task.captions.to_draw([digit] * self._options.drawn)
                found = unfolded(np.asarray(self._draw(tree, self._noise, text)))
                recognised[digit] = float(np.mean(self._judge.digits(found) == digit))
                pictures.append(found[..., 0])
                progress.advance()
        return Drawn(np.stack(pictures), recognised)

    def drawn_in_one_batch(self, trees: list[Any], digits: list[int]) -> NDArray[np.float32]:
        """Returns a picture of each digit, each drawn with the adapter of the same place.

        The adapters are in one bank, and each row of the batch names its own.
        """
        network = UNet(self._task.config)
        served = lora_jax.serving.adapt(
            lambda params, images, times, text: network.apply(
                {"params": params}, images, times, text
            )
        )
        # Guidance predicts with each caption and without it, in one batch.
        ids = np.tile(np.arange(len(digits)), 1 if self._options.guidance == 1 else 2)
        noise = np.repeat(self._noise[:1], len(digits), axis=0)
        text = self._task.captions.to_draw(digits)

        def draw(bank: Any, noise: Any, text: Any) -> Any:
            return self._sampled(lambda *given: served(bank, ids, *given), noise, text)

        drawn = jax.jit(draw)(lora_jax.serving.bank(trees), noise, text)
        return unfolded(np.asarray(drawn))[..., 0]

    def drawn_alone(self, tree: Any, digit: int) -> NDArray[np.float32]:
        """Returns the picture that `drawn_in_one_batch` draws of a digit, drawn by itself."""
        text = self._task.captions.to_draw([digit])
        return unfolded(np.asarray(self._draw(tree, self._noise[:1], text)))[0, ..., 0]

    def _sampled(self, predict: Predict, noise: Any, text: Any) -> Any:
        return sampled(
            predict,
            noise,
            text,
            self._task.schedule,
            steps=self._options.sampling_steps,
            guidance=self._options.guidance,
            empty=self._task.captions.empty,
        )


def at_strength(wrapped: Any, strength: float) -> Any:
    """Returns the tree with its adapters' scales multiplied; nothing compiles again for it."""

    def scaled(node: Any) -> Any:
        if not isinstance(node, lora_jax.LoRAWeight):
            return node
        return dataclasses.replace(node, scale=node.scale * np.float32(strength))

    return jax.tree.map(scaled, wrapped, is_leaf=lambda node: isinstance(node, lora_jax.LoRAWeight))
