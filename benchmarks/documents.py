"""Writes the tables of the documentation from the stored results.

Between the lines `<!-- results: NAME -->` and `<!-- end of results -->` a document holds what
benchmarks/results has under this name: tables, the command that made them, and what it ran on.
Call this after a result has been stored; nothing is measured. With --check nothing is written, and
the exit code is 1 if a document differs.
"""

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import (
    compiled_cost,
    limit,
    llama_cpp,
    mnist_step,
    peft_mnist,
    peft_profile,
    quantized,
    quantized_accuracy,
    ratios,
    serving,
)
from benchmarks.dialogsum import report as dialogsum
from benchmarks.dialogsum.cells import GRIDS
from benchmarks.dialogsum.speed import NAME as SPEED
from benchmarks.peers import llm_report, text_report
from benchmarks.scale import report as scale
from benchmarks.stored import RESULTS, ResultStore
from benchmarks.studies.tables import STUDIES
from experiments.common.errors import InputError, exit_code
from experiments.common.options import Parser
from experiments.common.tables import Table

ROOT = Path(__file__).parents[1]
_BEGIN, _END = "<!-- results: ", "<!-- end of results -->"
_REGION = re.compile(rf"(?<={_BEGIN})(?P<name>\S+)(?P<begin> -->\n).*?(?={_END})", re.DOTALL)
_SCALE = "scale"

Found = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Shown:
    """What documents show of stored results.

    Attributes:
      files: the names of the results, or patterns of them.
      text: returns it in Markdown.
    """

    files: Sequence[str]
    text: Callable[[], str]


def _one(name: str, tables: Callable[[Found], Sequence[Table]]) -> tuple[str, Shown]:
    """Returns the tables of one file, with its command."""

    def text() -> str:
        found = _loaded(name)
        return "\n".join([*map(_titled, tables(found)), _source(found)])

    return name, Shown([name], text)


def _cells(name: str) -> tuple[str, Shown]:
    """Returns the tables of a grid, whose cells are files of their own."""
    grid = GRIDS[name]

    def text() -> str:
        found = ResultStore(RESULTS / grid.results).load_all([*grid.cells, SPEED])
        tables = dialogsum.tables(grid, found)
        return "\n".join([*map(_titled, tables), _sources(grid.results, found.values())])

    return grid.results, Shown([f"{grid.results}/*"], text)


def _study(name: str) -> tuple[str, Shown]:
    """Returns the tables of a study."""
    return _one(f"studies/{name}", lambda found: STUDIES[name].tables(found["runs"]))


def _ratios() -> str:
    """Returns the table of several files, whose commands stand where these are shown."""
    (table,) = ratios.tables({name: _loaded(name) for name in ratios.RESULTS})
    return table.as_markdown()


def _plans() -> str:
    """Returns the plans of all files."""
    paths = sorted((RESULTS / _SCALE).glob("*.json"))
    found = [_loaded(f"{_SCALE}/{path.stem}") for path in paths]
    rows = [row for path in paths for row in scale.read_rows(path)]
    return "\n".join([*map(_titled, scale.tables(rows)), _sources(_SCALE, found)])


SHOWN: Mapping[str, Shown] = dict(
    [
        _one("compiled_cost", compiled_cost.tables),
        _one("limit_feed_forward", limit.tables),
        _one("limit_llama", limit.tables),
        _one("limit_smollm2", limit.tables),
        _one("limit_tpu_bfloat16", limit.tables),
        _one("limit_tpu_float32", limit.tables),
        _one("llama_cpp", llama_cpp.tables),
        _one("mnist_step", mnist_step.tables),
        _one("peft_llm", llm_report.tables),
        _one("peft_llm_slower", llm_report.tables),
        _one("peft_mnist", peft_mnist.tables),
        _one("peft_mnist_one_thread", peft_mnist.tables),
        _one("peft_profile", peft_profile.tables),
        _one("peft_text", text_report.tables),
        _one("quantized", quantized.tables),
        _one("quantized_accuracy", quantized_accuracy.tables),
        _one("quantized_tpu", quantized.tables),
        _one("serving", serving.tables),
        *map(_study, STUDIES),
        *map(_cells, GRIDS),
        ("plans", Shown([f"{_SCALE}/*"], _plans)),
        ("ratios", Shown(ratios.RESULTS, _ratios)),
    ]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes or checks the documents, and returns the exit code."""
    return exit_code(lambda: _run(_parser().parse_args(argv)))


def _run(options: argparse.Namespace) -> None:
    written = {path: with_results(path.read_text()) for path in documents()}
    differing = [path for path, text in written.items() if text != path.read_text()]
    names = [str(path.relative_to(ROOT)) for path in differing]
    if options.check:
        if differing:
            raise RuntimeError(
                f"{', '.join(names)}: not what is stored; python -m benchmarks.documents"
            )
        return
    for path, name in zip(differing, names, strict=True):
        path.write_text(written[path])
        print(name)


def documents() -> Iterator[Path]:
    """Yields the documents that show results."""
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]:
        if _BEGIN in path.read_text():
            yield path


def names_in(text: str) -> list[str]:
    """Returns the names of the results that a document shows."""
    return [found["name"] for found in _REGION.finditer(text)]


def with_results(text: str) -> str:
    """Returns a document in which all tables are those of the stored results.

    Raises:
      InputError: it names a result that is not stored, or a region has no end.
    """
    if text.count(_BEGIN) != text.count(_END) or len(names_in(text)) != text.count(_END):
        raise InputError(f"a line `{_BEGIN}NAME -->` lacks its line `{_END}`, or the other way")

    def region(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in SHOWN:
            raise InputError(f"no result {name} is shown; one of {', '.join(SHOWN)}")
        return f"{name}{found['begin']}\n{SHOWN[name].text()}\n"

    return _REGION.sub(region, text)


def _loaded(name: str) -> Found:
    found = ResultStore(RESULTS).load(name)
    if found is None:
        raise InputError(f"{RESULTS / name}.json is not there: its command writes it, with --json")
    return found


def _titled(table: Table) -> str:
    return f"**{table.title}**\n\n{table.as_markdown()}"


def _source(found: Found) -> str:
    """Returns the commands of a file, and what they ran on."""
    commands = "`, `".join(found["commands"])
    return f"`{commands}` ({', '.join(_made_on(found))})\n"


def _sources(folder: str, files: Iterable[Found]) -> str:
    """Returns where the commands of many files are, and what they ran on."""
    made_on = dict.fromkeys(each for found in files for each in _made_on(found))
    return f"Each file in `benchmarks/results/{folder}` has its commands ({', '.join(made_on)}).\n"


def _made_on(found: Found) -> Iterator[str]:
    machine, versions = found.get("made_on"), found.get("versions", {})
    yield f"JAX {versions['jax'] if machine is None else machine['jax']}"
    if machine is not None:
        cores = machine["cores"]
        yield f"{cores} core{'s' if cores > 1 else ''} of {machine['processor']}"
    yield from (f"{name} {version}" for name, version in versions.items() if name != "jax")


def _parser() -> Parser:
    parser = Parser(prog="python -m benchmarks.documents", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
