"""A model's GGUF file with float32 weights, for which llama.cpp rounds no activations."""

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_LAYER = re.compile(r"blk\.(\d+)\.")


def write_float32(path: Path, source: Path, *, layers: int | None = None) -> None:
    """Writes the model in `source` with dequantised weights, tokenizer and chat template included.

    Args:
      path: the file to write.
      source: the model's GGUF file.
      layers: how many layers it has; None for all.
    """
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    changed = {"general.file_type": int(gguf.LlamaFileType.ALL_F32)}
    if layers is not None:
        changed[f"{architecture}.block_count"] = layers
    writer = gguf.GGUFWriter(path, architecture)
    for name, field in reader.fields.items():
        # The writer writes the header and the architecture itself.
        if not name.startswith("GGUF.") and name != "general.architecture":
            _add(writer, name, field, changed.get(name))
    for tensor in reader.tensors:
        layer = _LAYER.match(tensor.name)
        if layers is None or layer is None or int(layer[1]) < layers:
            weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            writer.add_tensor(tensor.name, np.asarray(weights, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: Any, name: str, field: Any, changed: Any) -> None:
    kind, *inner = field.types
    value = field.contents() if changed is None else changed
    writer.add_key_value(name, value, kind, sub_type=inner[-1] if inner else None)
