"""What the format needs: safetensors and not PyTorch."""

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

import lora_jax
from lora_jax.exchange.peft import Rule, load, save
from tests.exchange.peft.files import numbers, write_adapter


def test_torch_is_not_needed(tmp_path):
    code = """
import sys
sys.modules["torch"] = None  # so that importing it fails
import jax.numpy as jnp, lora_jax
names = [lora_jax.exchange.peft.Rule("a.weight", "a")]
wrapped = lora_jax.wrap({"a": jnp.ones((4, 4))}, "a", rank=2)
lora_jax.exchange.peft.save(sys.argv[1], wrapped, names=names)
lora_jax.exchange.peft.load(sys.argv[1], {"a": jnp.ones((4, 4))}, names=names)
"""
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path / "adapter")]
    root = Path(lora_jax.__file__).parent.parent
    subprocess.run(command, check=True, cwd=root)


def test_without_safetensors(tmp_path, monkeypatch):
    tensors = {"a.lora_A.weight": numbers(2, 3), "a.lora_B.weight": numbers(3, 2)}
    folder = write_adapter(tmp_path / "adapter", tensors)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    names = [Rule("a.weight", "a")]
    with pytest.raises(ImportError, match=r"pip install 'lora-jax\[peft\]'"):
        load(folder, {"a": jnp.zeros((3, 3))}, names=names)
    with pytest.raises(ImportError, match=r"pip install 'lora-jax\[peft\]'"):
        save(tmp_path / "x", lora_jax.wrap({"a": jnp.ones((3, 3))}, "a", rank=1), names=names)
    assert list(tmp_path.iterdir()) == [folder]
