"""Runs that are killed again and again, in each mode of saving.

The command is `python -m tests.checkpoint.killed_run FOLDER MODE=KILLS ...`.

Each attempt is a process of its own, forked from this one, which has imported JAX and not used it,
and with the compiled programs of the first: starting and compiling anew would take most of the
time. A kill is a SIGKILL that the process sends itself: after a random time, or before a random
operation on the checkpoint's folder, which is in the middle of a save. It prints what became of
each attempt in each mode; `killed.npz` and `whole.npz` in the folder of a mode are what the killed
run ended with, and one that was not killed.
"""

import dataclasses
import json
import logging
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint  # noqa: F401 - each fork would import it anew

import lora_jax
from lora_jax.checkpoint import TrainingCheckpoints

STEPS = 48
SAVE_EVERY = 2
# An attempt takes as many steps at the most, with about as many operations on files.
STEPS_OF_AN_ATTEMPT = 6
OPERATIONS = 110
SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Death:
    """When an attempt is killed: before an operation, or in a step after some time."""

    operation: int | None
    steps: int
    seconds: float


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def await_operation(folder, number):
    """Kills this process before it has done `number` operations on files of `folder`."""
    counter = iter(range(number))

    def hook(event, arguments):
        if event in ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir") and (
            str(folder) in str(arguments[0]) and next(counter, None) is None
        ):
            die()

    sys.addaudithook(hook)


def await_time(seconds):
    def sleep_and_die():
        time.sleep(seconds)
        die()

    threading.Thread(target=sleep_and_die, daemon=True).start()


def forward(params, inputs, key):
    hidden = jnp.tanh(inputs @ params["in"])
    kept = jax.random.bernoulli(key, 0.8, hidden.shape)
    return jnp.where(kept, hidden, jnp.zeros_like(hidden)) @ params["out"] + params["bias"][None]


def train(folder, death, result, asynchronous):
    """Trains to the end, from the latest checkpoint in `folder`, and writes all numbers."""
    random_state = np.random.default_rng(0)
    params = {
        "in": random_state.normal(size=(8, 32)).astype(np.float32),
        "out": random_state.normal(size=(32, 4)).astype(np.float32),
        "bias": np.zeros(4, np.float32),
    }
    tx = optax.adam(optax.cosine_decay_schedule(0.1, STEPS))
    data = np.random.default_rng(1)

    # One program: each attempt starts with it.
    @jax.jit
    def initial(params):
        wrapped = lora_jax.wrap(params, ["in", "out"], rank=2, train="bias")
        adapters, _ = lora_jax.split(wrapped)
        return wrapped, {"optimizer": tx.init(adapters), "key": jax.random.key(2)}

    wrapped, state = initial(params)
    adapters, frozen = lora_jax.split(wrapped)

    def step_function(adapters, state, inputs, labels):
        key, own = jax.random.split(state["key"])

        def loss_of(adapters):
            outputs = lora_jax.adapt(forward)(lora_jax.combine(adapters, frozen), inputs, own)
            return jnp.mean((outputs - labels) ** 2)

        loss, gradients = jax.value_and_grad(loss_of)(adapters)
        updates, optimizer = tx.update(gradients, state["optimizer"], adapters)
        return optax.apply_updates(adapters, updates), {"optimizer": optimizer, "key": key}, loss

    step_function = jax.jit(step_function, donate_argnums=(0, 1))
    start, losses = 0, []
    with TrainingCheckpoints(
        folder, keep=2, best="loss", every=SAVE_EVERY, asynchronous=asynchronous
    ) as checkpoints:
        if checkpoints.latest_step is not None:
            restored = checkpoints.restore(wrapped, state)
            adapters, _ = lora_jax.split(restored.wrapped)
            start, state = restored.step, restored.optimizer_state
            data.bit_generator.state = restored.data_position["random"]
            losses = restored.data_position["losses"]
        if death is not None and death.operation is not None:
            await_operation(folder, death.operation)
        for step in range(start + 1, STEPS + 1):
            if death is not None and step - start == death.steps:
                await_time(death.seconds)
            if death is not None and step - start > death.steps:
                die()
            inputs = data.normal(size=(16, 8)).astype(np.float32)
            labels = data.normal(size=(16, 4)).astype(np.float32)
            adapters, state, loss = step_function(adapters, state, inputs, labels)
            losses.append(float(loss))
            checkpoints.save(
                step,
                lora_jax.combine(adapters, frozen),
                state,
                data_position={"random": data.bit_generator.state, "losses": losses},
                metrics={"loss": loss},
            )
    state["key"] = jax.random.key_data(state["key"])
    leaves = jax.tree.leaves((adapters, state, np.array(losses)))
    np.savez(result, *leaves)


def waited(function, *arguments):
    """Returns how a child that calls `function` ended."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function(*arguments)
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_again_and_again(folder, kills, asynchronous):
    """Returns how each attempt of a run ended, and those that are not killed."""
    folder.mkdir()
    random_state = random.Random(0)
    # The second call compiles what only a run that goes on needs.
    codes = [
        waited(train, folder / "unkilled", None, folder / name, asynchronous)
        for name in ("whole.npz", "resumed.npz")
    ]
    checkpoints, attempts = folder / "checkpoints", []
    for attempt in range(kills):
        in_save = attempt % 2 == 0
        death = Death(
            operation=random_state.randrange(OPERATIONS) if in_save else None,
            steps=STEPS_OF_AN_ATTEMPT
            if in_save
            else 1 + random_state.randrange(STEPS_OF_AN_ATTEMPT),
            seconds=random_state.uniform(0, SECONDS),
        )
        code = waited(train, checkpoints, death, folder / "killed.npz", asynchronous)
        left = sorted(path.name for path in checkpoints.glob("*")) if checkpoints.exists() else []
        attempts.append({**dataclasses.asdict(death), "code": code, "left": left})
    codes.append(waited(train, checkpoints, None, folder / "killed.npz", asynchronous))
    return {"attempts": attempts, "codes": codes}


def main(folder, kills):
    """Prints what became of the run in each mode; `kills` says how often it is killed."""
    jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    reports = {
        mode: killed_again_and_again(folder / mode, count, mode == "asynchronous")
        for mode, count in kills.items()
    }
    print(json.dumps(reports))


if __name__ == "__main__":
    # Orbax warns where saving is slow, as it is on a machine with other work.
    logging.getLogger("absl").setLevel(logging.ERROR)
    pairs = (argument.split("=") for argument in sys.argv[2:])
    main(Path(sys.argv[1]), {mode: int(count) for mode, count in pairs})
