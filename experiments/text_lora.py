"""Fine-tunes a BERT encoder on sentences with adapters, and predicts with the result."""

import sys
from collections.abc import Sequence

from experiments.common.errors import exit_code
from experiments.common.memory import keep_freed_memory
from experiments.common.run import Run
from experiments.text.comparison import compare
from experiments.text.options import Options, parsed
from experiments.text.prediction import parsed_for_prediction, predict
from experiments.text.single import train_once


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study with these arguments and returns the exit code of the process."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["predict"]:
        return exit_code(lambda: predict(parsed_for_prediction(arguments[1:])))
    return exit_code(lambda: study(parsed(arguments)))


def study(options: Options) -> None:
    """Trains once and reports on it, or compares methods over seeds."""
    run = Run(options.output)
    (compare if options.what_trains.compares else train_once)(options, run)


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
