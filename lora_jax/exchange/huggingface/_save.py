"""Writing a model as a folder that Hugging Face transformers loads."""

import contextlib
import dataclasses
import fnmatch
import functools
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lora_jax._folders import CheckpointError, check_destination, complete_folder
from lora_jax._merge import merge
from lora_jax._nodes import NodeIndex, check_whole
from lora_jax._paths import listed
from lora_jax._processes import on_first_process, on_host
from lora_jax._weight import FullWeight, LoRAWeight, is_bank, is_lora_weight
from lora_jax.exchange._safetensors import STEMS, index_of, one_file
from lora_jax.exchange.peft._files import check_finite, safetensors_package
from lora_jax.exchange.peft._names import GivenAxes, NamedLeaf, Place, named_tree
from lora_jax.exchange.peft._rules import Rule
from lora_jax.quantization._weight import is_quantized

CONFIG = "config.json"


def save(
    path: str | os.PathLike[str],
    params: PyTree,
    *,
    names: Sequence[Rule],
    axes: GivenAxes = None,
    config: Mapping[str, Any] | None = None,
    files: Sequence[str | os.PathLike[str]] = (),
    stem: str = "model",
    shard_bytes: int = 2 * 2**30,
    overwrite: bool = False,
) -> None:
    """Writes a model as safetensors, with its adapters merged.

    Tensors are made one after the other, a stack layer by layer: beside the model, the host holds
    those of one file. The folder is complete or absent.

    Args:
      path: the folder to write.
      params: the parameters, plain, quantised or wrapped; what is adapted is merged as by `merge`,
        and what is quantised is dequantised.
      names: the rules for the model's parameters; the first whose path a leaf has counts.
      axes: where the rules don't say it, each axis's role, as in `wrap`.
      config: what `config.json` holds, if anything: that of the model.
      files: files to copy beside it, such as `tokenizer.json`.
      stem: what the files of weights are called: `"model"`, as transformers has it, or
        `"diffusion_pytorch_model"`, as diffusers has it.
      shard_bytes: the size of a file in bytes, from which on another one is begun.
      overwrite: whether to replace the model in a folder that holds nothing else.

    Raises:
      CheckpointError: the folder can't be written or holds something else; a leaf has no rule, or
        an adapter can't be merged; a tensor holds values that are not finite. Nothing is written
        then.
      ValueError: `names` contradict each other, `stem` is another, or `shard_bytes` is not
        positive.
      ImportError: safetensors is not installed.

    Source: Hugging Face transformers, `PreTrainedModel.save_pretrained`.

    Examples:
      >>> import jax.numpy as jnp, lora_jax, pathlib, tempfile
      >>> from lora_jax.exchange import huggingface, peft
      >>> wrapped = lora_jax.wrap({"kernel": jnp.ones((4, 3))}, "kernel", rank=2)
      >>> names = [peft.Rule("dense.weight", "kernel")]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "model")
      ...     huggingface.save(path, wrapped, names=names, config={"model_type": "mlp"})
      ...     sorted(file.name for file in path.iterdir())
      ['config.json', 'model.safetensors']
    """
    destination = Path(path).resolve()
    safetensors_package("lora_jax.exchange.huggingface")
    if shard_bytes < 1:
        raise ValueError(f"`shard_bytes` is {shard_bytes}; expected a positive number of bytes.")
    if stem not in STEMS:
        raise ValueError(f"`stem` is {stem!r}; expected one of {listed(STEMS)}.")
    leaves = _named_leaves(params, names, axes)
    shards = _shards(leaves, shard_bytes)
    own = _file_names(stem, len(shards))
    beside = [Path(file) for file in files]

    def checked() -> str:
        missing = [str(file) for file in beside if not file.is_file()]
        if missing:
            raise CheckpointError(f"`files` has {listed(missing)}; expected files.")
        check_destination(destination, obstacle=_obstacle, content="a model", overwrite=overwrite)
        return ""

    on_first_process(checked)
    with _folder_of_first_process(destination, overwrite) as folder:
        for file, tensors in zip(own, shards, strict=True):
            # Every process gathers what is cut over several; the first one writes.
            numbers = {name: _tensor(named, place) for name, named, place in tensors}
            on_first_process(functools.partial(_write, folder / file, numbers))
        on_first_process(lambda: _write_rest(folder, shards, own, index_of(stem), config, beside))


# A tensor to write: its name, and the leaf and the place of its stack that it is.
_Tensor = tuple[str, NamedLeaf, Place]


def _named_leaves(params: PyTree, names: Sequence[Rule], axes: GivenAxes) -> tuple[NamedLeaf, ...]:
    nodes = NodeIndex.of(params).nodes
    for path, node in nodes.items():
        check_whole(path, node)
    banks = [path for path, node in nodes.items() if is_bank(node)]
    if banks:
        raise CheckpointError(
            f"`params` holds several adapters at {listed(banks)}; expected one: "
            "save(path, serving.select(bank, id), ...)."
        )
    tree = named_tree(params, names, axes)
    if tree.without_rule:
        raise CheckpointError(
            f"`names` has no rule for {listed(tree.without_rule)}; expected one for each leaf, "
            f"such as Rule('PYTORCH.NAME.weight', {tree.without_rule[0]!r})."
        )
    for leaf in tree.leaves:
        problem = leaf.problem()
        if problem is not None:
            raise CheckpointError(problem)
    return tree.leaves


