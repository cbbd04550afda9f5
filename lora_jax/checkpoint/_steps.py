"""The folder of each step: written, listed, thinned out and read by Orbax's `CheckpointManager`.

Orbax writes into a temporary folder and renames it when everything is there, so that a step is
complete or does not exist. It also renames what it deletes first: no step is ever half there.
"""

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from lora_jax._folders import CheckpointError, as_checkpoint_error
from lora_jax._processes import on_first_process
from lora_jax.checkpoint._state import ARRAYS_ITEM, DESCRIPTION_FILE, Description

_DELETED_FOLDER = ".deleted"
# What Orbax takes for a step, complete or not.
_STEP_NAME = re.compile(r"(0|[1-9]\d*)(\.orbax-checkpoint-tmp.*)?")

Mode = Literal["min", "max"]


class Retention:
    """Orbax's preservation policy of the latest steps and of the best one.

    Attributes:
      metrics: those of each step.
    """

    def __init__(self, keep: int | None, best: str | None, mode: Mode) -> None:
        self.metrics: dict[int, Mapping[str, float]] = {}
        self._keep = keep
        self._best = best
        self._sign = 1 if mode == "min" else -1

    def best(self, steps: Sequence[int]) -> int | None:
        """Returns the best of `steps`, the later of two that are alike."""
        return min(steps, key=lambda step: (self._loss(step), -step), default=None)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns for each checkpoint whether it is kept, as Orbax asks before it deletes."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = set(steps if self._keep is None else steps[-self._keep :])
        if self._best is not None:
            kept.add(self.best(steps))
        return [step in kept for step in steps]

    def _loss(self, step: int) -> float:
        """Returns what the best step has least of; what is not a number is never best."""
        value = self.metrics.get(step, {}).get(self._best or "", math.nan)
        return math.inf if math.isnan(value) else self._sign * value


class StepFolders:
    """The steps in one folder, of which at most one is being written."""

    def __init__(self, folder: Path, retention: Retention, *, every: int) -> None:
        self._folder = folder
        self._being_written: tuple[int, Description] | None = None
        self._is_tidy = False
        with as_checkpoint_error(f"`folder` {folder} can't be read"):
            _check_folder(folder)
            self._manager = _orbax_manager(
                folder, retention, every=every, before_commit=self._before_commit
            )

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that are complete or being written, in order."""
        return tuple(self._manager.all_steps())

    def is_due(self, step: int) -> bool:
        """Says whether a step is among those to be saved."""
        return bool(self._manager.should_save(step))

    def folder_of(self, step: int) -> Path:
        """Returns the folder of a step."""
        return self._folder / str(step)

    def write(self, step: int, arrays: Mapping[str, Any], description: Description) -> None:
        """Begins to write a step; the arrays are copied when this returns."""
        import orbax.checkpoint as ocp

        self.wait()
        with as_checkpoint_error(self._cannot_write(step)):
            self._prepare()
            self._being_written = step, description
            items = ocp.args.Composite(**{ARRAYS_ITEM: ocp.args.StandardSave(dict(arrays))})
            self._manager.save(step, args=items, force=True)

    def read(self, step: int, abstract: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the arrays of a step, each as `abstract` says."""
        import orbax.checkpoint as ocp

        items = ocp.args.Composite(**{ARRAYS_ITEM: ocp.args.StandardRestore(dict(abstract))})
        return self._manager.restore(step, args=items)[ARRAYS_ITEM]

    def wait(self) -> None:
        """Returns when the step that is being written is complete."""
        if self._being_written is None:
            return
        step, _ = self._being_written
        try:
            with as_checkpoint_error(self._cannot_write(step)):
                self._manager.wait_until_finished()
        except CheckpointError:
            # Orbax has forgotten the steps that it was about to delete, and they are still there.
            self._manager.reload()
            self._is_tidy = False
            raise
        finally:
            self._being_written = None

    def delete(self, step: int) -> None:
        """Deletes a step."""
        with as_checkpoint_error(f"the checkpoint {self.folder_of(step)} can't be deleted"):
            self._remove_deleted()
            self._manager.delete(step)
            self._remove_deleted()

    def close(self) -> None:
        """Waits, and ends Orbax's threads."""
        try:
            self.wait()
        finally:
            self._manager.close()
            if self._is_tidy:
                self._remove_deleted()

    def _prepare(self) -> None:
        """Makes the folder, and removes what a run that was killed left there.

        Not before the first step is written: reading leaves alone what another process writes.
        """
        if self._is_tidy:
            return

        def tidy() -> str:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in self._folder.iterdir():
                match = _STEP_NAME.fullmatch(path.name)
                if match is not None and match[2] is not None:
                    shutil.rmtree(path)
            return ""

        on_first_process(tidy)
        self._remove_deleted()
        self._is_tidy = True

    def _before_commit(self) -> None:
        """Completes what Orbax wrote, in its thread, before it renames the temporary folder."""
        import orbax.checkpoint as ocp

        assert self._being_written is not None
        step, description = self._being_written
        suffix = ocp.path.atomicity_types.TMP_DIR_SUFFIX
        description.write(self._folder / f"{step}{suffix}")
        self._remove_deleted()

    def _remove_deleted(self) -> None:
        if jax.process_index() == 0:
            shutil.rmtree(self._folder / _DELETED_FOLDER, ignore_errors=True)

    def _cannot_write(self, step: int) -> str:
        return f"the checkpoint {self.folder_of(step)} can't be written"


def _check_folder(folder: Path) -> None:
    """Raises a `CheckpointError` if steps could be deleted that something else wrote."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"`folder` {folder} is a file; choose a folder.")
    for path in sorted(folder.iterdir()):
        match = _STEP_NAME.fullmatch(path.name)
        if match is None or match[2] is not None or (path / DESCRIPTION_FILE).is_file():
            continue
        raise CheckpointError(
            f"`folder` {folder} holds '{path.name}', which is not a training checkpoint: it has no "
            f"{DESCRIPTION_FILE}; choose another folder, or move it away if it is damaged."
        )


def _orbax_manager(folder: Path, retention: Retention, *, every: int, before_commit: Any) -> Any:
    import orbax.checkpoint as ocp
    from orbax.checkpoint import checkpoint_managers as policies

    options = ocp.CheckpointManagerOptions(
        create=False,
        save_decision_policy=policies.AnySavePolicy(
            [policies.FixedIntervalPolicy(every), policies.PreemptionCheckpointingPolicy()]
        ),
        preservation_policy=retention,
        # Orbax deletes file by file, and a step that has lost some would look complete.
        todelete_subdir=_DELETED_FOLDER,
        # Its files of one damaged step would keep all others from being opened.
        lightweight_initialize=True,
        async_options=ocp.AsyncOptions(post_finalization_callback=before_commit),
    )
    return ocp.CheckpointManager(folder, options=options)
