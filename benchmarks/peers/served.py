"""The other end of `Remote`: makes an object, and calls its methods as it is asked to."""

import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import IO, Any

from experiments.common.errors import InputError
from experiments.common.memory import forget_host_peak, host_peak_bytes


def main(target: str, threads: int) -> None:
    """Answers questions on standard input, a line each, until there are no more."""
    # Ctrl-C is for the process that asks; it then ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = _standard_output()
    # Before any runtime starts, so that it makes its threads for these cores.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ["OMP_NUM_THREADS"] = str(threads)
    served: Any = None

    def made(arguments: dict[str, Any]) -> None:
        nonlocal served
        module, name = target.split(":")
        served = getattr(importlib.import_module(module), name)(**arguments)

    def called(question: dict[str, Any]) -> Any:
        if question["method"] is None:
            return _peak(served, forgotten=question["forgotten"])
        return getattr(served, question["method"])(**question["arguments"])

    for line in sys.stdin:
        _answer(made if served is None else called, json.loads(line), replies)


def _peak(served: Any, *, forgotten: bool) -> int:
    """Returns the peak of the memory so far, and may begin to count anew.

    It is that of the accelerator, if the object has a method `accelerator_peak` that knows it.
    """
    if hasattr(served, "accelerator_peak"):
        found = served.accelerator_peak(forgotten=forgotten)
        if found is not None:
            return found
    peak = host_peak_bytes()
    if forgotten:
        forget_host_peak()
    return peak


def _standard_output() -> IO[str]:
    """Returns it for replies alone: what a library prints goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


def _answer(work: Callable[[Any], Any], question: Any, replies: IO[str]) -> None:
    try:
        reply = {"result": work(question)}
    except InputError as error:
        reply = {"input_error": str(error)}
    except Exception as error:  # whatever it is, the other process tells it
        traceback.print_exc()
        reply = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
