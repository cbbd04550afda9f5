"""Soft prompts in the files of PEFT's prompt tuning: vectors that come before a text's own."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_jax._folders import CheckpointError, undisturbed
from lora_jax._processes import on_host
from lora_jax.exchange.peft._files import (
    PROMPT_TUNING,
    check_finite,
    read_any_config,
    read_tensors,
    safetensors_package,
    write_adapter,
)

_KEY = "prompt_embeddings"
_DEFAULTS = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "num_transformer_submodules": 1,
    "prompt_tuning_init": "RANDOM",
    "revision": None,
    "task_type": None,
}


def load_prompt(path: str | os.PathLike[str]) -> Float[Array, "tokens width"]:
    """Reads the soft prompt of a folder that PEFT's prompt tuning has written.

    An encoder-decoder's folder may have vectors for the decoder, which PEFT does not use; they are
    left out.

    Args:
      path: the folder with `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
      The vectors that come before the embeddings of a text, in the dtype of the file.

    Raises:
      CheckpointError: there is no such folder, it is damaged, or it holds something else.
      ImportError: safetensors is not installed.

    Source: Lester et al., The Power of Scale for Parameter-Efficient Prompt Tuning, 2021; Hugging
    Face PEFT, `PromptTuningConfig`.

    Examples:
      >>> import jax.numpy as jnp, tempfile
      >>> from lora_jax.exchange import peft
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     peft.save_prompt(folder, jnp.ones((20, 8)))
      ...     peft.load_prompt(folder).shape
      (20, 8)
    """
    source = Path(path)
    config, tensors = undisturbed(source, lambda: (read_any_config(source), read_tensors(source)))
    found = config.get("peft_type")
    if found != PROMPT_TUNING:
        raise CheckpointError(
            f"`path` {source} has `peft_type` {found!r}; expected {PROMPT_TUNING!r}."
            + (" An adapter is read by `load`." if found == "LORA" else "")
        )
    others = sorted(set(tensors) - {_KEY})
    if _KEY not in tensors or others:
        raise CheckpointError(
            f"`path` {source} holds {', '.join(sorted(tensors)) or 'no tensors'}; expected "
            f"'{_KEY}' alone."
        )
    prompt, count = tensors[_KEY], config.get("num_virtual_tokens")
    if not isinstance(count, int) or prompt.ndim != 2 or len(prompt) not in (count, 2 * count):
        raise CheckpointError(
            f"`path` {source} holds '{_KEY}' of shape {prompt.shape}; expected "
            f"(num_virtual_tokens, width) with num_virtual_tokens {count!r}."
        )
    return jnp.asarray(prompt[:count])


def save_prompt(
    path: str | os.PathLike[str],
    prompt: Float[Array, "tokens width"],
    *,
    config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a soft prompt as a folder that PEFT's prompt tuning loads.

    The folder appears when it is complete; one that it replaces stays until then. All processes of
    a program call `save_prompt`, and the first one writes.

    Args:
      path: the folder to write; its parents are created.
      prompt: the vectors that come before the embeddings of a text.
      config: keys to write beside those that follow from `prompt`, such as
        `base_model_name_or_path` and `task_type`.
      overwrite: whether to replace an adapter that is already at `path`.

    Raises:
      CheckpointError: `prompt` is not a matrix or not finite, or `path` is taken or can't be
        written.
      ImportError: safetensors is not installed.

    Source: as for `load_prompt`.

    Examples:
      >>> import jax.numpy as jnp, pathlib, tempfile
      >>> from lora_jax.exchange import peft
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     peft.save_prompt(folder, jnp.ones((20, 8)), config={"task_type": "CAUSAL_LM"})
      ...     sorted(file.name for file in pathlib.Path(folder).iterdir())
      ['adapter_config.json', 'adapter_model.safetensors']
    """
    destination = Path(path).resolve()
    safetensors_package()
    if np.ndim(prompt) != 2:
        raise CheckpointError(
            f"`prompt` has the shape {np.shape(prompt)}; expected (tokens, width)."
        )
    values = on_host(prompt)
    check_finite("`prompt`", _KEY, values)
    tokens, width = values.shape
    own = {"peft_type": PROMPT_TUNING, "num_virtual_tokens": tokens, "token_dim": width}
    content = {**_DEFAULTS, **(config or {}), **own}
    write_adapter(destination, {_KEY: values}, content, overwrite=overwrite)
