"""Adapters as the files of image models have them: by module, each with an alpha of its own.

Their factors are laid out as PEFT's, so that PEFT's plan says where each of them belongs.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from lora_jax._folders import (
    CheckpointError,
    as_checkpoint_error,
    check_destination,
    complete_file,
)
from lora_jax._nodes import check_plain
from lora_jax._paths import listed
from lora_jax._processes import on_first_process
from lora_jax._settings import checked_freeze
from lora_jax.exchange.peft._export import (
    Adapter,
    Adapters,
    check_complete,
    exported_adapters,
    exported_weights,
)
from lora_jax.exchange.peft._files import Tensors, check_finite, read_file
from lora_jax.exchange.peft._load import Preview, preview_of, with_adapter
from lora_jax.exchange.peft._names import PREFIX, GivenAxes, NamedTree, named_tree
from lora_jax.exchange.peft._rules import Rule
from lora_jax.exchange.peft._token_rows import exported_rows

# PEFT's key of each part.
_SUFFIXES = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
}


@dataclasses.dataclass(frozen=True)
class ModuleAdapter:
    """What a file holds of one module.

    Attributes:
      parts: `lora_A`, `lora_B` and perhaps `magnitude`, laid out as PEFT has them.
      keys: the key of each part in the file.
      alpha: its alpha; the rank where the file does not say it.
    """

    parts: Mapping[str, np.ndarray]
    keys: Mapping[str, str]
    alpha: float | None = None

    @property
    def rank(self) -> int:
        """The rank of the factors."""
        return int(self.parts["lora_A"].shape[0])


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """The adapters in a file, by module, and what else it holds.

    Attributes:
      source: the file.
      adapters: the adapters of the component that was asked for.
      others: the tensors of other components.
      unknown: the keys of what is neither.
    """

    source: Path
    adapters: Mapping[str, ModuleAdapter]
    others: Tensors
    unknown: Sequence[str] = ()

    def loaded(
        self,
        params: PyTree,
        names: Sequence[Rule],
        axes: GivenAxes,
        freeze: str | Sequence[str],
        ignore: Sequence[str],
    ) -> PyTree:
        """Returns `params` wrapped with the adapters; the arguments are those of `load`."""
        frozen = checked_freeze("`freeze`", freeze)
        check_plain(params, "expected plain params: load(path, unwrap(params), ...).")
        self._check_others(ignore)
        config, tensors, keys = self._as_peft(named_tree(params, names, axes))
        subject = f"the adapter {self.source}"
        try:
            return with_adapter(subject, config, tensors, params, names, axes, frozen)
        except CheckpointError as error:
            raise CheckpointError(_in_own_words(str(error), keys)) from error

    def previewed(self, params: PyTree, names: Sequence[Rule], axes: GivenAxes) -> Preview:
        """Returns what `loaded` makes of the file, and what keeps it from it."""
        tree = named_tree(params, names, axes)
        config, tensors, keys = self._as_peft(tree)
        found = preview_of(config, tensors, tree)
        own = [_in_own_words(problem, keys) for problem in found.problems]
        unknown = [f"'{key}' is not a tensor that lora_jax supports." for key in self.unknown]
        others = [f"'{key}' belongs to another component." for key in self.others]
        return dataclasses.replace(found, problems=(*own, *unknown, *others))

    def _check_others(self, ignore: Sequence[str]) -> None:
        if self.unknown:
            raise CheckpointError(
                f"{self.source} holds {listed(self.unknown)}, which lora_jax does not support."
            )
        left = [key for key in self.others if not key.startswith(tuple(ignore))]
        if left:
            raise CheckpointError(
                f"{self.source} holds {listed(left)} of other components; load(..., ignore=[...]) "
                "with the beginnings of their names leaves them out, and other_tensors(path) "
                "returns them for save(..., others=...)."
            )

    def _as_peft(self, tree: NamedTree) -> tuple[dict[str, Any], Tensors, dict[str, str]]:
        """Returns the config and the tensors of the same adapter in PEFT's format.

        With them, for each key of a tensor, the key in the file.
        """
        tensors: Tensors = {}
        keys: dict[str, str] = {}
        for module, adapter in self.adapters.items():
            shape = _weight_shape(tree, module)
            for part, tensor in adapter.parts.items():
                key = f"{PREFIX}{module}.{_SUFFIXES[part]}"
                tensors[key] = _as_module_has_it(part, tensor, shape)
                keys[key] = adapter.keys[part]
        patterns = {f"^{re.escape(module)}": each for module, each in self.adapters.items()}
        config = {
            "peft_type": "LORA",
            "rank_pattern": {pattern: each.rank for pattern, each in patterns.items()},
            "alpha_pattern": {
                pattern: each.rank if each.alpha is None else each.alpha
                for pattern, each in patterns.items()
            },
            "use_dora": any("magnitude" in each.parts for each in self.adapters.values()),
        }
        return config, tensors, keys


def _weight_shape(tree: NamedTree, module: str) -> tuple[int, ...] | None:
    """Returns the shape of a module's weight in PyTorch, if the tree has it."""
    found = tree.by_name.get(f"{module}.weight")
    if found is None or found[0].problem() is not None:
        return None
    return found[0].layout.weight_shape


