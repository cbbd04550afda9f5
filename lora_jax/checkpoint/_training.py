"""Checkpoints of a run, from which it continues as if it had never stopped.

Each is a folder `<step>` with the arrays, which Orbax writes, and `training.json`, which says what
they are and holds the checksum of every file. Orbax writes into a temporary folder and renames it,
so that a checkpoint is complete or does not exist.
"""

import contextlib
import operator
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from jaxtyping import PyTree

from lora_jax._folders import CheckpointError, as_checkpoint_error
from lora_jax.checkpoint._files import position_from_json
from lora_jax.checkpoint._fingerprints import frozen_fingerprints
from lora_jax.checkpoint._state import (
    Description,
    TrainingState,
    arrays_to_restore,
    arrays_to_save,
    restored_leaf,
    stored_leaves,
    with_leaves,
)
from lora_jax.checkpoint._steps import Mode, Retention, StepFolders


class TrainingCheckpoints:
    """The checkpoints of one run, in one folder.

    A checkpoint stores the adapters, weights trained in full, scales, the optimiser's state and the
    data position. It never stores the frozen base, only a fingerprint of it, by which another model
    is refused. A checkpoint appears in the folder when it is complete. A run that is killed, even
    while it saves, continues from the last complete one and ends with the same numbers as one that
    was not.

    The folder belongs to one process at a time; others may read it while that one saves. Use it as
    a context manager, or call `close` at the end.

    Args:
      folder: where the checkpoints are; created by the first `save`.
      keep: how many of the latest checkpoints to keep, at least 1; None for all.
      best: the name of a metric, whose best checkpoint is kept in addition.
      mode: whether the best metric is the least, `"min"`, or the greatest, `"max"`.
      every: `save` acts only in steps that are multiples of this.
      asynchronous: whether training continues while a checkpoint is written. `save` copies all
        arrays before it returns, so that the next step may reuse their memory.

    Raises:
      CheckpointError: `folder` is not a folder, or holds steps that something else wrote; an
        argument does not fit.

    Examples:
      >>> import jax, jax.numpy as jnp, lora_jax, optax, tempfile
      >>> from lora_jax.checkpoint import TrainingCheckpoints
      >>> wrapped = lora_jax.wrap({"kernel": jnp.ones((4, 3))}, "kernel", rank=2)
      >>> state = lora_jax.optimizer(optax.sgd(0.1, momentum=0.9)).init(wrapped)
      >>> with tempfile.TemporaryDirectory() as folder, TrainingCheckpoints(folder) as checkpoints:
      ...     saved = checkpoints.save(100, wrapped, state, data_position={"epoch": 2})
      ...     restored = checkpoints.restore(wrapped, state)
      >>> restored.step, restored.data_position
      (100, {'epoch': 2})
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int | None = 3,
        best: str | None = None,
        mode: Mode = "min",
        every: int = 1,
        asynchronous: bool = True,
    ) -> None:
        _check_arguments(keep, mode, every)
        self._best = best
        self._asynchronous = asynchronous
        self._retention = Retention(keep, best, mode)
        self._folders = StepFolders(Path(folder).resolve(), self._retention, every=every)
        self._frozen: Mapping[str, int] | None = None
        for step in self.steps if best is not None else ():
            with contextlib.suppress(CheckpointError):  # `restore` reports what is damaged
                folder = self._folders.folder_of(step)
                self._retention.metrics[step] = Description.read(folder, damaged="").metrics

    def __enter__(self) -> "TrainingCheckpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that have a checkpoint, in order; the one that is being saved included."""
        return self._folders.steps

    @property
    def latest_step(self) -> int | None:
        """The latest step that has a checkpoint, or None if there is none."""
        return max(self.steps, default=None)

    @property
    def best_step(self) -> int | None:
        """The step with the best metric, or None if there is no checkpoint."""
        if self._best is None:
            raise CheckpointError(
                "`best_step` needs a metric to go by; expected TrainingCheckpoints(folder, "
                'best="loss") with the name of one that `save` is given.'
            )
        return self._retention.best(self.steps)

    def save(
        self,
        step: int,
        wrapped: PyTree,
        optimizer_state: PyTree,
        *,
        data_position: Any = None,
        metrics: Mapping[str, Any] | None = None,
        force: bool = False,
    ) -> bool:
        """Saves the state of training after `step` steps, if `every` says so.

        Args:
          step: how many steps have been taken, more than at the latest checkpoint.
          wrapped: the wrapped tree.
          optimizer_state: any tree of arrays, random keys and numbers: the optimiser's state, or
            a tuple of it and whatever else training changes, such as (state, key).
          data_position: where the data are: numbers, text, booleans, None, arrays and random keys,
            in lists, tuples and dicts, such as {"epoch": 2, "random":
            generator.bit_generator.state}. Arrays come back as NumPy's.
          metrics: numbers by name; among them the one that `best` names.
          force: whether to save in a step that `every` leaves out, such as the last one.

        Returns:
          Whether a checkpoint is being saved. It is complete at the next `save`, after `wait` or
          at the end of the context; with `asynchronous=False` at once.

        Raises:
          CheckpointError: an argument does not fit; this checkpoint, or the asynchronous one before
            it, can't be written.
        """
        step = self._checked_later(step)
        if not (force or self._folders.is_due(step)):
            return False
        numbers = self._checked_metrics(metrics)
        leaves = stored_leaves(wrapped, optimizer_state)
        if self._frozen is None:
            self._frozen = frozen_fingerprints(wrapped)
        description = Description.of(wrapped, leaves, self._frozen, data_position, numbers)
        self._retention.metrics[step] = numbers
        self._folders.write(step, arrays_to_save(leaves), description)
        if not self._asynchronous:
            self.wait()
        return True

    def restore(
        self, wrapped: PyTree, optimizer_state: PyTree, *, step: int | None = None
    ) -> TrainingState:
        """Returns the state of training as it was saved, bit for bit.

        Args:
          wrapped: a tree that is wrapped as the one that was saved, on the same base. Its frozen
            leaves are taken over, and the others come back with its shardings, on any mesh.
          optimizer_state: a state of the same transformation, such as tx.init(wrapped) or
            jax.eval_shape(tx.init, wrapped); its shardings count in the same way.
          step: the step to restore; the latest unless given.

        Raises:
          CheckpointError: there is no such checkpoint, it is damaged, or it does not belong to
            `wrapped` or `optimizer_state`.
        """
        self.wait()
        step = self._existing(step)
        folder, damaged = self._folders.folder_of(step), self._damaged(step)
        description = Description.read(folder, damaged=damaged)
        leaves = stored_leaves(wrapped, optimizer_state)
        frozen = frozen_fingerprints(wrapped)
        description.check_fits(Description.of(wrapped, leaves, frozen), f"the checkpoint {folder}")
        description.check_files(folder, damaged=damaged)
        targets = [target for _, target in leaves]
        with as_checkpoint_error(f"the checkpoint {folder} can't be read"):
            stored = self._folders.read(step, arrays_to_restore(description.leaves, targets))
            restored = [
                restored_leaf(leaf, stored.get(str(number)), target)
                for number, (leaf, target) in enumerate(
                    zip(description.leaves, targets, strict=True)
                )
            ]
            position = position_from_json(description.data_position)
        self._frozen = frozen
        wrapped, optimizer_state = with_leaves(wrapped, optimizer_state, restored)
        return TrainingState(wrapped, optimizer_state, step, position, description.metrics)

    def delete_after(self, step: int) -> None:
        """Deletes the checkpoints of all later steps, so that training can go on from `step`.

        Args:
          step: the last step that is kept.

        Raises:
          CheckpointError: they can't be deleted.
        """
        self.wait()
        for later in [each for each in self.steps if each > step]:
            self._folders.delete(later)

    def wait(self) -> None:
        """Returns when the checkpoint that is being saved is complete.

        Raises:
          CheckpointError: it can't be written.
        """
        self._folders.wait()

    def close(self) -> None:
        """Waits as `wait` does, and ends Orbax's threads.

        Raises:
          CheckpointError: the checkpoint that was being saved can't be written.
        """
        self._folders.close()

    def _existing(self, step: int | None) -> int:
        wanted = self.latest_step if step is None else step
        if wanted is None or wanted not in self.steps:
            raise CheckpointError(
                f"`step` is {step}, and the steps that have a checkpoint are {list(self.steps)}; "
                "expected one of them, or None for the latest."
            )
        return wanted

    def _checked_later(self, step: int) -> int:
        step, latest = operator.index(step), self.latest_step
        if step < 0:
            raise CheckpointError(f"`step` is {step}; expected how many steps have been taken.")
        if latest is not None and step <= latest:
            raise CheckpointError(
                f"`step` is {step}, and there is a checkpoint of step {latest}. To go on from an "
                "earlier step, call delete_after(step) with it first; a new run needs a folder of "
                "its own."
            )
        return step

    def _checked_metrics(self, metrics: Mapping[str, Any] | None) -> dict[str, float]:
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        if self._best is not None and self._best not in numbers:
            raise CheckpointError(
                f"`metrics` has {sorted(numbers)}; expected {self._best!r} among them, by which "
                "`best` chooses."
            )
        return numbers

    def _damaged(self, step: int) -> str:
        earlier = max((each for each in self.steps if each < step), default=None)
        way_on = (
            "there is none before it, so the run has to begin again in another folder"
            if earlier is None
            else f"restore(wrapped, optimizer_state, step={earlier}) reads the one before, and "
            f"delete_after({earlier}) makes way to go on from there"
        )
        return f"the checkpoint {self._folders.folder_of(step)} is damaged, {way_on}"


def _check_arguments(keep: int | None, mode: str, every: int) -> None:
    for name, value in (("keep", keep), ("every", every)):
        if value is not None and value < 1:
            raise CheckpointError(f"`{name}` is {value}; expected at least 1.")
    if mode not in ("min", "max"):
        raise CheckpointError(f"`mode` is {mode!r}; expected 'min' or 'max'.")
