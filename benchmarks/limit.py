"""How close a LoRA step comes to what no LoRA step can beat.

The limit is the frozen model's own forward pass and the gradient of its inputs. Beside it stand the
steps that give the gradients of the factors too, with LoRA written into the model by hand and with
`lora_jax.adapt`, for layers that are scanned over and for the study on language models. On the
machine at hand the three take turns and are timed; for a machine that is not there they are
compiled, and its compiler says what they cost.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from benchmarks.limit_models import LARGE, TIMED
from benchmarks.machines import MACHINES, compiler_versions, devices_of, shapes_on
from benchmarks.measuring import MeasuringParser, write_found
from benchmarks.models import Model
from benchmarks.programs import Cost, Program, adapted, base_function, by_hand, wrapped_params
from experiments.common.console import Console
from experiments.common.errors import exit_code
from experiments.common.options import positive_int
from experiments.common.tables import Table
from experiments.common.timing import rounds_of_milliseconds

LIMIT, BY_HAND, ADAPT = "limit", "by hand", "adapt"
_HERE = "here"
_HEADER = ("rank", "step", "ms", "× limit", "GFLOP", "GB accessed", "temporary MB")
_EPILOG = """\
examples:
  python -m benchmarks.limit
  python -m benchmarks.limit --model feed-forward --rank 64 --rounds 20
  python -m benchmarks.limit --model smollm2 --rank 8
  python -m benchmarks.limit --machine tpu-v5p --dtype bfloat16
"""


@dataclasses.dataclass(frozen=True)
class Found:
    """What one step costs.

    Attributes:
      rank: the rank of the adapters.
      step: which step.
      milliseconds: the median, or the compiler's estimate; None where it has none.
      of_limit: the median of the ratios to the limit, or the ratio of the estimates.
      cost: as the compiler counts; a loop's body counts once.
    """

    rank: int
    step: str
    milliseconds: float | None
    of_limit: float | None
    cost: Cost


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the tables, and returns the exit code."""
    return exit_code(lambda: _run(_parser().parse_args(argv)))


def _run(options: argparse.Namespace) -> None:
    is_here = options.machine == _HERE
    if not is_here:
        # Compilers of accelerators do not need one, and JAX must not look for it.
        jax.config.update("jax_platforms", "cpu")
    model, console = TIMED[options.model]() if is_here else LARGE, Console()
    where = jax.devices()[0].device_kind if is_here else options.machine
    found: list[Found] = []
    try:
        for rank in options.rank or [8, 64]:
            steps = steps_of(dataclasses.replace(model, rank=rank), jnp.dtype(options.dtype))
            if is_here:
                found += _timed(rank, steps, options.rounds, console)
            else:
                found += _estimated(rank, steps, options.machine)
    finally:
        # What was measured before an interruption or an error is not lost.
        if found:
            described: dict[str, Any] = {
                "machine": where,
                "model": model.description,
                "factors": options.dtype,
            }
            if not is_here:
                described["versions"] = compiler_versions()
            metrics = {**described, "steps": list(map(dataclasses.asdict, found))}
            _table(metrics).show(console)
            write_found(options, metrics)


def steps_of(model: Model, dtype: Any) -> Mapping[str, Program]:
    """Returns each step as a program.

    Args:
      model: the model.
      dtype: the dtype of the factors.
    """
    plain = base_function(model)
    adapters, frozen = lora_jax.split(wrapped_params(model, dtype=dtype))

    def with_factors(forward: Callable[[Any, Any], Any]) -> Program:
        def loss(adapters: Any, x: Any, frozen: Any) -> Any:
            return model.loss(forward(lora_jax.combine(adapters, frozen), x))

        return Program(jax.grad(loss, argnums=(0, 1)), (adapters, model.inputs, frozen))

    limit = jax.grad(lambda x, params: model.loss(plain(params, x)))
    return {
        LIMIT: Program(limit, (model.inputs, model.params)),
        BY_HAND: with_factors(by_hand(model)),
        ADAPT: with_factors(adapted(model)),
    }


def _timed(
    rank: int, steps: Mapping[str, Program], rounds: int, console: Console
) -> Sequence[Found]:
    compiled = {name: step.lowered().compile() for name, step in steps.items()}
    calls = {
        name: functools.partial(compiled[name], *_arrays(step.arguments))
        for name, step in steps.items()
    }
    description = f"Timing steps of rank {rank}"
    times = rounds_of_milliseconds(calls, rounds, console=console, description=description)
    return [
        Found(
            rank,
            name,
            float(np.median(times[name])),
            float(np.median(times[name] / times[LIMIT])),
            Cost.of(compiled[name]),
        )
        for name in steps
    ]


def _arrays(shapes: Any) -> Any:
    """Returns arrays that keep activations near 1."""
    random = np.random.default_rng(0)

    def array(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        depth = leaf.shape[-2] if len(leaf.shape) > 1 else 1
        return jnp.asarray(random.standard_normal(leaf.shape) * depth**-0.5, leaf.dtype)

    return jax.tree.map(array, shapes)


def _estimated(rank: int, steps: Mapping[str, Program], machine: str) -> Sequence[Found]:
    device = devices_of(machine, min(MACHINES[machine].topologies))[0]
    compiled = {
        name: dataclasses.replace(step, arguments=shapes_on(device, step.arguments))
        .lowered()
        .compile()
        for name, step in steps.items()
    }
    seconds = {name: step.cost_analysis().get("optimal_seconds") for name, step in compiled.items()}
    return [
        Found(
            rank,
            name,
            None if seconds[name] is None else 1e3 * seconds[name],
            None if seconds[name] is None else seconds[name] / seconds[LIMIT],
            Cost.of(compiled[name]),
        )
        for name in steps
    ]


def tables(metrics: Mapping[str, Any]) -> list[Table]:
    """Returns what `--json` writes, as a table."""
    return [_table(metrics)]


def _table(metrics: Mapping[str, Any]) -> Table:
    title = f"{metrics['model']}; {metrics['factors']} factors; {metrics['machine']}"
    return Table(title, _HEADER, list(map(_cells, metrics["steps"])))


def _cells(step: Mapping[str, Any]) -> list[str]:
    milliseconds, of_limit, cost = step["milliseconds"], step["of_limit"], step["cost"]
    return [
        str(step["rank"]),
        step["step"],
        "" if milliseconds is None else f"{milliseconds:.1f}",
        "" if of_limit is None else f"{of_limit:.3f}",
        f"{cost['flops'] / 1e9:.1f}",
        f"{cost['bytes'] / 1e9:.2f}",
        f"{cost['temporary_bytes'] / 1e6:.0f}",
    ]


def _parser() -> MeasuringParser:
    parser = MeasuringParser("limit", __doc__, epilog=_EPILOG)
    parser.add_argument(
        "--model",
        choices=list(TIMED),
        default="llama",
        help="what is timed here: layers, or the study on language models (smollm2); default: "
        "llama; for other machines layers of Llama 3 8B",
    )
    parser.add_argument(
        "--rank", type=positive_int, action="append", help="repeatable; default: 8 and 64"
    )
    parser.add_argument(
        "--machine",
        choices=[_HERE, *(name for name in MACHINES if MACHINES[name].platform == "tpu")],
        default=_HERE,
        help="compile for a machine that need not be there, without timing (default: this one)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of the factors; weights have float32 here, bfloat16 elsewhere",
    )
    parser.add_argument("--rounds", type=positive_int, default=10, help="turns of each step")
    return parser


if __name__ == "__main__":
    sys.exit(main())
