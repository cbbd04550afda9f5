"""Where the time of a step goes that XLA has compiled for a CPU."""

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

# The kinds of operations that both sides are divided into.
WEIGHTS = "products with frozen weights"
FACTORS = "factors, and building W + AB"
ATTENTION = "attention"
HEAD = "head and loss"
OTHERS = "everything else"
WAITING = "waiting"
KINDS = (WEIGHTS, FACTORS, ATTENTION, HEAD, OTHERS, WAITING)

# A time in nanoseconds, 1 or -1 for one more or one less that runs, and its name.
Change = tuple[float, int, str]

# Instructions that run others, of which some may run on other threads.
_AROUND = ("while", "call", "conditional")
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*op_name="([^"]*)"', re.MULTILINE)
# What the names of operations in `experiments.models.llama` say, the first that does counts.
_SAID = {
    re.compile(r"/lora/"): FACTORS,
    re.compile(
        r"(mlp|attention|attention\._heads)/(gate|up|down|query|key|value|out)/dot"
    ): WEIGHTS,
    re.compile(r"/attention/"): ATTENTION,
    re.compile(r"logits|jvp\(\)|take_along_axis"): HEAD,
}


def xla_seconds(take_steps: Callable[[], float], programs: Iterable[str]) -> dict[str, float]:
    """Returns how long steps took by the clock, divided into kinds of operations.

    Operations that run at the same time share it. What is left is waiting.

    Args:
      take_steps: takes them, and returns their seconds.
      programs: the text of each compiled program that they run.
    """
    kinds = {name: kind_of(op_name) for text in programs for name, op_name in op_names(text)}
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            seconds = take_steps()
        (path,) = Path(folder).rglob("*.xplane.pb")
        changes = _changes(jax.profiler.ProfileData.from_file(str(path)), kinds)
    found = Counter(dict.fromkeys(KINDS, 0.0))
    for name, own in shared_seconds(changes).items():
        found[kinds[name]] += own
    return {**found, WAITING: seconds - found.total()}


def op_names(program: str) -> Iterator[tuple[str, str]]:
    """Yields the name of each instruction of a program, and of the operation that it comes from."""
    for found in _INSTRUCTION.finditer(program):
        yield found[1], found[2]


def kind_of(op_name: str) -> str:
    """Returns the kind of an operation of the study's network.

    Args:
      op_name: its name, which has the modules that it is in.
    """
    return next((kind for said, kind in _SAID.items() if said.search(op_name)), OTHERS)


def shared_seconds(changes: Iterable[Change]) -> Mapping[str, float]:
    """Returns the seconds of each operation; where several run, each has its part of the time.

    Args:
      changes: when an operation begins or ends, in any order.
    """
    spent: Counter[str] = Counter()
    running: Counter[str] = Counter()
    before = 0.0
    # What begins comes first, so that what takes no time has begun before it ends.
    for now, change, name in sorted(changes, key=lambda change: (change[0], -change[1])):
        count = running.total()
        for each, threads in running.items():
            if threads:
                spent[each] += (now - before) / 1e9 * threads / count
        running[name] += change
        before = now
    return spent


def _changes(profile: Any, instructions: Collection[str]) -> Iterator[Change]:
    """Yields the beginning and the end of each instruction that computes, on all threads.

    A thread that waits for others in the middle of one is still in it.
    """
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                if event.name in instructions and not event.name.startswith(_AROUND):
                    yield event.start_ns, 1, event.name
                    yield event.start_ns + event.duration_ns, -1, event.name
