"""The two files of an adapter: its config and its tensors, read without PyTorch and pickle."""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._folders import (
    CheckpointError,
    as_checkpoint_error,
    check_destination,
    complete_folder,
    interruption_hint,
    undisturbed,
)
from lora_jax._paths import listed
from lora_jax._processes import on_first_process

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PROMPT_TUNING = "PROMPT_TUNING"
_PICKLE_FILE = "adapter_model.bin"

# PEFT's own defaults, for what a config leaves out.
_DEFAULT_RANK = 8
_DEFAULT_ALPHA = 8

_NOT_SUPPORTED = {
    "alora_invocation_tokens": "aLoRA, which turns the adapter on in the middle of a text",
    "arrow_config": "Arrow, which routes between adapters",
    "kasa_config": "KaSA, which changes the base and has a diagonal between the factors",
    "layer_replication": "layers that are repeated",
    "lora_bias": "a bias of lora_B",
    "megatron_config": "layers of Megatron",
    "monteclora_config": "MonteCLoRA, which samples weights",
    "use_bdlora": "BD-LoRA's block-diagonal factors",
    "use_qalora": "QALoRA, which pools the inputs",
    "velora_config": "VeLoRA's compressed activations",
}
_BASE_CHANGING = ("pissa", "olora", "corda", "lora_ga", "loftq")

# Which tokens have rows of their own: a list for the input embedding, or one for each module.
ROWS_KEY = "trainable_token_indices"

Tensors = dict[str, np.ndarray]


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the config of a PEFT adapter, including what lora_jax has no use for.

    It is only data: no class or module that it names is imported. To write the adapter again, pass
    it to `save(..., config=...)`.

    Args:
      path: the folder with `adapter_config.json`.

    Returns:
      The config, as it is in the file.

    Raises:
      CheckpointError: there is no such file, it is damaged, or it asks for something that lora_jax
        does not support, which the message names.

    Examples:
      >>> import json, pathlib, tempfile
      >>> from lora_jax.exchange import peft
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     config = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "bert-base-cased"}
      ...     _ = pathlib.Path(folder, "adapter_config.json").write_text(json.dumps(config))
      ...     peft.read_config(folder)["base_model_name_or_path"]
      'bert-base-cased'
    """
    file = Path(path) / CONFIG_FILE
    config = read_any_config(Path(path))
    with as_checkpoint_error(f"{file} is damaged, take another copy"):
        check_supported(config, str(file))
        check_types(config, str(file))
    return config


def read_any_config(source: Path) -> dict[str, Any]:
    """Returns the config in a folder, of whatever PEFT has trained."""
    file = source / CONFIG_FILE
    with as_checkpoint_error(f"`path` {source} can't be read"):
        if not file.is_file():
            raise CheckpointError(_no_adapter(source))
    with as_checkpoint_error(f"{file} is damaged, take another copy"):
        config = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{file} is damaged, take another copy: it holds a {type(config).__name__}; expected "
            "an object."
        )
    return config


def check_supported(config: Mapping[str, Any], subject: str) -> None:
    """Raises if a config asks for what lora_jax does not support."""
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        hint = " A soft prompt is read by `load_prompt`." if peft_type == PROMPT_TUNING else ""
        raise CheckpointError(
            f"{subject} has `peft_type` {peft_type!r}; lora_jax supports 'LORA'.{hint}"
        )
    for key, meaning in _NOT_SUPPORTED.items():
        if config.get(key):
            raise CheckpointError(
                f"{subject} has `{key}` {config[key]!r}: {meaning}. lora_jax does not support that."
            )
    init = config.get("init_lora_weights", True)
    if changes_base(init):
        raise CheckpointError(
            f"{subject} has `init_lora_weights` {init!r}, so that its factors belong to a base "
            "that this initialisation changed. Convert them to the original base in PEFT: "
            "model.save_pretrained(path, path_initial_model_for_weight_conversion=...)."
        )


def changes_base(init: Any) -> bool:
    """Says whether PEFT changes the base weights where `init_lora_weights` has this value."""
    return isinstance(init, str) and init.lower().startswith(_BASE_CHANGING)


def check_types(config: Mapping[str, Any], subject: str) -> None:
    """Raises if what lora_jax reads of a config has the wrong type."""
    for key, value in (*_patterns(config, "rank_pattern"), ("r", config.get("r", _DEFAULT_RANK))):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(
                f"{subject} has the rank {value!r} for {key!r}; expected a whole number of at "
                "least 1."
            )
    alphas = (*_patterns(config, "alpha_pattern"), ("lora_alpha", _alpha(config)))
    for key, value in alphas:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise CheckpointError(
                f"{subject} has the alpha {value!r} for {key!r}; expected a finite number."
            )
    version = config.get("peft_version")
    if not isinstance(version, str | None):
        raise CheckpointError(f"{subject} has `peft_version` {version!r}; expected text.")
    rows = config.get(ROWS_KEY)
    for numbers in rows.values() if isinstance(rows, dict) else [rows or []]:
        is_list = isinstance(numbers, list)
        if not is_list or any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
            raise CheckpointError(
                f"{subject} has `{ROWS_KEY}` {rows!r}; expected a list of whole numbers, or one "
                "for each module."
            )
    for key in ("target_parameters", "modules_to_save"):
        value = config.get(key) or []
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise CheckpointError(f"{subject} has `{key}` {value!r}; expected a list of names.")


def rank_of(config: Mapping[str, Any], name: str) -> int:
    """Returns the rank that PEFT gives the adapter of a module, or of a parameter."""
    rank: int = _by_pattern(config, "rank_pattern", name, config.get("r", _DEFAULT_RANK))
    return rank


def scale_of(config: Mapping[str, Any], name: str, rank: int) -> float:
    r"""Returns $\alpha / r$, or $\alpha / \sqrt r$ under rsLoRA, as PEFT computes it."""
    alpha: float = _by_pattern(config, "alpha_pattern", name, _alpha(config))
    return alpha / rank_divisor(config, rank)


def rank_divisor(config: Mapping[str, Any], rank: int) -> float:
    """Returns what PEFT divides alpha by."""
    return math.sqrt(rank) if config.get("use_rslora") else float(rank)


def is_target_parameter(config: Mapping[str, Any], name: str) -> bool:
    """Says whether a config adapts a parameter as such, rather than as a module's weight."""
    targets = config.get("target_parameters") or []
    return any(name == target or name.endswith(f".{target}") for target in targets)


