"""Paths of leaves: how positions in a pytree are written, matched and suggested."""

import collections
import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from lora_jax.quantization._weight import is_quantized

KeyPath = tuple[Any, ...]

# Wrappers around a single array (`nnx.Variable`) add a key of their own below the name that the
# user knows; it says nothing, so `encoder/kernel` stays `encoder/kernel`.
_WRAPPER_KEYS = frozenset({"value", "raw_value", "get_value"})


@dataclasses.dataclass(frozen=True)
class PathIndex:
    """The leaves of a tree by their paths, each of which belongs to one leaf.

    Attributes:
      structure: the tree's structure.
      paths: the path of every leaf, in the order of `jax.tree.leaves`.
      leaves: the leaves, in the same order.
    """

    structure: Any
    paths: tuple[str, ...]
    leaves: tuple[Any, ...]

    @classmethod
    def of(cls, tree: Any, is_leaf: Callable[[Any], bool] = is_quantized) -> "PathIndex":
        """Returns the index of `tree`, in which a quantised weight is one leaf.

        Raises:
          ValueError: two leaves have the same path.
        """
        flat, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
        key_paths = [key_path for key_path, _ in flat]
        paths = path_strings(key_paths)
        _check_distinct(paths, key_paths)
        return cls(structure, tuple(paths), tuple(leaf for _, leaf in flat))

    def items(self) -> list[tuple[str, Any]]:
        """Returns each leaf beside its path."""
        return list(zip(self.paths, self.leaves, strict=True))

    def mapped(self, function: Callable[[str, Any], Any]) -> Any:
        """Returns the tree with `function(path, leaf)` in place of each leaf."""
        return jax.tree.unflatten(self.structure, list(map(function, self.paths, self.leaves)))


def leaves_with_paths(
    tree: Any, is_leaf: Callable[[Any], bool] = is_quantized
) -> list[tuple[str, Any]]:
    """Returns every leaf of `tree` beside its path, in the order of `jax.tree.leaves`."""
    return PathIndex.of(tree, is_leaf).items()


def map_with_paths(
    function: Callable[[str, Any], Any], tree: Any, is_leaf: Callable[[Any], bool] = is_quantized
) -> Any:
    """Returns `tree` with every leaf replaced by `function(path, leaf)`."""
    return PathIndex.of(tree, is_leaf).mapped(function)


def path_strings(key_paths: Sequence[KeyPath], *, skip: int = 0) -> list[str]:
    """Returns the paths of all leaves of a tree as `/`-joined simple keys.

    Args:
      key_paths: the key path of every leaf.
      skip: how many keys to leave out at the start of each.
    """
    siblings = collections.Counter(key_path[:-1] for key_path in key_paths)
    return [
        _joined(key_path[:-1] if _is_wrapped(key_path, siblings) else key_path, skip)
        for key_path in key_paths
    ]


def compile_expression(expression: str, argument: str = "targets") -> re.Pattern[str]:
    """Returns the pattern that finds `expression` as whole path segments anywhere in a path."""
    try:
        return re.compile(rf"(?:^|/)(?:{expression})(?=/|$)")
    except re.error as error:
        raise ValueError(
            f"`{argument}` holds {expression!r}, which is not a regular expression: {error}."
        ) from error


def nearest_paths(wanted: str, paths: Iterable[str], count: int = 3) -> list[str]:
    """Returns the `count` paths that look most like `wanted`, best first."""
    scores = {path: _similarity(wanted, path) for path in paths}
    return sorted(scores, key=lambda path: (-scores[path], path))[:count]


def listed(items: Sequence[str], limit: int = 5) -> str:
    """Returns `items` as a readable enumeration, cut at `limit`."""
    quoted = ", ".join(repr(item) for item in items[:limit])
    return quoted if len(items) <= limit else f"{quoted} and {len(items) - limit} more"


def _similarity(wanted: str, path: str) -> float:
    candidates = [path, *path.split("/")]
    return max(
        difflib.SequenceMatcher(None, wanted.lower(), candidate.lower()).ratio()
        for candidate in candidates
    )


def _is_wrapped(key_path: KeyPath, siblings: Mapping[KeyPath, int]) -> bool:
    """Says whether the last key is that of a wrapper, which holds one array and nothing else."""
    if len(key_path) < 2 or siblings[key_path[:-1]] > 1:
        return False
    key = key_path[-1]
    return isinstance(key, jax.tree_util.GetAttrKey) and key.name in _WRAPPER_KEYS


def _check_distinct(paths: Sequence[str], key_paths: Sequence[KeyPath]) -> None:
    if len(set(paths)) == len(paths):
        return
    first_places: dict[str, KeyPath] = {}
    for path, key_path in zip(paths, key_paths, strict=True):
        first = first_places.setdefault(path, key_path)
        if first is not key_path:
            raise ValueError(
                f"Two leaves of a tree have the path '{path}': {_keys(first)} and "
                f"{_keys(key_path)}. A path must belong to one leaf; rename a key of one of them, "
                "such as one that contains '/'."
            )


def _keys(key_path: KeyPath) -> str:
    return f"tree{jax.tree_util.keystr(key_path)}"


def _joined(key_path: KeyPath, skip: int) -> str:
    return "/".join(jax.tree_util.keystr((key,), simple=True) for key in key_path[skip:])
