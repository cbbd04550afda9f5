"""One encoder and several tasks: the adapters of all of them in one batch."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from experiments.command import Parser, exit_code
from experiments.console import Console
from experiments.output import bytes_in
from experiments.text.adapter_folder import AdapterFolder
from experiments.text.prediction import sentences_of
from experiments.text.prediction_options import add_sentence_options
from experiments.text.served import ServedTasks, Task, common_model
from experiments.text.task import Encoder

_DESCRIPTION = """\
Serves several tasks with one encoder, all of them in one batch.

Every sentence is classified for every task: the encoder's weights are multiplied once for
the whole batch, and each row takes the factors and the head of its own task. The answers are
compared with those of each adapter alone. Beside them stands what it takes to go from one
task to another: an adapter is read, and the encoder, and what was compiled, stay.
"""

_EXAMPLES = """\
examples:
  python -m experiments.text_lora --out runs/mood
  python -m experiments.text_lora --train-file a.tsv --eval-file b.tsv --out runs/other
  python -m experiments.two_tasks --adapter runs/mood/adapter runs/other/adapter \\
    --text "what a charming film" --text "where did you see it"
"""

_REPEATS = 10
# How far logarithms of probabilities may be apart: the same numbers are added in another order.
_TOLERANCE = 1e-4


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example with these arguments and returns the exit code of the process."""
    return exit_code(lambda: serve(_parser().parse_args(argv)))


def serve(options: argparse.Namespace) -> None:
    """Classifies every sentence for every task in one batch, and prints what that takes."""
    console = Console(to_stderr=options.json)
    sentences = sentences_of(options.text)
    folders = [AdapterFolder(path) for path in options.adapter]
    model = common_model([folder.read_card() for folder in folders])
    encoder_seconds, encoder = _timed(lambda: Encoder.read(options.model or _path(model)))
    # Once before, so that what is timed is the adapter and not the libraries that read it.
    Task.read(folders[0], encoder)
    read = [_timed(lambda folder=folder: Task.read(folder, encoder)) for folder in folders]
    tasks = [task for _, task in read]
    served = ServedTasks(tasks, encoder)
    batch, ids = served.rows(sentences), served.ids(sentences)
    answers = np.asarray(served(batch, ids)).reshape(len(tasks), len(sentences), -1)
    difference = _greatest_difference(answers, tasks, sentences, encoder)
    results = {
        "answers": [
            {"text": sentence, "tasks": _labels(answers[:, place], tasks)}
            for place, sentence in enumerate(sentences)
        ],
        "encoder": {"bytes": encoder.weights_file.stat().st_size, "seconds": encoder_seconds},
        "adapters": [
            {"folder": str(folder.folder), "bytes": bytes_in(folder.weights), "seconds": seconds}
            for folder, (seconds, _) in zip(folders, read, strict=True)
        ],
        "batch_seconds": {
            "one task": _median_seconds(lambda: served(batch, np.zeros_like(ids))),
            "all tasks": _median_seconds(lambda: served(batch, ids)),
        },
        "programs": served.programs,
        "greatest_difference": difference,
    }
    _print(results, options.adapter, console)
    if options.json:
        print(json.dumps(results, indent=2))
    if not difference < _TOLERANCE:
        raise RuntimeError(f"in one batch the log-probabilities differ by {difference:.1e}")


def _greatest_difference(
    answers: NDArray[np.float32],
    tasks: Sequence[Task],
    sentences: Sequence[str],
    encoder: Encoder,
) -> float:
    """Returns how far the answers are from those of each adapter alone."""
    differences = [
        np.abs(found[:, : len(task.card.classes)] - task.log_probabilities(sentences, encoder))
        for found, task in zip(answers, tasks, strict=True)
    ]
    return max(float(found.max()) for found in differences)


def _labels(logs: NDArray[np.float32], tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """Returns each task's class of one sentence, and its probability."""
    return [
        {"label": task.card.classes[int(row.argmax())], "probability": float(np.exp(row.max()))}
        for row, task in zip(logs, tasks, strict=True)
    ]


def _print(results: dict[str, Any], folders: Sequence[Path], console: Console) -> None:
    answers = results["answers"]
    console.rule(f"{len(answers)} sentences × {len(folders)} tasks in one batch")
    console.table(
        ["", *map(str, folders)],
        [
            [
                answer["text"],
                *(f"{each['label']} ({each['probability']:.3f})" for each in answer["tasks"]),
            ]
            for answer in answers
        ],
    )
    console.rule("What is moved, and how long it takes")
    moved = [("the encoder, once", results["encoder"])]
    moved += [(f"a task: {found['folder']}", found) for found in results["adapters"]]
    console.table(
        ["", "bytes", "seconds"],
        [[name, f"{found['bytes']:,}", f"{found['seconds']:.3f}"] for name, found in moved],
    )
    seconds = results["batch_seconds"]
    console.note(
        f"A batch takes {1e3 * seconds['one task']:.1f} ms where all rows have one task, and "
        f"{1e3 * seconds['all tasks']:.1f} ms where they have all; compiled programs: "
        f"{results['programs']}\n"
        "Each adapter alone gives the same answers: log-probabilities differ by at most "
        f"{results['greatest_difference']:.1e}"
    )


def _timed(computation: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = computation()
    return time.perf_counter() - start, result


def _median_seconds(computation: Callable[[], Any]) -> float:
    return float(
        np.median(
            [_timed(lambda: jax.block_until_ready(computation()))[0] for _ in range(_REPEATS)]
        )
    )


def _path(model: str | None) -> Path | None:
    return Path(model) if model else None


def _parser() -> Parser:
    parser = Parser(
        prog="python -m experiments.two_tasks",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "--adapter",
        type=Path,
        nargs="+",
        required=True,
        metavar="DIR",
        help="the folders `adapter` of several trainings' --out, with the same --rank or others",
    )
    add_sentence_options(parser)
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
