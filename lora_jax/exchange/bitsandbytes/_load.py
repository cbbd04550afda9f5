"""Reading the weights of a checkpoint that bitsandbytes quantised to 4 bits."""

import json
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax._folders import CheckpointError, as_checkpoint_error
from lora_jax._paths import listed
from lora_jax.exchange._names import check_names
from lora_jax.exchange._safetensors import Tensors, checked_dtype, opened
from lora_jax.quantization._formats import FORMATS
from lora_jax.quantization._weight import QuantizedWeight

_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(\w+)")
# What is beside the codes, the last two if the scales are quantised too.
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_TYPES = ("nf4", "fp4")
_DTYPES = ("float32", "bfloat16", "float16")
_OF_INT8 = re.compile(r"(.+)\.(?:SCB|weight_format)")

Shape = tuple[int, ...]


def load(
    path: str | os.PathLike[str], *, names: Collection[str] | None = None
) -> dict[str, np.ndarray | QuantizedWeight]:
    """Returns the tensors of a checkpoint as they are stored, without dequantising.

    Weights that bitsandbytes quantised to `nf4` or `fp4` become quantised weights with the file's
    own codes and scales, also where the scales are quantised too. They dequantise to the same
    numbers as in bitsandbytes, in the dtype that the file says. All else becomes arrays. Everything
    is in the host's memory, where one tensor after the other is read; `exchange.place` puts it on
    the devices. Neither PyTorch nor bitsandbytes is needed.

    Args:
      path: a file of safetensors, or the folder of one model, in one file or several with an index.
      names: which weights to read; all of them by default.

    Returns:
      Each weight by its name, of the shape that it has in PyTorch: (out, in) for a dense layer.
      `weight.transpose((1, 0))` is the kernel of a JAX model, for which nothing is copied.

    Raises:
      CheckpointError: there is no such file, it is damaged, or weights of it have another format.
      ValueError: `names` has a weight that the file does not hold.
      ImportError: safetensors is not installed.

    Source: bitsandbytes.functional.QuantState, `as_dict(packed=True)`.

    Examples:
      >>> import json, lora_jax, numpy as np, pathlib, safetensors.numpy, tempfile
      >>> nf4 = lora_jax.quantize({"w": np.ones((64, 2), np.float32)}, "w", double_quantize=False)
      >>> state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [2, 64]}
      >>> tensors = {
      ...     "weight": np.ascontiguousarray(nf4["w"].codes.T).reshape(-1, 1),
      ...     "weight.absmax": np.array([0.5, 2], np.float32),
      ...     "weight.quant_map": np.linspace(-1, 1, 16, dtype=np.float32),
      ...     "weight.quant_state.bitsandbytes__nf4":
      ...         np.frombuffer(json.dumps(state).encode(), np.uint8),
      ... }
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "model.safetensors")
      ...     safetensors.numpy.save_file(tensors, path)
      ...     weight = lora_jax.exchange.bitsandbytes.load(path)["weight"]
      >>> weight.shape, weight.dequantize()[:, 0].tolist()
      ((2, 64), [0.5, 2.0])
    """
    source = Path(path)
    with opened(source, reader="lora_jax.exchange.bitsandbytes") as tensors:
        states = {found[1]: found for found in map(_STATE.fullmatch, tensors) if found}
        parts = {f"{name}.{part}" for name in states for part in _PARTS}
        parts |= {found[0] for found in states.values()}
        own = [name for name in tensors if name not in parts]
        chosen = check_names(source, names, own)
        _check_formats(source, tensors, chosen)
        return {
            name: _Stored(source, tensors, name, states[name]).weight()
            if name in states
            else checked_dtype(source, name, np.asarray(tensors[name]))
            for name in chosen
        }