def _as_module_has_it(part: str, tensor: np.ndarray, shape: tuple[int, ...] | None) -> np.ndarray:
    """Returns a tensor with the axes that PEFT gives it for a weight of this shape.

    A linear layer and a convolution of one pixel have the same numbers, and files have either.
    """
    if shape is None:
        return tensor
    if part == "magnitude":
        axes = (1, shape[0], *(1,) * (len(shape) - 2)) if len(shape) > 2 else (shape[0],)
        # The norms of the inputs, which some programs have, are no magnitudes of outputs.
        is_of_outputs = tensor.size == shape[0] and tensor.shape[:1] in ((shape[0],), (1,))
        is_of_inputs = tensor.ndim == 2 and tensor.shape[0] == 1 and len(shape) == 2
        return tensor.reshape(axes) if is_of_outputs and not is_of_inputs else tensor
    is_pixel = all(size == 1 for size in (*shape[2:], *tensor.shape[2:]))
    if tensor.ndim == len(shape) or not is_pixel:
        return tensor
    return tensor.reshape(*tensor.shape[:2], *(1,) * (len(shape) - 2))


def _in_own_words(message: str, keys: Mapping[str, str]) -> str:
    """Returns a message with the keys of the file in place of PEFT's."""
    for key, own in keys.items():
        message = message.replace(f"'{key}'", f"'{own}'")
    return message


def read_tensors(path: Path, module: str) -> tuple[Tensors, dict[str, str]]:
    """Returns the tensors and the metadata of a file of safetensors; see `read_file`."""
    with as_checkpoint_error(f"`path` {path} can't be read"):
        if not path.is_file():
            raise CheckpointError(f"`path` {path} is not a file; expected one of safetensors.")
    return read_file(path, module)


# The module of a tensor and which part of its adapter it is: of those above, or `"alpha"`.
Place = tuple[str, str]


def adapter_file(
    source: Path,
    tensors: Tensors,
    places: Mapping[str, Place | None],
    usual_alpha: Callable[[str, int], float | None] = lambda module, rank: None,
) -> AdapterFile:
    """Returns what the tensors of a file are.

    Args:
      source: the file.
      tensors: its tensors.
      places: for each key of the component that was asked for, its place; None where it has none.
      usual_alpha: the alpha of a module with a rank, where no tensor says it.
    """
    unknown = [key for key, place in places.items() if place is None]
    found: dict[str, dict[str, str]] = {}
    for key, place in places.items():
        if place is None:
            continue
        module, part = place
        # Of two tensors for one place, neither is known to be right.
        if found.setdefault(module, {}).setdefault(part, key) != key:
            unknown += [key, found[module][part]]
    adapters = {}
    for module, keys in found.items():
        if {"lora_A", "lora_B"} <= set(keys):
            adapters[module] = _module_adapter(tensors, module, keys, usual_alpha)
        else:
            unknown += keys.values()
    others = {key: tensor for key, tensor in tensors.items() if key not in places}
    return AdapterFile(source, adapters, others, tuple(dict.fromkeys(unknown)))


