"""A pretrained U-Net: a folder in diffusers' format, its settings and its weights."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.common.errors import InputError, as_input_error
from experiments.models.shapes import param_shapes
from experiments.models.unet.config import UNetConfig, read_config
from experiments.models.unet.model import UNet
from experiments.models.unet.names import diffusers_rules
from lora_jax.exchange import huggingface, place

_CONFIG = "config.json"


@dataclasses.dataclass(frozen=True)
class ImageModel:
    """A U-Net on the disk; its weights are read when they are asked for.

    Attributes:
      path: a folder in diffusers' format: `config.json` and safetensors.
      config: its settings.
    """

    path: Path
    config: UNetConfig

    @classmethod
    def read(cls, path: Path) -> "ImageModel":
        """Reads the settings of a folder.

        Raises:
          InputError: it is not one, or asks for what this model does not compute.
        """
        if not (path / _CONFIG).is_file():
            raise InputError(f"{path} has no {_CONFIG}; expected a U-Net in diffusers' format")
        return cls(path, read_config(path / _CONFIG))

    def params(self, *, convert: Callable[[str, Any], Any] | None = None) -> Any:
        """Returns its weights as parameters of `UNet(config)`, read leaf by leaf.

        Raises:
          InputError: a tensor is missing, left over or of another shape; it is named.
        """
        shapes = shapes_of(self.config)
        with as_input_error(), huggingface.tensors(self.path) as tensors:
            return place(tensors, shapes, names=diffusers_rules(shapes), convert=convert)


def shapes_of(config: UNetConfig, dtype: Any = jnp.float32) -> Any:
    """Returns the shapes of the parameters of a U-Net."""
    side = config.sample_size
    arguments = (
        jax.ShapeDtypeStruct((1, side, side, config.in_channels), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
        jax.ShapeDtypeStruct((1, 1, config.cross_attention_dim), jnp.float32),
    )
    return param_shapes(UNet(config), *arguments, dtype=dtype)


def save_unet(path: Path, params: Any, config: UNetConfig, *, overwrite: bool = False) -> None:
    """Writes a folder in diffusers' format, adapters merged.

    Args:
      path: the folder to write.
      params: the parameters, plain or wrapped.
      config: the settings.
      overwrite: whether to replace what is there.
    """
    shapes = shapes_of(config)
    huggingface.save(
        path,
        params,
        names=diffusers_rules(shapes),
        config=config.entries(),
        stem="diffusion_pytorch_model",
        overwrite=overwrite,
    )
