"""Computing a cell: by the commands of the study, each in a process of its own."""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.dialogsum.cells import Cell, Found
from benchmarks.running import as_typed, run_module
from benchmarks.stored import ResultStore

_STUDY = "experiments.llm_lora"
# What metrics.json holds of paths, or of each step, is not stored.
_KEPT_OF_TRAINING = (
    "device",
    "method",
    "rank",
    "quantize",
    "training",
    "examples",
    "fullness",
    "parameters",
    "held_out",
    "best",
    "steps",
    "tokens_per_second",
    "adapter_bytes",
    "peak_bytes",
    "step_bytes",
    "evaluations",
    "seconds",
)
_KEPT_OF_ANSWERS = (
    "device",
    "answers",
    "references",
    "perplexity",
    "rouge",
    "rouge_of_each",
    "seconds",
)


@dataclasses.dataclass(frozen=True)
class Workplace:
    """Where cells are computed, and where what they find is stored.

    Attributes:
      folder: for adapters and checkpoints, from which an interrupted cell goes on.
      store: for results.
      model: the model; None for the packaged one.
      options: options of `llm_lora` for every training, besides those of the cells.
    """

    folder: Path
    store: ResultStore
    model: Path | None = None
    options: tuple[str, ...] = ()

    def compute(self, cell: Cell, found: Mapping[str, Found]) -> None:
        """Trains and answers as the cell says, and stores what comes out.

        Raises:
          KeyboardInterrupt: a command was interrupted.
          RuntimeError: a command failed.
        """
        commands, result = [], {}
        model = [] if self.model is None else ["--model", str(self.model)]
        chosen = model
        options = cell.training_options(found)
        if options is not None:
            out = self.folder / cell.name
            commands.append([*options, *model, *self.options, "--out", str(out)])
            result["training"] = _kept(self._trained(commands[-1], out), _KEPT_OF_TRAINING)
            chosen = ["--adapter", str(out / "adapter")]
        options = cell.answering_options()
        if options is not None:
            out = self.folder / f"{cell.name}-answers"
            commands.append([*options, *chosen, "--out", str(out)])
            result["answers"] = _kept(_metrics_of(commands[-1], out), _KEPT_OF_ANSWERS)
        shown = [as_typed([_STUDY, *command]) for command in commands]
        self.store.save(cell.name, result, commands=shown)

    def _trained(self, options: Sequence[str], out: Path) -> Found:
        """Returns the metrics of a training, begun anew or where an interruption left it."""
        if (out / "metrics.json").is_file():
            return _read(out)
        begun = any((out / "checkpoints").glob("[0-9]*"))
        if out.exists() and not begun:
            shutil.rmtree(out)
        return _metrics_of([*options, "--resume"] if begun else options, out)


def _metrics_of(options: Sequence[str], out: Path) -> Found:
    """Runs the study with these options, and returns what it has written."""
    run_module([_STUDY, *options])
    return _read(out)


def _read(out: Path) -> Found:
    return json.loads((out / "metrics.json").read_text(encoding="utf-8"))


def _kept(metrics: Found, names: Sequence[str]) -> dict[str, Any]:
    return {name: metrics[name] for name in names}
