"""Reading the tensors of a GGUF file."""

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._folders import CheckpointError, as_checkpoint_error
from lora_jax._paths import listed
from lora_jax.exchange._names import check_names
from lora_jax.exchange.gguf._blocks import BLOCK_TYPES, quantized
from lora_jax.exchange.gguf._package import gguf_package
from lora_jax.quantization._weight import QuantizedWeight

_FLOATS: Mapping[str, Any] = {
    "F32": jnp.dtype("float32"),
    "F16": jnp.dtype("float16"),
    "BF16": jnp.dtype("bfloat16"),
}


def load(
    path: str | os.PathLike[str], *, names: Collection[str] | None = None
) -> dict[str, np.ndarray | QuantizedWeight]:
    """Returns the tensors of a GGUF file as they are stored, without dequantising.

    Q4_0, Q4_1, Q8_0, Q4_K and Q6_K become quantised weights with the file's own codes, scales and
    offsets: those of the "K" types are quantised weights too, as in the file. They take as many
    bytes as there. F32, F16 and BF16 become arrays. Everything is in the host's memory, where one
    tensor after the other is read; `exchange.place` puts it on the devices.

    Args:
      path: the file. Of a model in several files, each is read by itself.
      names: which tensors to read; all of them by default.

    Returns:
      Each tensor by its name, of the shape that it has in PyTorch: (out, in) for a dense layer.
      `weight.transpose((1, 0))` is the kernel of a JAX model, for which nothing is copied.

    Raises:
      CheckpointError: there is no such file, it is damaged, or tensors of it have another type.
      ValueError: `names` has a tensor that the file does not hold.
      ImportError: the package gguf is not installed.

    Source: GGUF specification of ggml, docs/gguf.md.

    Examples:
      >>> import gguf, lora_jax, numpy as np, pathlib, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "model.gguf")
      ...     writer = gguf.GGUFWriter(path, "llama")
      ...     rows = gguf.quantize(np.ones((3, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
      ...     writer.add_tensor("output.weight", rows, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
      ...     writer.write_header_to_file()
      ...     writer.write_kv_data_to_file()
      ...     writer.write_tensors_to_file()
      ...     writer.close()
      ...     weight = lora_jax.exchange.gguf.load(path)["output.weight"]
      >>> weight.shape, weight.format, weight.nbytes
      ((3, 64), 'int8', 204)
    """
    gguf = gguf_package()
    source = Path(path)
    with as_checkpoint_error(f"`path` {source} can't be read"):
        if not source.is_file():
            found = "is not a file" if source.exists() else "does not exist"
            raise CheckpointError(f"`path` {source} {found}; expected a file of GGUF.")
    with as_checkpoint_error(f"{source} is damaged, or not a file of GGUF that this gguf reads"):
        reader = gguf.GGUFReader(source)
        if reader.byte_order != "I":
            raise CheckpointError(
                f"{source} has the bytes of its numbers in the other order; convert it with "
                "gguf-convert-endian, which the package gguf brings."
            )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    chosen = check_names(source, names, tensors)
    _check_types(source, {name: tensors[name].tensor_type.name for name in chosen})
    return dict(_read(tensors, chosen))


def _read(
    tensors: Mapping[str, Any], chosen: Collection[str]
) -> Iterator[tuple[str, np.ndarray | QuantizedWeight]]:
    for name in chosen:
        tensor = tensors[name]
        kind, shape = tensor.tensor_type.name, tuple(map(int, reversed(tensor.shape)))
        # The file is mapped into memory; what is returned is a copy, as the file may change.
        data = np.asarray(tensor.data).view(np.uint8)
        if kind in _FLOATS:
            yield name, data.reshape(-1).view(_FLOATS[kind]).reshape(shape).copy()
        else:
            yield name, quantized(kind, data, shape)


def _check_types(source: Path, kinds: Mapping[str, str]) -> None:
    known = (*_FLOATS, *BLOCK_TYPES)
    others = [f"{name}: {kind}" for name, kind in kinds.items() if kind not in known]
    if others:
        raise CheckpointError(
            f"{source} holds tensors of types that lora_jax does not read: {listed(others)}; "
            f"expected {', '.join(known)}. load(path, names=...) reads some tensors only."
        )
