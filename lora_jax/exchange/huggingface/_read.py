"""Reading the weights of a folder, each when it is needed."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from lora_jax.exchange._safetensors import Tensors, opened


@contextlib.contextmanager
def tensors(path: str | os.PathLike[str]) -> Iterator[Tensors]:
    """Gives the tensors of a model by name, none of which is read before it is needed.

    `exchange.place` reads those of one leaf at a time, so that a model larger than the host's
    memory goes onto its devices, where a function of it may quantise each leaf on the way.

    Args:
      path: the folder, with one file or several with an index; or one file of safetensors.

    Returns:
      A context, in which the mapping from names to tensors can be read: a tensor has a shape and a
      dtype, and `np.asarray` reads it.

    Raises:
      CheckpointError: there is no such file, it is damaged, or the index names what is not there.
      ImportError: safetensors is not installed.

    Source: Hugging Face, safetensors, "Format".

    Examples:
      >>> import jax, jax.numpy as jnp, lora_jax, numpy as np, pathlib, safetensors.numpy, tempfile
      >>> from lora_jax.exchange import huggingface, peft, place
      >>> shapes = {"kernel": jax.ShapeDtypeStruct((4, 3), jnp.bfloat16)}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "model.safetensors")
      ...     safetensors.numpy.save_file({"dense.weight": np.ones((3, 4), np.float32)}, path)
      ...     with huggingface.tensors(folder) as tensors:
      ...         params = place(tensors, shapes, names=[peft.Rule("dense.weight", "kernel")])
      >>> params["kernel"].shape, params["kernel"].dtype
      ((4, 3), dtype(bfloat16))
    """
    with opened(Path(path), reader="lora_jax.exchange.huggingface") as found:
        yield found
