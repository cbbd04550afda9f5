"""Objects in processes of their own, so that they can be compared fairly.

In one process, two runtimes would share threads, caches and memory: OpenMP's threads, for one, keep
a core busy for a while after their work is done. Here each has a process with a number of cores,
and waits for its turn without using any.
"""

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from experiments.common.errors import InputError

_SERVER = "benchmarks.peers.served"


class Remote:
    """An object in a new process; calls go there as JSON, and what it returns comes back so.

    Attributes:
      seconds_to_start: from before the process began until the object was there.
    """

    def __init__(self, target: str, *, threads: int, arguments: Mapping[str, Any]) -> None:
        """Starts the process.

        Args:
          target: where the object's class is: `module:name`.
          threads: how many cores the process may use, and PyTorch's threads.
          arguments: for the class; fit for JSON.
        """
        self._target = target
        start = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", _SERVER, target, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self._ask(arguments)
        except BaseException:
            self.close()
            raise
        self.seconds_to_start = time.perf_counter() - start

    def call(self, method: str, **arguments: Any) -> Any:
        """Returns what the object's method returns.

        Raises:
          InputError: the method raised it.
          RuntimeError: the method raised another error, which is printed, or the process ended.
        """
        return self._ask({"method": method, "arguments": arguments})

    @property
    def peak_bytes(self) -> int:
        """The most memory so far that was in use at once: an accelerator's if there is one."""
        return self._ask({"method": None, "forgotten": False})

    def forget_peak(self) -> int:
        """Returns `peak_bytes`, which then counts from now on."""
        return self._ask({"method": None, "forgotten": True})

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, question: Any) -> Any:
        streams = self._process.stdin, self._process.stdout
        assert all(stream is not None for stream in streams)
        write, read = streams
        try:
            print(json.dumps(question), file=write, flush=True)
            reply = read.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            raise RuntimeError(f"{self._target}: its process ended with {self._process.wait()}")
        found = json.loads(reply)
        if "input_error" in found:
            raise InputError(found["input_error"])
        if "error" in found:
            raise RuntimeError(f"{self._target}: {found['error']}")
        return found["result"]
