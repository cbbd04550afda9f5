"""Results in the repository: a JSON file for each, with the commands that made it."""

import dataclasses
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.common.files import write_json

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class ResultStore:
    """A folder with a file for each result.

    Attributes:
      folder: where the files are; created when the first is saved.
    """

    folder: Path

    def save(self, name: str, found: Mapping[str, Any], *, commands: Sequence[str]) -> None:
        """Writes a result; its file appears once it is complete.

        Args:
          name: the name of the file, without its ending.
          found: what was found, fit for JSON.
          commands: what was called to find it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self._path(name), {**made_by(*commands), **found})

    def load(self, name: str) -> dict[str, Any] | None:
        """Returns a result, or None if there is none of this name."""
        path = self._path(name)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def load_all(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Returns those of the results that are there, by name."""
        stored = ((name, self.load(name)) for name in names)
        return {name: found for name, found in stored if found is not None}

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def made_by(*commands: str) -> dict[str, Any]:
    """Returns what each result begins with: the commands, and what computed."""
    return {"commands": list(commands), "made_on": made_on()}


def made_on() -> dict[str, Any]:
    """Returns what computes here."""
    return {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "matmul_precision": os.environ.get("JAX_DEFAULT_MATMUL_PRECISION", "default"),
    }


def _processor() -> str:
    """Returns the name of the processor; its architecture where the system has no more."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    entries = {
        name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    name = entries.get("model name", platform.machine())
    # Machines of one name differ in the width of their registers, and so in the speed of products.
    return f"{name} with AVX-512" if "avx512f" in entries.get("flags", "").split() else name
