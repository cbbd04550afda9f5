"""Plans as tables on the terminal, as JSON, and as the tables of the documentation."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machines import CPU, GIB, MACHINES, compiler_versions
from benchmarks.scale.collectives import Traffic
from benchmarks.scale.models import MODELS
from benchmarks.scale.plans import KINDS, Plan, Task
from experiments.common.console import Console
from experiments.common.errors import InputError
from experiments.common.tables import Table

Row = tuple[Task, Plan]

_MEMORY = ("base", "trained", "optimizer", "activations", "temporaries")
# What less of is not worth a word.
_LITTLE = GIB / 20


def show(rows: Sequence[Row], console: Console) -> None:
    """Shows the memory of a device by kind, and the work."""
    task = rows[0][0]
    console.rule(
        f"memory of one device in GiB; rank {task.rank}, examples of {task.length:,} tokens"
    )
    console.table(
        ["model", "devices", "step", *_MEMORY, "total", "fits"],
        [_memory_cells(task, plan) for task, plan in rows],
    )
    console.rule("work")
    console.table(
        ["model", "devices", "step", "examples", "TFLOP/token", "moved by a device", "compiled in"],
        [_work_cells(task, plan) for task, plan in rows],
    )


def _memory_cells(task: Task, plan: Plan) -> list[str]:
    fits = plan.fits(task.machine)
    return [
        *_names(task),
        *(f"{getattr(plan, kind) / GIB:.2f}" for kind in _MEMORY),
        f"{plan.total / GIB:.1f}",
        "" if fits is None else "yes" if fits else "no",
    ]


def _work_cells(task: Task, plan: Plan) -> list[str]:
    return [
        *_names(task),
        f"{task.batch}",
        _tera(plan),
        "\n".join(_moved(plan)) or "nothing",
        f"{plan.compile_seconds:.0f} s",
    ]


def _names(task: Task) -> list[str]:
    return [task.model, f"{task.devices} {task.machine}", task.kind]


def _moved(plan: Plan) -> list[str]:
    return [
        f"{traffic.count:,} {kind} {traffic.bytes / GIB:.1f} GiB"
        for kind, traffic in sorted(plan.traffic.items())
        if traffic.bytes > _LITTLE
    ]


def _tera(plan: Plan) -> str:
    return f"{plan.flops_per_token / 1e12:.3f}"


# --- files -------------------------------------------------------------------------------------


def all_numbers(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns all numbers, with the versions that decide them, fit for JSON."""
    plans = [
        {**dataclasses.asdict(task), "batch": task.batch}
        | {**dataclasses.asdict(plan), "total": plan.total, "fits": plan.fits(task.machine)}
        for task, plan in rows
    ]
    return {"versions": compiler_versions(), "plans": plans}


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of a file with `all_numbers`.

    Raises:
      InputError: it is no such file.
    """
    try:
        plans = json.loads(path.read_text(encoding="utf-8"))["plans"]
        return [(_task(entries), _plan(entries)) for entries in plans]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{path} is no file of plans, such as --json writes: {type(error).__name__}: {error}"
        ) from error


def _task(entries: Mapping[str, Any]) -> Task:
    return Task(**{field.name: entries[field.name] for field in dataclasses.fields(Task)})


def _plan(entries: Mapping[str, Any]) -> Plan:
    values = {field.name: entries[field.name] for field in dataclasses.fields(Plan)}
    values["traffic"] = {kind: Traffic(**each) for kind, each in values["traffic"].items()}
    return Plan(**values)


# --- the documentation's tables ----------------------------------------------------------------


def tables(rows: Sequence[Row]) -> list[Table]:
    """Returns the slices with their memory and operations, and what their devices send."""
    ordered = sorted(rows, key=_place)
    return [_slices(ordered), _sent(ordered)]


def _place(row: Row) -> tuple[int, ...]:
    """Returns what orders rows by model, step and machine."""
    task, _ = row
    return (
        list(MODELS).index(task.model),
        KINDS.index(task.kind),
        [*MACHINES, CPU].index(task.machine),
    )


def _slices(rows: Sequence[Row]) -> Table:
    machines = [name for name in MACHINES if any(task.machine == name for task, _ in rows)]
    found = {(task.model, task.kind, task.machine): (task, plan) for task, plan in rows}
    steps = list(dict.fromkeys((task.model, task.kind) for task, _ in rows))
    sizes = [f"{name}, {MACHINES[name].memory / GIB:.0f} GiB" for name in machines]
    return Table(
        "The smallest slices",
        ["model", "step", "TFLOP/token", *sizes],
        [_slice_cells(step, [found.get((*step, name)) for name in machines]) for step in steps],
    )


def _slice_cells(step: tuple[str, str], of_machines: Sequence[Row | None]) -> list[str]:
    slices = [
        "" if row is None else f"{row[0].devices} × {row[1].total / GIB:.1f} GiB"
        for row in of_machines
    ]
    plan = next(row[1] for row in of_machines if row is not None)
    return [*step, _tera(plan), *slices]


def _sent(rows: Sequence[Row]) -> Table:
    return Table(
        "What devices send each other",
        ["model", "step", "chips", "a chip receives in a step"],
        [_sent_cells(row) for row in rows if row[0].devices > 1],
    )


def _sent_cells(row: Row) -> list[str]:
    task, plan = row
    return [task.model, task.kind, f"{task.devices} {task.machine}", ", ".join(_moved(plan))]
