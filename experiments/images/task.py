"""Pictures of digits with captions: what the base learns, and what is held out."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.typing import NDArray

from experiments.common.errors import InputError
from experiments.data.dataset import Dataset, Split
from experiments.data.images import IMAGE_SIDE
from experiments.images.options import Options
from experiments.models.bert import BertEncoder, Encoder
from experiments.models.unet import Schedule, UNetConfig

SIDE = 32
_MARGIN = (SIDE - IMAGE_SIDE) // 2
# So many pixels along each side are the channels of one place: a quarter of the work.
_FOLD = 2
_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# The first is what pictures are drawn from; the others are seen in training too.
_CAPTIONS = (
    "a handwritten digit {name}",
    "the number {name}, written by hand",
    "a picture of a {name}",
)

Pictures = Float[np.ndarray, "pictures side side one"]
# What the U-Net reads and draws.
Folded = Float[np.ndarray, "pictures places places channels"]
FOLDED = (SIDE // _FOLD, SIDE // _FOLD, _FOLD**2)


@dataclass(frozen=True)
class Captions:
    """Captions as the frozen encoder has them.

    Attributes:
      encoded: a vector for each token of each digit's captions.
      empty: the same of a caption without a word.
    """

    encoded: Float[Array, "digits captions tokens width"]
    empty: Float[Array, "1 tokens width"]

    @classmethod
    def of(cls, encoder: Encoder) -> "Captions":
        """Encodes the captions of all digits, filled up to one length."""
        texts = [caption.format(name=name) for name in _NAMES for caption in _CAPTIONS]
        vectors = _encoded(encoder, [*texts, ""])
        shape = (len(_NAMES), len(_CAPTIONS), *vectors.shape[1:])
        return cls(vectors[:-1].reshape(shape), vectors[-1:])

    @property
    def width(self) -> int:
        return int(self.encoded.shape[-1])

    def to_draw(self, digits: Any) -> Float[Array, "pictures tokens width"]:
        """Returns the caption that each of these digits is drawn from."""
        return self.encoded[jnp.asarray(digits), 0]


@dataclass(frozen=True)
class ImageTask:
    """Pictures between -1 and 1, and the encoded captions of their digits.

    Attributes:
      pictures: those to learn from.
      labels: their digits.
      test: those of the test set, for the classifier.
      test_labels: their digits.
      captions: the captions of each digit.
      config: the settings of the U-Net.
      schedule: the noise.
    """

    pictures: Pictures
    labels: Int[np.ndarray, " pictures"]
    test: Pictures
    test_labels: Int[np.ndarray, " tests"]
    captions: Captions
    config: UNetConfig
    schedule: Schedule

    def of_digits(self, digits: Any) -> NDArray[np.intp]:
        """Returns the numbers of the pictures of these digits."""
        return np.flatnonzero(np.isin(self.labels, digits))

    def few_of(self, digit: int, count: int, *, seed: int) -> NDArray[np.intp]:
        """Returns the numbers of some pictures of a digit.

        Raises:
          InputError: there are fewer.
        """
        every = self.of_digits([digit])
        if count > len(every):
            raise InputError(f"--examples {count} is more than the {len(every)} there are")
        return np.random.default_rng((seed, digit)).permutation(every)[:count]


def image_task(dataset: Dataset, encoder: Encoder, options: Options) -> ImageTask:
    """Returns the task."""
    captions = Captions.of(encoder)
    return ImageTask(
        *_pictures(dataset.train),
        *_pictures(dataset.test),
        captions,
        unet_config(options.base.channels, captions.width),
        Schedule(prediction_type="v_prediction"),
    )


def unet_config(channels: tuple[int, ...], text_width: int) -> UNetConfig:
    """Returns the settings of a small U-Net: attention at all resolutions but the finest."""
    coarser = len(channels) - 1
    return UNetConfig(
        sample_size=FOLDED[0],
        in_channels=FOLDED[-1],
        out_channels=FOLDED[-1],
        block_out_channels=channels,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * coarser),
        up_block_types=(*("CrossAttnUpBlock2D",) * coarser, "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(4,) * len(channels),
        cross_attention_dim=text_width,
        norm_num_groups=8,
    )


def _pictures(split: Split) -> tuple[Pictures, NDArray[np.int32]]:
    images = split.inputs.reshape(-1, IMAGE_SIDE, IMAGE_SIDE)
    padded = np.pad(images, ((0, 0), (_MARGIN, _MARGIN), (_MARGIN, _MARGIN)))
    return (padded[..., None].astype(np.float32) / 127.5 - 1), split.labels


def folded(pictures: Pictures) -> Folded:
    """Returns pictures with squares of pixels as channels; noise stays independent."""
    places, _, channels = FOLDED
    squares = pictures.reshape(-1, places, _FOLD, places, _FOLD)
    return squares.swapaxes(2, 3).reshape(-1, places, places, channels)


def unfolded(drawn: Folded) -> Pictures:
    """Returns the pictures that `folded` makes these of."""
    squares = drawn.reshape(-1, *FOLDED[:2], _FOLD, _FOLD)
    return squares.swapaxes(2, 3).reshape(-1, SIDE, SIDE, 1)


def _encoded(encoder: Encoder, texts: list[str]) -> Float[Array, "texts tokens width"]:
    """Returns a vector for each token; those that fill a text up are zero."""
    tokens = encoder.tokenizer(max_length=16).unlabelled(texts).token_ids
    width = max(map(len, tokens))
    ids, mask = np.zeros((len(texts), width), np.int32), np.zeros((len(texts), width), bool)
    for row, own in enumerate(tokens):
        ids[row, : len(own)], mask[row, : len(own)] = own, True
    hidden = BertEncoder(encoder.config).apply({"params": encoder.params}, ids, mask)
    return jnp.where(mask[..., None], hidden, 0.0)
