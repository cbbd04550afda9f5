"""Writing an adapter as a GGUF file."""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from lora_jax._folders import CheckpointError, check_destination, complete_file
from lora_jax._processes import on_first_process
from lora_jax.exchange.gguf._export import Architecture, FileAdapter, exported
from lora_jax.exchange.gguf._package import gguf_package
from lora_jax.exchange.peft._export import check_complete
from lora_jax.exchange.peft._names import named_tree
from lora_jax.exchange.peft._rules import Rule


def save(
    path: str | os.PathLike[str],
    wrapped: PyTree,
    *,
    names: Sequence[Rule],
    architecture: str,
    permuted: bool | None = None,
    head_dim: int | None = None,
    overwrite: bool = False,
) -> None:
    r"""Writes the adapters of `wrapped` as a LoRA file in the format GGUF, which llama.cpp applies.

    The rules are those by which `exchange.place` puts a model's tensors into the tree, such as
    `Rule("blk.{n}.attn_q.weight", "layers/query", axes=...)`. Everything is written in float32.
    Where one alpha gives every scale, the file has it; otherwise the scales are inside of lora_b. A
    node whose initialiser changed the base is written as one of twice the rank on the original
    base. The file appears when it is complete; one that it replaces stays until then. All processes
    of a program call `save`, and the first one writes.

    Args:
      path: the file to write; its parents are created.
      wrapped: what `wrap` or `peft.load` returned, trained or not.
      names: the rules for the model's parameters, with the names that they have in GGUF; the first
        whose path a leaf has counts.
      architecture: `general.architecture` of the model's own file: `"llama"` for Llama, Mistral and
        SmolLM2, or `"qwen2"`, `"qwen3"` and so on.
      permuted: whether the model's file has the rows of queries and keys in another order than
        `wrapped`, the two halves of each head interleaved. By default it is known for llama (True),
        gemma, gemma2, gemma3, qwen2, qwen2moe, qwen3 and qwen3moe (False). It is False for a model
        that computes with the rows as a file has them.
      head_dim: the number of rows of a head, which an axis of its own says already: of a leaf
        (width, heads, head_dim) nothing has to be said.
      overwrite: whether to replace an adapter that is already at `path`.

    Raises:
      CheckpointError: `wrapped` has no adapters, a node has no name or can't be said in the format,
        the architecture has no such tensor, a value is not finite, or `path` is taken or can't be
        written. Nothing is written then.
      ValueError: `names` contradict each other or the tree, `architecture` is not one, or it is not
        known what `permuted` or `head_dim` is.
      ImportError: the package gguf is not installed.

    Source: llama.cpp, src/llama-adapter.cpp and convert_lora_to_gguf.py.

    Examples:
      >>> import gguf, jax.numpy as jnp, lora_jax, pathlib, tempfile
      >>> from lora_jax.exchange import peft
      >>> axes = {"query": ("in", "out", "out")}
      >>> wrapped = lora_jax.wrap({"query": jnp.ones((8, 2, 4))}, "query", rank=2, axes=axes)
      >>> names = [peft.Rule("blk.0.attn_q.weight", "query", axes=axes["query"])]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "adapter.gguf")
      ...     lora_jax.exchange.gguf.save(path, wrapped, names=names, architecture="llama")
      ...     for tensor in gguf.GGUFReader(path).tensors:
      ...         print(tensor.name, tensor.data.shape)
      blk.0.attn_q.weight.lora_a (2, 8)
      blk.0.attn_q.weight.lora_b (8, 2)
    """
    gguf = gguf_package()
    destination = Path(path).resolve()
    tree = named_tree(wrapped, names, None)
    check_complete(wrapped, names)
    adapter = exported(gguf, tree, Architecture(architecture, permuted, head_dim))

    def write() -> str:
        _check_free(gguf, destination, overwrite=overwrite)
        with complete_file(destination, overwrite=overwrite) as file:
            _write(gguf, file, architecture, adapter)
        return ""

    on_first_process(write)


def _check_free(gguf: Any, destination: Path, *, overwrite: bool) -> None:
    if destination.is_dir():
        raise CheckpointError(
            f"`path` {destination} is a folder; expected the name of a file, such as "
            f"{destination / 'adapter.gguf'}."
        )
    obstacle = functools.partial(_obstacle, gguf)
    check_destination(destination, obstacle=obstacle, content="an adapter", overwrite=overwrite)


def _obstacle(gguf: Any, destination: Path) -> str | None:
    """Returns what keeps an adapter from replacing a file, or None."""
    other = "is a file that is not an adapter in GGUF"
    try:
        field = gguf.GGUFReader(destination).get_field(gguf.Keys.General.TYPE)
    except Exception:  # whatever a reader makes of bytes that are something else
        return other
    return None if field is not None and field.contents() == gguf.GGUFType.ADAPTER else other


def _write(gguf: Any, file: Path, architecture: str, adapter: FileAdapter) -> None:
    writer = gguf.GGUFWriter(file, architecture)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.alpha)
        for name, tensor in adapter.tensors.items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
