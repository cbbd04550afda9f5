"""One process of a training run: `python -m tests.processes.worker '{"processes": 2, ...}'`.

A network of two layers is trained on a mesh over all processes. Each step's checkpoint is saved by
all of them, and a run goes on from the latest.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import sharding
from lora_jax.checkpoint import TrainingCheckpoints
from lora_jax.checkpoint._state import Description
from lora_jax.exchange import peft
from tests.agreement import assert_agree

DEVICES = 8
NAMES = [peft.Rule(f"{name}.weight", name) for name in ("up", "down")]
NAMES += [peft.Rule("down.bias", "bias")]
RULES = {"up": P("data", "model"), "down": P("model", "data")}


@dataclasses.dataclass(frozen=True)
class Run:
    """What one process is told.

    Attributes:
      processes: how many there are.
      process: which one this is.
      port: that of the first one.
      folder: where checkpoints and results go.
      steps: how many steps to train.
      dies_at: the step whose checkpoint is never complete, as a process dies while it saves; None
        for never.
      dies: whether that is the last process, which has written nothing yet, or the first one, when
        all is written and nothing renamed.
      explicit: whether the axes of the mesh are explicit.
    """

    processes: int
    process: int
    port: int
    folder: str
    steps: int
    dies_at: int | None = None
    dies: Literal["writing", "committing"] = "writing"
    explicit: bool = False


def params() -> Any:
    random = np.random.default_rng(0)
    return {
        "up": random.standard_normal((16, 32), np.float32) / 4,
        "down": random.standard_normal((32, 16), np.float32) / 6,
        "bias": random.standard_normal(16).astype(np.float32),
    }


def model(params: Any, x: Any) -> Any:
    whole = P("data", None)
    hidden = jnp.tanh(jnp.einsum("bi,io->bo", x, params["up"], out_sharding=whole))
    y = jnp.einsum("bi,io->bo", hidden, params["down"], out_sharding=whole)
    return y + params["bias"][None]


def automatic(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["up"]) @ params["down"] + params["bias"][None]


def on_all(tree: Any, shardings: Any) -> Any:
    """Returns arrays that each process has whole as arrays that are cut over all of them."""

    def placed(leaf: np.ndarray, where: Any) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, where, lambda index: leaf[index])

    return jax.tree.map(placed, tree, shardings)


def batch(step: int) -> np.ndarray:
    return np.random.default_rng([1, step]).standard_normal((8, 16), np.float32)


def train(run: Run) -> None:
    kinds = (AxisType.Explicit if run.explicit else AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, DEVICES // 2), ("data", "model"), axis_types=kinds)
    folder = Path(run.folder)
    with jax.set_mesh(mesh):
        plain = on_all(params(), sharding.of(params(), mesh, rules=RULES))
        wrapped = lora_jax.wrap(plain, "up|down", rank=2, dora=True, train="bias")
        shardings = sharding.of(wrapped, mesh)
        tx = lora_jax.optimizer(optax.adam(1e-2))
        of_state = sharding.of_state(tx, wrapped)
        state = jax.jit(tx.init, out_shardings=of_state)(wrapped)
        fn = lora_jax.adapt(model if run.explicit else automatic)

        @jax.jit
        def step_of(wrapped: Any, state: Any, x: Any) -> Any:
            gradients = jax.grad(lambda w: jnp.mean(jnp.square(fn(w, x) - x)))(wrapped)
            updates, state = tx.update(gradients, state, wrapped)
            return optax.apply_updates(wrapped, updates), state

        rows = NamedSharding(mesh, P("data"))
        with TrainingCheckpoints(folder / "run", keep=2) as checkpoints:
            start = 0
            if checkpoints.latest_step is not None:
                restored = checkpoints.restore(wrapped, state)
                wrapped, state = restored.wrapped, restored.optimizer_state
                start = restored.step
            for step in range(start, run.steps):
                if step + 1 == run.dies_at:
                    checkpoints.wait()
                    die_in_the_next_save(run)
                wrapped, state = step_of(wrapped, state, on_all(batch(step), rows))
                checkpoints.save(step + 1, wrapped, state)
        check_that_a_process_holds_its_part(wrapped, run)
        save_and_restore(wrapped, plain, folder, shardings)
        peft.save(folder / "peft", wrapped, names=NAMES)
        results = jax.jit(lora_jax.merge, out_shardings=NamedSharding(mesh, P()))(wrapped)
        results = jax.tree.map(lambda leaf: np.asarray(leaf.addressable_shards[0].data), results)
    if run.process == 0:
        loaded = lora_jax.merge(peft.load(folder / "peft", params(), names=NAMES))
        assert_agree(loaded, results)
        np.savez(folder / "results.npz", **results, start=start)


def die_in_the_next_save(run: Run) -> None:
    """Lets one process die as if it were killed in the middle of a checkpoint."""

    def die(*_: Any, **__: Any) -> None:
        os._exit(9)

    if run.dies == "writing" and run.process == run.processes - 1:
        ocp.CheckpointManager.save = die
    if run.dies == "committing" and run.process == 0:
        Description.write = die  # type: ignore[method-assign]


def check_that_a_process_holds_its_part(wrapped: Any, run: Run) -> None:
    node = wrapped["up"]
    held = {shard.data.shape for shard in node.lora_A.addressable_shards}
    assert held == {(8, 2)}, held
    assert len(node.base.addressable_shards) == DEVICES // run.processes
    assert node.lora_A.is_fully_addressable == (run.processes == 1)


def save_and_restore(wrapped: Any, plain: Any, folder: Path, shardings: Any) -> None:
    """Saves adapters and reads them onto the mesh, bit for bit; all processes get an error."""
    lora_jax.save(folder / "adapters", wrapped, overwrite=True)
    like = sharding.abstract(wrapped, shardings)
    restored = lora_jax.restore(folder / "adapters", plain, like=like)
    for name in ("up", "down"):
        for leaf in ("lora_A", "lora_B", "magnitude"):
            found, saved = (getattr(tree[name], leaf) for tree in (restored, wrapped))
            assert found.sharding.is_equivalent_to(saved.sharding, found.ndim)
            for one, other in zip(found.addressable_shards, saved.addressable_shards, strict=True):
                np.testing.assert_array_equal(one.data, other.data)
    with pytest.raises(lora_jax.CheckpointError, match="holds a checkpoint"):
        lora_jax.save(folder / "adapters", wrapped)


def main(told: str) -> None:
    run = Run(**json.loads(told))
    jax.config.update("jax_num_cpu_devices", DEVICES // run.processes)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if run.processes > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{run.port}",
            run.processes,
            run.process,
            # A process that dies is found in seconds; by default the others hang for minutes.
            heartbeat_timeout_seconds=10,
            initialization_timeout=60,
        )
    train(run)


if __name__ == "__main__":
    main(sys.argv[1])
