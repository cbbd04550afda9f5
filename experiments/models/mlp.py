"""A perceptron with ReLU layers."""

from collections.abc import Callable

from flax import linen as nn
from jaxtyping import Array, Float


def unchanged(inputs: Array) -> Array:
    return inputs


class MLP(nn.Module):
    """ReLU layers `hidden_1`, `hidden_2`, ... and a linear layer `output`."""

    hidden: tuple[int, ...]
    classes: int
    preprocess: Callable[[Array], Array] = unchanged

    @nn.compact
    def __call__(self, inputs: Array) -> Float[Array, "batch classes"]:
        x = self.preprocess(inputs)
        for number, width in enumerate(self.hidden, start=1):
            x = nn.relu(nn.Dense(width, name=f"hidden_{number}")(x))
        return nn.Dense(self.classes, name="output")(x)