class _Stored:
    """One quantised weight of a checkpoint."""

    def __init__(self, source: Path, tensors: Tensors, name: str, state_key: re.Match[str]) -> None:
        self._source, self._tensors, self._name = source, tensors, name
        with as_checkpoint_error(f"{source} is damaged: '{state_key[0]}' can't be read"):
            state = json.loads(np.asarray(tensors[state_key[0]]).tobytes())
            _checked(state["quant_type"], _TYPES)
            self._shape: Shape = _positive(state["shape"])
            (self._block,) = _positive([state["blocksize"]])
            self._dtype_name = _checked(state["dtype"], _DTYPES)
            self._state: Mapping[str, Any] = state

    def weight(self) -> QuantizedWeight:
        """Returns the weight.

        bitsandbytes flattens it, so that its blocks run along the last axis, or where its size is
        not a multiple of the block, across all of them.
        """
        shape, block = self._shape, self._block
        count = math.prod(shape)
        has_rows = shape[-1] % block == 0
        rows = shape[:-1] if has_rows else ()
        size = count // math.prod(rows)
        blocks = -(-size // block)
        codes = self._part("", np.uint8, math.prod(rows) * -(-size // 2))
        ndim = len(shape)
        return QuantizedWeight(
            codes=_rows_last(codes, rows),
            scales=self._scales(rows, blocks),
            codebook=self._codebook("quant_map", "nf4"),
            format="nf4",
            block=block,
            blocked=(-1,) if has_rows else tuple(range(-ndim, 0)),
            blocked_shape=shape[-1:] if has_rows else shape,
            features=tuple(range(-ndim, -1)) if has_rows else (),
            dtype_name=self._dtype_name,
        )

    def _scales(self, rows: Shape, blocks: int) -> np.ndarray | QuantizedWeight:
        count = math.prod(rows) * blocks
        if "nested_blocksize" not in self._state:
            return _rows_last(self._part(".absmax", np.float32, count), rows)
        with as_checkpoint_error(f"{self._source} is damaged: the state of '{self._name}'"):
            (block,) = _positive([self._state["nested_blocksize"]])
            offset = np.array([self._state["nested_offset"]], np.float32)
        shape = (*rows, blocks)
        return QuantizedWeight(
            codes=self._part(".absmax", np.uint8, count),
            scales=self._part(".nested_absmax", np.float32, -(-count // block)),
            offsets=offset,
            codebook=self._codebook("nested_quant_map", "dynamic8"),
            format="dynamic8",
            block=block,
            blocked=tuple(range(-len(shape), 0)),
            blocked_shape=shape,
            features=(),
        )

    def _codebook(self, part: str, name: str) -> np.ndarray | None:
        """Returns the levels of the codes; None where they are those of the format."""
        levels = FORMATS[name].levels
        assert levels is not None
        stored = self._part(f".{part}", np.float32, len(levels))
        return None if np.array_equal(stored, np.asarray(levels, np.float32)) else stored

    def _part(self, suffix: str, dtype: Any, count: int) -> np.ndarray:
        """Returns one of the weight's tensors, flat."""
        key = f"{self._name}{suffix}"
        if key not in self._tensors:
            raise CheckpointError(
                f"{self._source} is damaged: it holds no '{key}' beside '{self._name}'."
            )
        stored = np.asarray(self._tensors[key]).reshape(-1)
        # bnb_4bit_quant_storage may be another dtype, of which the bytes are the codes.
        flat = stored.view(dtype) if not suffix else stored
        if flat.dtype != dtype or flat.size != count:
            raise CheckpointError(
                f"{self._source} is damaged: it has '{key}' of {flat.size} numbers in "
                f"{flat.dtype}; expected {count} in {np.dtype(dtype)} for a weight of shape "
                f"{self._shape}."
            )
        return flat


def _rows_last(flat: np.ndarray, rows: Shape) -> np.ndarray:
    r"""Returns what is stored row by row as (n, \*rows)."""
    return np.ascontiguousarray(np.moveaxis(flat.reshape(*rows, -1), -1, 0))


def _checked(name: Any, known: Collection[str]) -> str:
    if name not in known:
        raise ValueError(f"it says {name!r}; expected one of {listed(tuple(known))}")
    return str(name)


def _positive(sizes: Sequence[Any]) -> Shape:
    found = tuple(map(int, sizes))
    if not found or min(found) < 1:
        raise ValueError(f"it has the sizes {found}; expected whole numbers of at least 1")
    return found


def _check_formats(source: Path, tensors: Tensors, chosen: Collection[str]) -> None:
    int8 = [found[1] for found in map(_OF_INT8.fullmatch, chosen) if found]
    if int8:
        raise CheckpointError(
            f"{source} holds weights in LLM.int8's format, {listed(int8)}, which lora_jax does not "
            "read; expected nf4 or fp4: BitsAndBytesConfig(load_in_4bit=True)."
        )
    # What belongs to a weight whose state is missing.
    endings = tuple(f".{part}" for part in _PARTS)
    lost = [name for name in chosen if name.endswith(endings) or ".quant_state." in name]
    if lost:
        raise CheckpointError(
            f"{source} is damaged: {listed(lost)} belong to a weight of 4 bits, without its "
            "'quant_state.bitsandbytes__nf4' or '...fp4'."
        )
