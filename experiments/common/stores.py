"""Finished parts of a study on disk, found again by their settings.

An interrupted study continues where it stopped, and a network is not pretrained twice.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.common.console import Console
from experiments.common.files import write_json
from experiments.common.training import Trained

Settings = Mapping[str, Any]
Result = Mapping[str, Any]

_AS_JSON = ocp.args.JsonRestore()
_AS_ARRAYS = ocp.args.StandardRestore()
_REASON_LENGTH = 100


@dataclass(frozen=True)
class CellStore:
    """A folder with a JSON file for each finished cell of a grid.

    A cell is found by the settings that decide its result and by nothing else: changed settings
    find nothing, and the former ones find their cells again.

    Attributes:
      folder: where the files are; created when the first cell is saved.
      console: where a file that can't be read is reported.
    """

    folder: Path
    console: Console

    def save(self, settings: Settings, result: Result) -> None:
        """Writes a cell; its file appears once it is complete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self._path(settings), {"settings": dict(settings), "result": dict(result)})

    def load(self, settings: Settings) -> Result | None:
        """Returns the result of the cell with exactly these settings, or None."""
        path = self._path(settings)
        try:
            stored = json.loads(path.read_text())
            return stored["result"] if stored["settings"] == _as_stored(settings) else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.console.warn(
                "a stored cell can't be read", f"Computing it again: {path} ({error!r})"
            )
            return None

    def discard(self, settings: Settings) -> None:
        """Deletes the cell with these settings, if there is one."""
        self._path(settings).unlink(missing_ok=True)

    def _path(self, settings: Settings) -> Path:
        canonical = json.dumps(settings, sort_keys=True)
        return self.folder / f"{hashlib.sha256(canonical.encode()).hexdigest()[:24]}.json"


def _as_stored(settings: Settings) -> Any:
    """Returns the settings as they come back from a file: tuples as lists."""
    return json.loads(json.dumps(settings))


@dataclass(frozen=True)
class BaseCheckpoint:
    """A folder for one pretrained network and the settings that it was trained with.

    Attributes:
      folder: where it is, or will be.
      settings: what decides its numbers; a network trained with other settings is not used.
    """

    folder: Path
    settings: Mapping[str, Any]

    def save(self, trained: Trained) -> None:
        """Writes the network; the folder appears once it is complete."""
        contents = ocp.args.Composite(
            trained=ocp.args.StandardSave({"params": trained.params, "losses": trained.losses}),
            settings=ocp.args.JsonSave(dict(self.settings)),
        )
        with _checkpointer() as checkpointer:
            checkpointer.save(self.folder.resolve(), args=contents, force=True)

    def load(self, console: Console) -> Trained | None:
        """Returns the network if the folder holds one with these settings, otherwise None."""
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
