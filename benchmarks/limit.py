"""How close a LoRA step comes to what no LoRA step can beat.

The limit is the frozen model's own forward pass and the gradient of its inputs. Beside it stand the
gradients of the factors too, with LoRA written into the model by hand and with `lora_jax.adapt`,
for Llama-shaped blocks that are scanned over. On the machine at hand the three take turns and are
timed; for a machine that is not there they are compiled, and its compiler says what they cost.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from benchmarks.llama_blocks import LARGE, SMALL, TARGETS, Sizes, loss, shapes
from benchmarks.machines import MACHINES, devices_of, whole_on
from benchmarks.operations import PLAIN, WrittenByHand, with_factors
from experiments.common.console import Console
from experiments.common.errors import exit_code
from experiments.common.files import write_json
from experiments.common.options import Parser, positive_int
from experiments.common.timing import rounds_of_milliseconds

LIMIT, BY_HAND, ADAPT = "limit", "by hand", "adapt"
_HERE = "here"
SCALE = 2.0
_HEADER = ("rank", "step", "ms", "× limit", "GFLOP", "GB accessed", "temporary MB")
_EPILOG = """\
examples:
  python -m benchmarks.limit
  python -m benchmarks.limit --rank 64 --rounds 20
  python -m benchmarks.limit --machine tpu-v5p --dtype bfloat16
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the tables, and returns the exit code."""
    return exit_code(lambda: _run(_parser().parse_args(argv)))


def _run(options: argparse.Namespace) -> None:
    console, found = Console(), []
    is_here = options.machine == _HERE
    if not is_here:
        # Compilers of accelerators do not need one, and JAX must not look for it.
        jax.config.update("jax_platforms", "cpu")
    for rank in options.rank or [8, 64]:
        sizes = SMALL if is_here else LARGE
        steps = compiled_steps(sizes, rank, jnp.dtype(options.dtype), options.machine)
        times = _times(steps, sizes, rank, options, console) if is_here else {}
        found += [_costs(rank, name, step, times) for name, (step, _) in steps.items()]
    rows = [_cells(each, found) for each in found]
    where = f"{jax.devices()[0].device_kind}" if is_here else options.machine
    dtype = "float32" if is_here else "bfloat16"
    console.rule(f"{dtype} weights, {options.dtype} factors, {where}, JAX {jax.__version__}")
    console.table(_HEADER, rows)
    if options.json:
        write_json(options.json, {"machine": where, "factors": options.dtype, "steps": found})


def compiled_steps(
    sizes: Sizes, rank: int, dtype: Any, machine: str = _HERE
) -> Mapping[str, tuple[jax.stages.Compiled, Any]]:
    """Returns the three steps compiled, each with the shapes of its arguments.

    Args:
      sizes: the sizes of the blocks.
      rank: the rank of the adapters.
      dtype: the dtype of the factors.
      machine: the name of a machine to compile for; this one unless given.
    """
    compiled = {}
    for name, (step, arguments) in steps_of(sizes, rank, dtype).items():
        placed = arguments if machine == _HERE else _on(machine, arguments)
        compiled[name] = jax.jit(step).lower(*placed).compile(), arguments
    return compiled


def steps_of(sizes: Sizes, rank: int, dtype: Any) -> Mapping[str, tuple[Callable[..., Any], Any]]:
    """Returns each step, a function, and the shapes of its arguments."""
    params = shapes(sizes)
    axes = {name: ("batch", "in", "out") for name, leaf in params.items() if len(leaf.shape) == 3}
    wrapped = lora_jax.wrap(params, TARGETS, rank=rank, alpha=SCALE * rank, axes=axes, dtype=dtype)
    adapters, frozen = lora_jax.split(wrapped)
    x = jax.ShapeDtypeStruct((sizes.examples, sizes.length, sizes.embed), sizes.dtype)
    model = functools.partial(loss, sizes)

    def by_hand(wrapped: Any, x: Any) -> Any:
        return model(WrittenByHand(SCALE), with_factors(wrapped), x)

    def plain(params: Any, x: Any) -> Any:
        return model(PLAIN, params, x)

    def gradients(forward: Callable[[Any, Any], Any]) -> Callable[..., Any]:
        def of_halves(adapters: Any, x: Any, frozen: Any) -> Any:
            return forward(lora_jax.combine(adapters, frozen), x)

        return jax.grad(of_halves, argnums=(0, 1))

    adapted = lora_jax.adapt(plain, on_materialize="error")
    return {
        LIMIT: (jax.grad(plain, argnums=1), (params, x)),
        BY_HAND: (gradients(by_hand), (adapters, x, frozen)),
        ADAPT: (gradients(adapted), (adapters, x, frozen)),
    }


def _on(machine: str, arguments: Any) -> Any:
    """Returns shapes on one device of a machine."""
    where = whole_on(devices_of(machine, min(MACHINES[machine].topologies))[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), arguments
    )


def _times(
    steps: Mapping[str, tuple[Any, Any]],
    sizes: Sizes,
    rank: int,
    options: argparse.Namespace,
    console: Console,
) -> Mapping[str, Any]:
    made = {name: (step, _arrays(shapes)) for name, (step, shapes) in steps.items()}
    return rounds_of_milliseconds(
        {name: functools.partial(step, *arguments) for name, (step, arguments) in made.items()},
        options.rounds,
        console=console,
        description=f"rank {rank}, {sizes.examples} × {sizes.length} tokens",
    )


def _arrays(shapes: Any) -> Any:
    """Returns arrays that keep activations near 1."""
    random = np.random.default_rng(0)

    def array(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        depth = leaf.shape[-2] if len(leaf.shape) > 1 else 1
        return jnp.asarray(random.standard_normal(leaf.shape) * depth**-0.5, leaf.dtype)

    return jax.tree.map(array, shapes)


def _costs(rank: int, name: str, step: Any, times: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what one step costs; its time is the compiler's estimate where it was not run."""
    analysis, estimate = step.cost_analysis(), step.cost_analysis().get("optimal_seconds")
    if times:
        ms, ratio = float(np.median(times[name])), float(np.median(times[name] / times[LIMIT]))
    else:
        ms, ratio = None if estimate is None else 1e3 * estimate, None
    return {
        "rank": rank,
        "step": name,
        "ms": ms,
        "ratio": ratio,
        "flops": analysis["flops"],
        "bytes": analysis["bytes accessed"],
        "temporary_bytes": step.memory_analysis().temp_size_in_bytes,
    }


