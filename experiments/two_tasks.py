"""One encoder and several tasks: the adapters of all of them in one batch."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from experiments.common.claims import Claim
from experiments.common.console import Console
from experiments.common.errors import exit_code
from experiments.common.files import bytes_in
from experiments.common.options import Option, parsed_as
from experiments.common.run import Run
from experiments.common.shared_options import OutputOptions
from experiments.common.timing import timed
from experiments.models.bert import Encoder
from experiments.text.adapter_folder import AdapterFolder
from experiments.text.prediction import Model, Sentences, sentences_of
from experiments.text.served import ServedTasks, Task, common_model

_DESCRIPTION = """\
Serves several tasks with one encoder, all of them in one batch.

Every sentence is classified for every task: one multiplication by the encoder's weights
serves the whole batch, and each row uses the factors and the head of its own task. The
answers are compared with those of each adapter alone. The study also shows what it takes to
add a task: an adapter is read, while the encoder and the compiled program stay.
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


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the caller chose; `--help` says what each means."""

    adapter: Annotated[
        tuple[Path, ...],
        Option(
            "the folders `adapter` in the --out of several trainings, of the same --rank or not",
            Path,
            several=True,
            metavar="DIR",
        ),
    ]
    text: Sentences = None
    model: Model = None
    output: OutputOptions = OutputOptions()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study with these arguments and returns the exit code of the process."""
    return exit_code(lambda: study(parsed(argv)))


def parsed(arguments: Sequence[str] | None) -> Options:
    """Returns the options on the command line; exits, as argparse does, if one is wrong."""
    return parsed_as(
        Options, arguments, command="two_tasks", description=_DESCRIPTION, examples=_EXAMPLES
    )


def study(options: Options) -> None:
    """Classifies every sentence for every task in one batch, and shows what that takes."""
    run = Run(options.output)
    sentences = sentences_of(options.text)
    folders = [AdapterFolder(path) for path in options.adapter]
    model = common_model([folder.read_card() for folder in folders])
    encoder_seconds, encoder = timed(lambda: Encoder.read(options.model or model))
    # Read once before, so that the time is that of the adapter and not of importing libraries.
    Task.read(folders[0], encoder)
    read = [timed(lambda folder=folder: Task.read(folder, encoder)) for folder in folders]
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
    _print(results, options.adapter, run.console)
    alike = Claim(
        "a batch of all tasks answers as each adapter alone",
        difference < _TOLERANCE,
        f"log-probabilities differ by {difference:.1e}",
    )
    run.finish(results, claims=[alike])


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
    console.rule("What is read, and how long it takes")
    read = [("the encoder, once", results["encoder"])]
    read += [(f"a task: {found['folder']}", found) for found in results["adapters"]]
    console.table(
        ["", "bytes", "seconds"],
        [[name, f"{found['bytes']:,}", f"{found['seconds']:.3f}"] for name, found in read],
    )
    seconds = results["batch_seconds"]
    console.note(
        f"A batch takes {1e3 * seconds['one task']:.1f} ms if all rows have the same task, and "
        f"{1e3 * seconds['all tasks']:.1f} ms if they have all of them; compiled programs: "
        f"{results['programs']}\n"
        "Each adapter alone gives the same answers: log-probabilities differ by at most "
        f"{results['greatest_difference']:.1e}"
    )


def _median_seconds(computation: Callable[[], Any]) -> float:
    return float(np.median([timed(computation)[0] for _ in range(_REPEATS)]))


if __name__ == "__main__":
    sys.exit(main())
