"""The file of a training checkpoint that says what it is: `training.json`."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from lora_jax._folders import as_checkpoint_error
from lora_jax.checkpoint._checksums import check_files, file_checksums
from lora_jax.checkpoint._leaves import LeafMetadata, LeavesWithPaths
from lora_jax.checkpoint._metadata import WeightMetadata
from lora_jax.checkpoint._nodes import adapter_nodes, saved_arrays
from lora_jax.checkpoint._position import position_to_json
from lora_jax.checkpoint._signed import read_signed, signed_text
from lora_jax.checkpoint._training_fit import (
    check_same_frozen,
    check_same_state,
    check_same_weights,
)

DESCRIPTION_FILE = "training.json"
ARRAYS_ITEM = "arrays"

_FORMAT = "lora_jax training"
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Description:
    """What a training checkpoint holds and what it belongs to.

    Attributes:
      weights: what is adapted, by path.
      frozen: the fingerprint of each array that is not stored, by path.
      leaves: the leaves that are stored, in the order of `stored_leaves`.
      data_position: what `save` was given, in terms of JSON.
      metrics: what `save` was given, as numbers.
      checksums: that of each file, once they are written.
    """

    weights: Mapping[str, WeightMetadata]
    frozen: Mapping[str, int]
    leaves: Sequence[LeafMetadata]
    data_position: Any
    metrics: Mapping[str, float]
    checksums: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        wrapped: PyTree,
        leaves: LeavesWithPaths,
        frozen: Mapping[str, int],
        data_position: Any = None,
        metrics: Mapping[str, float] | None = None,
    ) -> "Description":
        weights = {
            path: WeightMetadata.of(node, saved_arrays(path, node))
            for path, node in adapter_nodes(wrapped).items()
        }
        described = [LeafMetadata.of(path, leaf) for path, leaf in leaves]
        position = position_to_json(data_position)
        return cls(weights, frozen, described, position, dict(metrics or {}))

    @classmethod
    def read(cls, folder: Path, *, damaged: str) -> "Description":
        """Returns what the checkpoint in `folder` says; errors begin with `damaged`."""
        content = read_signed(folder / DESCRIPTION_FILE, _FORMAT, _VERSION, damaged=damaged)
        with as_checkpoint_error(damaged):
            return cls(
                {path: WeightMetadata.from_json(x) for path, x in content["weights"].items()},
                content["frozen"],
                [LeafMetadata.from_json(each) for each in content["leaves"]],
                content["data_position"],
                content["metrics"],
                content["crc32"],
            )

    def write(self, folder: Path) -> None:
        """Writes it beside the arrays, which are complete, with their checksums."""
        content = {
            "weights": {path: dataclasses.asdict(each) for path, each in self.weights.items()},
            "frozen": self.frozen,
            "leaves": [dataclasses.asdict(leaf) for leaf in self.leaves],
            "data_position": self.data_position,
            "metrics": self.metrics,
            "crc32": file_checksums(folder, ARRAYS_ITEM),
        }
        text = signed_text(_FORMAT, _VERSION, content)
        (folder / DESCRIPTION_FILE).write_text(text, encoding="utf-8")

    def check_fits(self, given: "Description", source: str) -> None:
        """Raises a `CheckpointError` unless what is `given` is what this was saved from."""
        check_same_weights(self.weights, given.weights, source)
        check_same_frozen(self.frozen, given.frozen, source)
        check_same_state(self.leaves, given.leaves, source)

    def check_files(self, folder: Path, *, damaged: str) -> None:
        """Raises a `CheckpointError` unless all files are as they were written."""
        check_files(folder, self.checksums, damaged=damaged)
