"""The data position as JSON: plain values as they are, and what JSON lacks beside its type."""

import base64
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._folders import CheckpointError

_TYPE = "$type"
_PLAIN = (bool, int, float, str, type(None))


def position_to_json(value: Any, place: str = "") -> Any:
    """Returns a data position in terms of JSON; `place` is where it stands within the whole."""
    if type(value) in _PLAIN:
        return value
    if type(value) in (list, tuple):
        items = [position_to_json(each, f"{place}/{i}") for i, each in enumerate(value)]
        return items if type(value) is list else {_TYPE: "tuple", "items": items}
    if type(value) is dict:
        if any(type(name) is not str or name == _TYPE for name in value):
            raise _unexpected(place, f"a dict with the keys {list(value)}")
        return {name: position_to_json(each, f"{place}/{name}") for name, each in value.items()}
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return _array_to_json(value, place)
    raise _unexpected(place, f"a {type(value).__name__}")


def position_from_json(value: Any) -> Any:
    """Returns the data position of which `position_to_json` returned this."""
    if isinstance(value, list):
        return [position_from_json(each) for each in value]
    if not isinstance(value, dict):
        return value
    if _TYPE not in value:
        return {name: position_from_json(each) for name, each in value.items()}
    if value[_TYPE] == "tuple":
        return tuple(position_from_json(each) for each in value["items"])
    array = np.frombuffer(base64.b64decode(value["data"]), jnp.dtype(value["dtype"]))
    array = array.reshape(value["shape"]).copy()
    if value[_TYPE] == "key":
        return jax.random.wrap_key_data(jnp.asarray(array), impl=value["implementation"])
    return array[()] if value[_TYPE] == "scalar" else array


def _array_to_json(array: Any, place: str) -> dict[str, Any]:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        implementation = str(jax.random.key_impl(array))
        data = _array_to_json(np.asarray(jax.random.key_data(array)), place)
        return {**data, _TYPE: "key", "implementation": implementation}
    if array.dtype.hasobject or array.dtype.names:
        raise _unexpected(place, f"an array of {array.dtype}")
    return {
        _TYPE: "scalar" if isinstance(array, np.generic) else "array",
        "dtype": str(array.dtype),
        "shape": list(array.shape),
        "data": base64.b64encode(np.asarray(array).tobytes()).decode(),
    }


def _unexpected(place: str, what: str) -> CheckpointError:
    where = f" at '{place[1:]}'" if place else ""
    return CheckpointError(
        f"`data_position` has {what}{where}; expected numbers, text, booleans, None, arrays and "
        "random keys, in lists, tuples and dicts with text for keys. A NumPy generator is stored "
        "as `generator.bit_generator.state`."
    )
