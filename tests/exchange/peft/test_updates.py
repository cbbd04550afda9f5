"""Steps of the optimisers beside those of Hugging Face PEFT, from the same values."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax.updates import lora_fa, lora_plus, riemannian
from tests.agreement import assert_agree

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
peft_optimizers = pytest.importorskip("peft.optimizers")

SIZES = {"first": (6, 5), "second": (5, 4)}
RANK, ALPHA = 3, 6
RATE, DECAY, STEPS = 1e-2, 0.1, 3


@pytest.fixture(autouse=True)
def standard_promotion() -> Iterator[None]:
    """Optax raises a rate to the power of an integer count, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, (inputs, outputs) in SIZES.items():
            setattr(self, name, torch.nn.Linear(inputs, outputs, bias=False))


def random_factors(seed: int) -> dict[str, tuple[Any, Any]]:
    """Returns lora_A (in, r) and lora_B (r, out) for each weight."""
    generator = np.random.default_rng(seed)
    return {
        name: (
            generator.normal(size=(inputs, RANK)).astype(np.float32),
            generator.normal(size=(RANK, outputs)).astype(np.float32),
        )
        for name, (inputs, outputs) in SIZES.items()
    }


def gradients_of_steps() -> list[dict[str, tuple[Any, Any]]]:
    return [random_factors(seed=1 + step) for step in range(STEPS)]


def torch_factors(model: Any, name: str) -> tuple[Any, Any]:
    layer = getattr(model.base_model.model, name)
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def peft_result(optimizer_of: Callable[[Any], Any]) -> dict[str, tuple[Any, Any]]:
    """Returns the factors after steps of PEFT's optimiser along the given gradients."""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(SIZES))
    model = peft.get_peft_model(Network(), config)
    for name, values in random_factors(seed=0).items():
        for parameter, value in zip(torch_factors(model, name), values, strict=True):
            parameter.data = torch.tensor(value.T.copy())
    optimizer = optimizer_of(model)
    for gradients in gradients_of_steps():
        for name, values in gradients.items():
            for parameter, value in zip(torch_factors(model, name), values, strict=True):
                parameter.grad = torch.tensor(value.T.copy())
        optimizer.step()
    return {
        name: tuple(factor.detach().numpy().T for factor in torch_factors(model, name))
        for name in SIZES
    }


def as_tree(factors: dict[str, tuple[Any, Any]], wrapped: Any) -> Any:
    """Returns the factors in a tree like `wrapped`, beside a base and a scale of zero."""
    zeros = jax.tree.map(jnp.zeros_like, lora_jax.split(wrapped)[1])
    nodes = {
        name: lora_jax.LoRAWeight(None, jnp.asarray(A), jnp.asarray(B), None, ("in", "out"))
        for name, (A, B) in factors.items()
    }
    return lora_jax.combine(nodes, zeros)


def our_result(tx: Any) -> dict[str, tuple[Any, Any]]:
    params = {name: jnp.zeros(size) for name, size in SIZES.items()}
    wrapped = lora_jax.wrap(params, lambda path, leaf: True, rank=RANK, alpha=ALPHA)
    _, frozen = lora_jax.split(wrapped)
    adapters, _ = lora_jax.split(as_tree(random_factors(seed=0), wrapped))
    wrapped = lora_jax.combine(adapters, frozen)
    tx = lora_jax.optimizer(tx)
    state = tx.init(wrapped)
    for gradients in gradients_of_steps():
        updates, state = tx.update(as_tree(gradients, wrapped), state, wrapped)
        wrapped = optax.apply_updates(wrapped, updates)
    return {name: (wrapped[name].lora_A, wrapped[name].lora_B) for name in SIZES}


def assert_same(ours: dict[str, tuple[Any, Any]], theirs: dict[str, tuple[Any, Any]]) -> None:
    for name in SIZES:
        for our_factor, their_factor in zip(ours[name], theirs[name], strict=True):
            assert_agree(our_factor, their_factor)


INNER: dict[str, tuple[Callable[[], Any], str, dict[str, float]]] = {
    "sgd": (lambda: optax.sgd(RATE), "SGD", {}),
    "adamw": (lambda: optax.adamw(RATE, weight_decay=DECAY), "AdamW", {"weight_decay": DECAY}),
}
each_inner = pytest.mark.parametrize(("inner", "name", "options"), INNER.values(), ids=INNER)


@each_inner
def test_lora_plus(inner: Callable[[], Any], name: str, options: dict[str, float]) -> None:
    renamed = {f"loraplus_{option}": value for option, value in options.items()}
    theirs = peft_result(
        lambda model: peft_optimizers.create_loraplus_optimizer(
            model, getattr(torch.optim, name), lr=RATE, loraplus_lr_ratio=16.0, **renamed
        )
    )
    assert_same(our_result(optax.chain(inner(), lora_plus(16.0))), theirs)


@each_inner
def test_riemannian(inner: Callable[[], Any], name: str, options: dict[str, float]) -> None:
    theirs = peft_result(
        lambda model: peft_optimizers.create_riemannian_optimizer(
            model, getattr(torch.optim, name), lr=RATE, **options
        )
    )
    assert_same(our_result(optax.chain(riemannian(), inner())), theirs)


def adam_of_transformers(rate: float, decay: float) -> optax.GradientTransformation:
    """Returns the AdamW that PEFT builds LoRA-FA on.

    Its epsilon is added before the second moment's bias is corrected, and its weight decay is that
    of the weights after the step.
    """

    def init(params: Any) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return 0, zeros, zeros

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        step, first, second = state
        step += 1
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, updates)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, second, updates)
        size = rate * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)

        def moved(m: Any, v: Any, value: Any) -> Any:
            change = -size * m / (jnp.sqrt(v) + 1e-6)
            return change - rate * decay * (value + change)

        return jax.tree.map(moved, first, second, params), (step, first, second)

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize("decay", [0.0, DECAY])
def test_lora_fa(decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # PEFT multiplies in bfloat16 wherever the machine can.
    monkeypatch.setattr(peft_optimizers.lorafa, "is_bf16_available", lambda: False)
    theirs = peft_result(
        lambda model: peft_optimizers.create_lorafa_optimizer(
            model, r=RANK, lora_alpha=ALPHA, lr=RATE, weight_decay=decay
        )
    )
    assert_same(our_result(lora_fa(adam_of_transformers(RATE, decay))), theirs)