def read_adapter(source: Path, peft_version: str | None) -> tuple[dict[str, Any], Tensors]:
    """Returns the config and the tensors of the adapter in a folder, both of one version of it.

    If a version of PEFT is given, it replaces the one in the config.
    """
    if not isinstance(peft_version, str | None):
        raise TypeError(f"`peft_version` is {peft_version!r}; expected text, such as '0.17.1'.")
    config, tensors = undisturbed(source, lambda: (read_config(source), read_tensors(source)))
    return (config if peft_version is None else {**config, "peft_version": peft_version}), tensors


def read_tensors(source: Path) -> Tensors:
    """Returns the tensors of the adapter in a folder, in the dtypes of the file."""
    file = source / TENSORS_FILE
    with as_checkpoint_error(f"`path` {source} can't be read"):
        if not file.is_file():
            raise CheckpointError(_no_tensors(source))
    return read_file(file)[0]


def read_file(file: Path, module: str = "lora_jax.exchange.peft") -> tuple[Tensors, dict[str, str]]:
    """Returns the tensors of a file of safetensors, in the dtypes of the file, and its metadata.

    Args:
      file: the file, which is there.
      module: what needs it, for the error where safetensors is missing.

    Raises:
      CheckpointError: it is damaged, or holds what JAX would round or what is not finite.
    """
    safetensors = safetensors_package(module)
    with (
        as_checkpoint_error(f"{file} is damaged, take another copy"),
        safetensors.safe_open(file, framework="np") as opened,
    ):
        keys = opened.keys()
        tensors: Tensors = {key: opened.get_tensor(key) for key in keys}
        metadata = dict(opened.metadata() or {})
    for key, tensor in tensors.items():
        _check_readable(file, key, tensor)
    return tensors, metadata