def _module_adapter(
    tensors: Tensors,
    module: str,
    keys: Mapping[str, str],
    usual_alpha: Callable[[str, int], float | None],
) -> ModuleAdapter:
    own = {part: key for part, key in keys.items() if part != "alpha"}
    parts = {part: tensors[key] for part, key in own.items()}
    if "alpha" in keys:
        return ModuleAdapter(parts, own, float(tensors[keys["alpha"]]))
    return ModuleAdapter(parts, own, usual_alpha(module, int(parts["lora_A"].shape[0])))


def checked_others(
    others: Mapping[str, np.ndarray] | None,
    component: str,
    component_of: Callable[[str], str | None],
) -> dict[str, np.ndarray]:
    """Returns tensors to write beside an adapter, after checking that they are of others."""
    own = [key for key in others or {} if component_of(key) in (component, None)]
    if own:
        raise ValueError(
            f"`others` has {listed(own)} of the component {component!r} itself; expected tensors "
            "of others, as other_tensors(path) returns them."
        )
    return dict(others or {})


def adapters_to_write(wrapped: PyTree, names: Sequence[Rule]) -> tuple[NamedTree, Adapters]:
    """Returns the adapters of a tree that trains nothing else.

    Raises:
      CheckpointError: there are none, one has no name, or a weight trains in full.
    """
    tree = named_tree(wrapped, names, None)
    check_complete(wrapped, names)
    adapters = exported_adapters(tree)
    rows = exported_rows(tree)
    if rows.numbers:
        raise CheckpointError(
            f"`wrapped` changes single rows at {listed(list(rows.paths.values()))}, for which the "
            "format has no place; leave wrap(..., rows=...) out."
        )
    weights = exported_weights(tree, adapters, rows, {})
    if weights.tensors:
        raise CheckpointError(
            f"`wrapped` trains {listed(list(weights.tensors))} in full, for which the format has "
            "no place; leave wrap(..., train=...) out."
        )
    parameters = [each.target for each in adapters.each if each.is_parameter or each.is_embedding]
    if parameters:
        raise CheckpointError(
            f"`wrapped` adapts {listed(parameters)}; expected linear layers and convolutions, "
            "for which alone the format has names."
        )
    return tree, adapters


def alpha_of(adapter: Adapter) -> float:
    """Returns the alpha with which the rank gives an adapter's scale."""
    alpha = float(adapter.scale) * adapter.rank
    if not math.isfinite(alpha):
        raise CheckpointError(
            f"`wrapped` has the scale {float(adapter.scale)} at '{adapter.named.path}'; expected "
            "a finite number."
        )
    return alpha


def write_file(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    *,
    overwrite: bool,
) -> None:
    """Writes a file of safetensors, complete or not at all; the first process alone writes.

    Args:
      path: the file.
      tensors: the tensors by key.
      metadata: its metadata.
      overwrite: whether to replace a file of safetensors.
    """
    from safetensors.numpy import save_file

    found = {key: np.asarray(tensor, order="C") for key, tensor in tensors.items()}
    for key, tensor in found.items():
        check_finite("`wrapped`", key, tensor)

    def write() -> str:
        check_destination(path, obstacle=_obstacle, content="an adapter", overwrite=overwrite)
        with complete_file(path, overwrite=overwrite) as file:
            save_file(found, file, metadata=dict(metadata))
        return ""

    on_first_process(write)


def _obstacle(destination: Path) -> str | None:
    """Returns what keeps an adapter from replacing what is at `destination`, or None."""
    if destination.is_dir():
        return "is a folder; expected the name of a file"
    return None if destination.suffix == ".safetensors" else "is not a file of safetensors"
