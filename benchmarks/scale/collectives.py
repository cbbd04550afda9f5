"""The collectives of a compiled program, as often as it runs them."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\([^\n]*\) -> [^\n]*)?\{$")
_COLLECTIVE = re.compile(rf" ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"(?:body|to_apply|calls)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"(\d+)"')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_CONSTANT = re.compile(r"\b[su]32\[\]\S* constant\((\d+)\)")
_ARRAY = re.compile(r"\b(?:pred|[a-z]+\d+\w*)\[[\d,]*\]")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_BITS = re.compile(r"\d+")


@dataclasses.dataclass
class Traffic:
    """How often a program runs a collective, and the bytes that a device gets from it."""

    count: int = 0
    bytes: int = 0


def collectives(text: str) -> dict[str, Traffic]:
    """Returns what a compiled program moves between devices, by the kind of collective.

    A collective in the body of a loop counts as often as the loop runs; in each branch of a
    conditional it counts once.

    Args:
      text: the compiled program, as XLA writes it.
    """
    computations, entry = _parsed(text)
    found: dict[str, Traffic] = collections.defaultdict(Traffic)
    for kind, size, times in _counted_once(_runs(computations, entry, 1)):
        found[kind].count += times
        found[kind].bytes += times * size
    return dict(found)


def _parsed(text: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    current, entry = "", ""
    for line in text.splitlines():
        heading = _COMPUTATION.match(line)
        if heading:
            current = heading[1]
            computations[current] = []
            entry = current if line.startswith("ENTRY") else entry
        elif current:
            computations[current].append(line)
    return computations, entry


def _runs(computations: dict[str, list[str]], name: str, times: int) -> Iterator[tuple[str, int]]:
    """Yields the instructions of a computation that are collectives, and how often each runs."""
    for line in computations.get(name, ()):
        if _COLLECTIVE.search(line):
            yield line, times
        for each in _called(line):
            yield from _runs(computations, each, times * _trips(computations, line))


def _counted_once(runs: Iterable[tuple[str, int]]) -> Iterator[tuple[str, int, int]]:
    """Yields the kind of each collective, its bytes, and how often it runs.

    A TPU takes a collective forward beside other work, in several fusions of which each holds the
    instruction, some within a loop: they have a chain and a channel in common, and are one.
    """
    in_chains: dict[str, tuple[str, int, int]] = {}
    for line, times in runs:
        collective = _COLLECTIVE.search(line)
        assert collective is not None
        result = line[: collective.start()].partition(" = ")[2]
        size = _result_bytes(result, is_started=bool(collective[2]))
        channel = _CHANNEL.search(line)
        if channel is None or "chain_id=" not in line:
            yield collective[1], size, times
        elif channel[1] not in in_chains or times < in_chains[channel[1]][2]:
            in_chains[channel[1]] = collective[1], size, times
    yield from in_chains.values()


def _trips(computations: dict[str, list[str]], line: str) -> int:
    """Returns how often an instruction runs its bodies: a loop counts up to a constant."""
    known, condition = _TRIPS.search(line), _CONDITION.search(line)
    if known is not None:
        return int(known[1])
    if condition is None:
        return 1
    text = "\n".join(computations.get(condition[1], ()))
    return max(map(int, _CONSTANT.findall(text)), default=1)


def _called(line: str) -> list[str]:
    branches = [each.strip().lstrip("%") for m in _BRANCHES.findall(line) for each in m.split(",")]
    return [*_CALLED.findall(line), *branches]


def _result_bytes(result: str, *, is_started: bool) -> int:
    """Returns the bytes of a result; an asynchronous one has its operands in front."""
    arrays = [each for each in _ARRAY.findall(result) if not each.startswith("u32[]")]
    first = len(arrays) // 2 if is_started else 0
    return sum(map(_bytes, arrays[first:]))


def _bytes(array: str) -> int:
    dtype, _, shape = array.rstrip("]").partition("[")
    bits = 8 if dtype == "pred" else int(next(iter(_BITS.findall(dtype))))
    return math.prod(int(size) for size in shape.split(",") if size) * bits // 8
