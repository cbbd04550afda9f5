"""The pretrained network on disk, with the settings that it was trained with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.console import Console
from experiments.training import Trained

_AS_JSON = ocp.args.JsonRestore()
_AS_ARRAYS = ocp.args.StandardRestore()
_REASON_LENGTH = 100


@dataclass(frozen=True)
class BaseCheckpoint:
    """A folder for one pretrained network.

    Attributes:
      folder: where it is, or will be.
      settings: what decides the numbers; a network trained with others is not taken for this one.
    """

    folder: Path
    settings: Mapping[str, Any]

    def save(self, trained: Trained) -> None:
        """Writes the network; the folder appears when it is complete."""
        contents = ocp.args.Composite(
            trained=ocp.args.StandardSave({"params": trained.params, "losses": trained.losses}),
            settings=ocp.args.JsonSave(dict(self.settings)),
        )
        with _checkpointer() as checkpointer:
            checkpointer.save(self.folder.resolve(), args=contents, force=True)

    def load(self, console: Console) -> Trained | None:
        """Returns the network, or None unless the folder has one trained with these settings."""
        if not self.folder.is_dir():
            return None
        try:
            return self.read() if self._stored("settings", _AS_JSON) == self.settings else None
        except Exception as error:  # Orbax raises nothing narrower for a damaged file
            reason = " ".join(str(error).split())[:_REASON_LENGTH]
            console.warn(f"{self.folder} can't be read", f"Training again. ({reason} ...)")
            return None

    def read(self) -> Trained:
        """Returns the network that `save` wrote, on JAX's default device."""
        stored = self._stored("trained", _AS_ARRAYS)
        return Trained(jax.device_put(stored["params"]), np.asarray(stored["losses"]))

    def _stored(self, item: str, how: ocp.args.CheckpointArgs) -> Any:
        with _checkpointer() as checkpointer:
            wanted = ocp.args.Composite(**{item: how})
            return checkpointer.restore(self.folder.resolve(), args=wanted)[item]


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())
