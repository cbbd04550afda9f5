"""Whether a training checkpoint belongs to the tree and the optimiser that it is restored into."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax._folders import CheckpointError
from lora_jax._paths import listed, nearest_paths
from lora_jax.checkpoint._leaves import LeafMetadata
from lora_jax.checkpoint._metadata import WeightMetadata

_SAME_WRAP = (
    "Expected a tree that is wrapped as in the run that saved it: wrap(params, targets, ...) with "
    "the same arguments."
)


def check_same_weights(
    saved: Mapping[str, WeightMetadata], given: Mapping[str, WeightMetadata], source: str
) -> None:
    """Raises a `CheckpointError` that names the path unless the same is adapted in the same way."""
    for path in saved:
        if path not in given:
            raise CheckpointError(
                f"{source} adapts '{path}', which `wrapped` does not adapt; the nearest paths that "
                f"it does are {listed(nearest_paths(path, given))}. {_SAME_WRAP}"
            )
    for path in given:
        if path not in saved:
            raise CheckpointError(
                f"{source} does not adapt '{path}', which `wrapped` does. {_SAME_WRAP}"
            )
        was, now = _properties(saved[path]), _properties(given[path])
        for name in {**was, **now}:
            if was.get(name) != now.get(name):
                raise CheckpointError(
                    f"{source} does not fit `wrapped` at '{path}': its {name} is {was.get(name)} "
                    f"in the checkpoint and {now.get(name)} in `wrapped`. {_SAME_WRAP}"
                )


def check_same_frozen(saved: Mapping[str, int], given: Mapping[str, int], source: str) -> None:
    """Raises a `CheckpointError` that names the path unless the frozen numbers are the same."""
    for path in sorted({*saved, *given}):
        if saved.get(path) == given.get(path):
            continue
        what = (
            "which `wrapped` does not have"
            if path not in given
            else "which is not in the checkpoint's tree"
            if path not in saved
            else "whose numbers are not those that it had when the run began"
        )
        raise CheckpointError(
            f"{source} belongs to another model: `wrapped` differs at the frozen leaf '{path}', "
            f"{what}. Expected wrap(params, ...) of the params, and with the key and init, that "
            "the run began with. A leaf that changes in training and is not an adapter belongs in "
            "`optimizer_state`, as in (optimizer_state, batch_statistics)."
        )


def check_same_state(
    saved: Sequence[LeafMetadata], given: Sequence[LeafMetadata], source: str
) -> None:
    """Raises a `CheckpointError` that names the path unless the optimiser's state is the same."""
    for was, now in itertools.zip_longest(saved, given):
        if was is None or now is None or not was.fits(now):
            came = "no leaf" if was is None else was.described()
            expected = "has none" if now is None else f"has {now.described()}"
            raise CheckpointError(
                f"{source} is of another optimiser: it has {came} where `optimizer_state` "
                f"{expected}. Expected tx.init(...) of the transformation that the run began with."
            )


def _properties(weight: WeightMetadata) -> dict[str, Any]:
    """Returns what there is to say about a weight, what `wrap` was told before what follows."""
    fields = {field.name: getattr(weight, field.name) for field in dataclasses.fields(weight)}
    arrays = fields.pop("arrays")
    return {**fields, **{name: f"{each.dtype} {each.shape}" for name, each in arrays.items()}}
