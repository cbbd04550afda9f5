"""What the processes of one program do together: the first one writes, and all learn of it."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax._folders import CheckpointError

# The bytes of the longest message.
_LONGEST = 4096


def is_shared(array: Any) -> bool:
    """Says whether other processes hold parts of an array that this one does not have."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return False
    return not array.is_fully_replicated


def of_all_processes(array: np.ndarray) -> np.ndarray:
    """Returns an array of each process, stacked; every process has to come here."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array)).reshape(-1, *array.shape)


def on_host(array: Any) -> np.ndarray:
    """Returns the numbers of an array on the first process, which writes them into a file.

    Of an array that several processes hold, the others get zeros, which take no memory. Every
    process has to come here.
    """
    if not is_shared(array):
        return np.asarray(array)
    everywhere = NamedSharding(array.sharding.mesh, PartitionSpec())
    whole = jax.jit(lambda x: x, out_shardings=everywhere)(array)
    if jax.process_index() != 0:
        return np.broadcast_to(np.zeros((), array.dtype), array.shape)
    return np.asarray(whole.addressable_data(0))


def on_first_process(action: Callable[[], str]) -> str:
    """Returns what an action returns that only the first process performs, on every process.

    Every process has to come here, and none goes on before the action is done.

    Raises:
      CheckpointError: the action failed; on the first process its own error.
    """
    if jax.process_count() == 1:
        return action()
    result, failure = "", None
    if jax.process_index() == 0:
        try:
            result = action()
        except Exception as error:
            failure = error
    succeeded, text = _broadcast(failure is None, result if failure is None else str(failure))
    if failure is not None:
        raise failure
    if not succeeded:
        raise CheckpointError(text)
    return text


def _broadcast(succeeded: bool, text: str) -> tuple[bool, str]:
    """Returns what the first process says; a text that is too long is an error's, and is cut."""
    from jax.experimental import multihost_utils

    while len(encoded := json.dumps([succeeded, text]).encode()) > _LONGEST:
        text = text[: len(text) // 2]
    sent = np.frombuffer(encoded.ljust(_LONGEST), np.uint8)
    received = multihost_utils.broadcast_one_to_all(sent)
    told_success, told_text = json.loads(np.asarray(received, np.uint8).tobytes())
    return told_success, told_text