def _shards(leaves: Sequence[NamedLeaf], shard_bytes: int) -> list[list[_Tensor]]:
    """Returns the tensors of each file."""
    shards: list[list[_Tensor]] = [[]]
    held = 0
    for named in leaves:
        size = _size(named)
        for place in named.places:
            if held and held + size > shard_bytes:
                shards.append([])
                held = 0
            shards[-1].append((named.name(place), named, place))
            held += size
    return shards


def _size(named: NamedLeaf) -> int:
    """Returns the bytes of one tensor of a leaf."""
    return math.prod(named.layout.weight_shape) * jnp.dtype(named.leaf.dtype).itemsize


def _file_names(stem: str, count: int) -> list[str]:
    if count == 1:
        return [one_file(stem)]
    numbers = range(1, count + 1)
    return [one_file(f"{stem}-{number:05}-of-{count:05}") for number in numbers]


def _tensor(named: NamedLeaf, place: Place) -> np.ndarray:
    """Returns one tensor as PyTorch has it, merged as `merge` does it and dequantised."""
    single = _at(named.leaf, place, named.stack)
    if is_lora_weight(single):
        single = merge({"": single})[""]
    array = single.dequantize() if is_quantized(single) else single
    tensor = named.layout.file_weight(on_host(array))
    check_finite("`params`", named.name(place), tensor)
    return np.asarray(tensor, order="C")


def _at(leaf: Any, place: Place, axes: tuple[int, ...]) -> Any:
    """Returns one place of a stack, of a weight with adapters too."""
    if isinstance(leaf, FullWeight):
        return _at(leaf.value, place, axes)
    if not axes:
        return leaf
    if is_lora_weight(leaf):
        is_adapted = leaf.layers is None or place[0] in leaf.layers
        return (_weight_at if is_adapted else _base_at)(leaf, place, axes)
    # A quantised weight has the axes of its stack in front, in all its arrays.
    own = range(len(axes)) if is_quantized(leaf) else axes
    return jax.tree.map(lambda array: _indexed(array, place, own), leaf)


def _base_at(weight: LoRAWeight, place: Place, axes: tuple[int, ...]) -> Any:
    return _at(weight.base, place, axes)


def _weight_at(weight: LoRAWeight, place: Place, axes: tuple[int, ...]) -> LoRAWeight:
    adapted = place if weight.layers is None else (weight.layers.index(place[0]), *place[1:])
    of_layers = {name: getattr(weight, name) for name in _STACKED}
    return dataclasses.replace(
        weight,
        base=_base_at(weight, place, axes),
        axes=tuple(role for axis, role in enumerate(weight.axes) if axis not in axes),
        layers=None,
        **{
            name: _indexed(array, adapted, range(len(axes)))
            for name, array in of_layers.items()
            if array is not None
        },
    )


# What has the axes of the stack in front, and holds the adapted layers alone.
_STACKED = ("lora_A", "lora_B", "magnitude", "squared_norm", "initial_A", "initial_B")


def _indexed(array: Any, place: Sequence[Any], axes: Iterable[int]) -> Any:
    """Returns an array at one index of each of these axes."""
    # From the last axis on, so that the numbers of the others stay.
    for axis, index in sorted(zip(axes, place, strict=True), key=lambda pair: -pair[0]):
        array = jax.lax.dynamic_index_in_dim(array, index, axis, keepdims=False)
    return array


@contextlib.contextmanager
def _folder_of_first_process(destination: Path, overwrite: bool) -> Iterator[Path]:
    """Gives a folder to write into, which the first process alone makes and puts in place."""
    if jax.process_index():
        yield destination
        return
    with complete_folder(destination, overwrite=overwrite) as folder:
        yield folder


def _write(file: Path, tensors: Mapping[str, np.ndarray]) -> str:
    from safetensors.numpy import save_file

    save_file(dict(tensors), file, metadata={"format": "pt"})
    return ""


def _write_rest(
    folder: Path,
    shards: Sequence[Sequence[_Tensor]],
    own: Sequence[str],
    index: str,
    config: Mapping[str, Any] | None,
    beside: Sequence[Path],
) -> str:
    if len(own) > 1:
        total = sum(_size(named) for shard in shards for _, named, _ in shard)
        files = {name: file for file, shard in zip(own, shards, strict=True) for name, *_ in shard}
        _write_json(folder / index, {"metadata": {"total_size": total}, "weight_map": files})
    if config is not None:
        _write_json(folder / CONFIG, config)
    for file in beside:
        shutil.copyfile(file, folder / file.name)
    return ""


def _write_json(file: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False)
    file.write_text(f"{text}\n", encoding="utf-8")


def _obstacle(destination: Path) -> str | None:
    """Returns what keeps a model from replacing what is at `destination`, or None."""
    if not destination.is_dir():
        return f"is a file, {destination.name}"
    others = sorted(
        file.name
        for file in destination.iterdir()
        if not any(fnmatch.fnmatchcase(file.name, pattern) for pattern in _OF_MODELS)
    )
    return f"holds {listed(others)}, which is not part of a model" if others else None


# What transformers, diffusers and `save` write for a model.
_OF_MODELS = (
    *(f"{stem}*.safetensors" for stem in STEMS),
    *map(index_of, STEMS),
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template.*",
)
