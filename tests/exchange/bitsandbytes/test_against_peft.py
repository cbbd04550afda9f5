"""Training on a bitsandbytes base beside PEFT: the same codes, the same adapters, 50 steps."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from tests.agreement import assert_agree

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
bitsandbytes = pytest.importorskip("bitsandbytes")
safetensors = pytest.importorskip("safetensors.torch")

STEPS, LEARNING_RATE, RANK, ALPHA = 50, 1e-2, 4, 8


class Network(torch.nn.Module):
    """Two linear layers in 4 bits."""

    def __init__(self, *, compress_statistics: bool) -> None:
        super().__init__()
        options = {
            "bias": False,
            "compute_dtype": torch.float32,
            "quant_type": "nf4",
            "compress_statistics": compress_statistics,
        }
        self.up = bitsandbytes.nn.Linear4bit(128, 256, **options)
        self.down = bitsandbytes.nn.Linear4bit(256, 64, **options)

    def forward(self, x: Any) -> Any:
        return self.down(torch.relu(self.up(x)))


def apply(params: Any, x: Any) -> Any:
    return jax.nn.relu(x @ params["up"]) @ params["down"]


def peft_losses(adapted: Any, x: np.ndarray, y: np.ndarray) -> list[float]:
    trained = [each for each in adapted.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        loss = ((adapted(torch.from_numpy(x)) - torch.from_numpy(y)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def own_losses(wrapped: Any, x: np.ndarray, y: np.ndarray) -> list[float]:
    adapted = lora_jax.adapt(apply)
    tx = optax.adamw(LEARNING_RATE, weight_decay=0.0)
    adapters, frozen = lora_jax.split(wrapped)

    def step(carry: Any, _: Any) -> Any:
        adapters, state = carry

        def loss(adapters: Any) -> Any:
            return jnp.mean((adapted(lora_jax.combine(adapters, frozen), x) - y) ** 2)

        value, gradient = jax.value_and_grad(loss)(adapters)
        updates, state = tx.update(gradient, state, adapters)
        return (optax.apply_updates(adapters, updates), state), value

    _, losses = jax.lax.scan(step, (adapters, tx.init(adapters)), length=STEPS)
    return np.asarray(losses).tolist()


@pytest.mark.parametrize("compress_statistics", [True, False])
def test_losses_are_those_of_peft(tmp_path: Path, compress_statistics: bool) -> None:
    torch.manual_seed(0)
    network = Network(compress_statistics=compress_statistics).to("cpu")
    safetensors.save_file(
        {name: tensor.contiguous() for name, tensor in network.state_dict().items()},
        tmp_path / "model.safetensors",
    )
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["up", "down"], lora_dropout=0.0
    )
    adapted = peft.get_peft_model(network, config)
    random = np.random.default_rng(0)
    x, y = (random.standard_normal((16, size)).astype(np.float32) for size in (128, 64))

    tensors = lora_jax.exchange.bitsandbytes.load(tmp_path / "model.safetensors")
    params = {name: tensors[f"{name}.weight"].transpose((1, 0)) for name in ("up", "down")}
    assert all(isinstance(each, lora_jax.QuantizedWeight) for each in params.values())
    wrapped = lora_jax.wrap(params, "up|down", rank=RANK, alpha=ALPHA)
    state = network.state_dict()
    for name, node in wrapped.items():
        factors = {
            factor: jnp.asarray(state[f"{name}.{factor}.default.weight"].numpy().T)
            for factor in ("lora_A", "lora_B")
        }
        wrapped[name] = dataclasses.replace(node, **factors)

    expected = peft_losses(adapted, x, y)
    assert expected[-1] < 0.5 * expected[0]
    with jax.numpy_dtype_promotion("standard"):  # optax promotes its counters
        found = own_losses(wrapped, x, y)
    assert_agree(found, expected, tolerance=1e-3)
