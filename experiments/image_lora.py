"""Teaches a diffusion model digits that it has never seen, with adapters, and draws them."""

import sys
from collections.abc import Sequence

from experiments.common.errors import exit_code
from experiments.common.memory import keep_freed_memory
from experiments.common.run import Run
from experiments.images.options import Options, parsed
from experiments.images.study import run_study


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study with these arguments and returns the exit code of the process."""
    return exit_code(lambda: study(parsed(argv)))


def study(options: Options) -> None:
    """Trains a base and adapters of each held-out digit, and reports what they draw."""
    run_study(options, Run(options.output))


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