def write_tensors(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors as PEFT's loader expects them."""
    from safetensors.numpy import save_file

    # What is not contiguous would be written in the order of its memory.
    contiguous = {key: np.asarray(tensor, order="C") for key, tensor in tensors.items()}
    save_file(contiguous, folder / TENSORS_FILE, metadata={"format": "pt"})


def write_adapter(
    destination: Path,
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    *,
    overwrite: bool,
) -> None:
    """Writes the two files of an adapter, from the first process; the folder is whole or absent."""

    def write() -> str:
        check_destination(
            destination, obstacle=_obstacle, content="an adapter", overwrite=overwrite
        )
        with complete_folder(destination, overwrite=overwrite) as folder:
            write_tensors(folder, tensors)
            text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
            (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        return ""

    on_first_process(write)


def _obstacle(destination: Path) -> str | None:
    """Returns what keeps an adapter from replacing what is at `destination`, or None."""
    others = (
        sorted({file.name for file in destination.iterdir()} - {CONFIG_FILE, TENSORS_FILE})
        if destination.is_dir()
        else [destination.name]
    )
    return f"holds {listed(others)}, which is not part of an adapter" if others else None


def check_finite(subject: str, key: str, tensor: np.ndarray) -> None:
    """Raises if a tensor holds values that are not finite."""
    count = int(np.size(tensor) - np.sum(np.isfinite(tensor)))
    if count:
        raise CheckpointError(
            f"{subject} has {count} of {tensor.size} values in '{key}' that are not finite; "
            "expected finite numbers. The training that made them diverged."
        )


def safetensors_package(module: str = "lora_jax.exchange.peft") -> Any:
    """Returns the package, imported where it is used: importing lora_jax stays cheap.

    Args:
      module: what needs it, for the error where it is missing.
    """
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(f"{module} needs safetensors: pip install 'lora-jax[peft]'.") from error
    return safetensors


def _alpha(config: Mapping[str, Any]) -> Any:
    return config.get("lora_alpha", _DEFAULT_ALPHA)


def _patterns(config: Mapping[str, Any], key: str) -> tuple[tuple[str, Any], ...]:
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"`{key}` is {patterns!r}; expected an object.")
    return tuple(patterns.items())


def _by_pattern(config: Mapping[str, Any], key: str, name: str, default: Any) -> Any:
    """Returns the value of the first pattern that is the end of a name, from a dot on."""
    for pattern, value in _patterns(config, key):
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        except re.error as error:
            raise CheckpointError(
                f"`{key}` has {pattern!r}, which is not a regular expression: {error}."
            ) from error
    return default


def _no_adapter(source: Path) -> str:
    if not source.exists():
        return (
            f"`path` {source} does not exist; expected a folder with {CONFIG_FILE} and "
            f"{TENSORS_FILE}.{interruption_hint(source)}"
        )
    inside = sorted(file.parent.name for file in source.glob(f"*/{CONFIG_FILE}"))
    hint = f" Its folders {listed(inside)} hold adapters: choose one." if inside else ""
    return f"`path` {source} is not a PEFT adapter: it has no {CONFIG_FILE}.{hint}"


def _no_tensors(source: Path) -> str:
    """Returns the error for a folder without adapter tensors that lora_jax reads."""
    if (source / _PICKLE_FILE).exists():
        return (
            f"`path` {source} holds {_PICKLE_FILE}, a pickle, which can run any code when it is "
            f"read. Expected {TENSORS_FILE}: model.save_pretrained(path) in PEFT writes it."
        )
    return f"`path` {source} holds no {TENSORS_FILE}; expected it beside {CONFIG_FILE}."


def _check_readable(file: Path, key: str, tensor: np.ndarray) -> None:
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise CheckpointError(
            f"{file} holds '{key}' in {tensor.dtype}; expected a floating-point dtype."
        )
    if jnp.asarray(np.zeros((), tensor.dtype)).dtype != tensor.dtype:
        raise CheckpointError(
            f"{file} holds '{key}' in {tensor.dtype}, which JAX would round; call "
            'jax.config.update("jax_enable_x64", True) before load.'
        )
    check_finite(str(file), key, tensor)
