"""Pretrains a small T5 on dialogues by span corruption, as T5 was, so that adapters have a base."""

import sys
from collections.abc import Sequence

from experiments.common.errors import exit_code
from experiments.common.memory import keep_freed_memory
from experiments.common.run import Run
from experiments.pretraining.options import Options, parsed
from experiments.pretraining.study import pretrain


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study with these arguments and returns the exit code of the process."""
    return exit_code(lambda: study(parsed(argv)))


def study(options: Options) -> None:
    """Pretrains once and reports on it."""
    pretrain(options, Run(options.output))


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
