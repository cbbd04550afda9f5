"""Paths of leaves: how a place in a pytree is written, matched and suggested."""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

KeyPath = tuple[Any, ...]

# Wrappers around a single array (`nnx.Variable`) add a key of their own below the name that the
# user knows; it says nothing, so `encoder/kernel` stays `encoder/kernel`.
_WRAPPER_KEYS = frozenset({"value", "raw_value", "get_value"})


def path_string(key_path: KeyPath) -> str:
    """Returns a leaf's place as `/`-joined simple keys, e.g. `encoder/layer_0/kernel`."""
    segments = [jax.tree_util.keystr((key,), simple=True) for key in key_path]
    if len(segments) > 1 and _is_wrapper_key(key_path[-1]):
        segments = segments[:-1]
    return "/".join(segments)


def leaves_with_paths(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, Any]]:
    """Returns every leaf of `tree` beside its path, in the order of `jax.tree.leaves`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [(path_string(key_path), leaf) for key_path, leaf in flat]


def map_with_paths(
    function: Callable[[str, Any], Any], tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> Any:
    """Returns `tree` with every leaf replaced by `function(path, leaf)`."""
    return jax.tree_util.tree_map_with_path(
        lambda key_path, leaf: function(path_string(key_path), leaf), tree, is_leaf=is_leaf
    )


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


def _is_wrapper_key(key: Any) -> bool:
    return isinstance(key, jax.tree_util.GetAttrKey) and key.name in _WRAPPER_KEYS
