"""Traced programs computed in NumPy: nothing is compiled, so that thousands take minutes.

Every op of a jaxpr is computed as its documentation says, in the dtypes of the program. The devices
of a `shard_map` are computed side by side. Random bits are other ones than JAX's.
"""

from tests.evaluation._calls import evaluate

__all__ = ["evaluate"]
