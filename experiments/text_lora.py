"""Fine-tunes a BERT encoder on sentences with adapters, and predicts with what came of it."""

import sys
from collections.abc import Sequence

from experiments.command import exit_code
from experiments.console import Console, device_line
from experiments.memory import keep_freed_memory
from experiments.output import writable_folder
from experiments.text.comparison import compare
from experiments.text.options import Options, parsed
from experiments.text.prediction import predict
from experiments.text.prediction_options import parsed_for_prediction
from experiments.text.single import run_once


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study with these arguments and returns the exit code of the process."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["predict"]:
        return exit_code(lambda: predict(parsed_for_prediction(arguments[1:])))
    return exit_code(lambda: study(parsed(arguments)))


def study(options: Options) -> None:
    """Trains once and reports on it, or compares methods over seeds."""
    console = Console(to_stderr=options.json)
    console.note(device_line())
    writable_folder(options.out, "--out")
    (compare if options.compares else run_once)(options, console)


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