def _cells(found: dict[str, Any], everything: Sequence[dict[str, Any]]) -> list[str]:
    limit = next(
        each for each in everything if each["step"] == LIMIT and each["rank"] == found["rank"]
    )
    ratio = found["ratio"]
    if ratio is None and found["ms"] is not None:
        ratio = found["ms"] / limit["ms"]
    return [
        str(found["rank"]),
        found["step"],
        "" if found["ms"] is None else f"{found['ms']:.1f}",
        "" if ratio is None else f"{ratio:.3f}",
        f"{found['flops'] / 1e9:.1f}",
        f"{found['bytes'] / 1e9:.2f}",
        f"{found['temporary_bytes'] / 1e6:.0f}",
    ]


def _parser() -> Parser:
    parser = Parser(
        prog="python -m benchmarks.limit",
        description=__doc__,
        epilog=_EPILOG,
    )
    parser.add_argument(
        "--rank", type=positive_int, action="append", help="repeatable; default: 8 and 64"
    )
    parser.add_argument(
        "--machine",
        choices=[_HERE, *MACHINES],
        default=_HERE,
        help="compile for a machine that need not be there, without timing (default: this one)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of the factors (default: float32); weights have float32 here, bfloat16 elsewhere",
    )
    parser.add_argument(
        "--rounds", type=positive_int, default=10, help="turns of each step (default: 10)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to a file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
