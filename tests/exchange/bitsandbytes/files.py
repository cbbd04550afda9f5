"""Checkpoints as transformers writes them of models that bitsandbytes quantised."""

import contextlib
import io
import logging

import pytest

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

with contextlib.redirect_stdout(io.StringIO()):
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    functional = pytest.importorskip("bitsandbytes.functional")


def quantised(weight, **options):
    """Returns what a checkpoint has of a weight, by ending, and what it dequantises to."""
    codes, state = functional.quantize_4bit(weight, **options)
    parts = {f".{name}": part for name, part in state.as_dict(packed=True).items()}
    parts = {name: part.clone().contiguous() for name, part in {"": codes, **parts}.items()}
    return parts, functional.dequantize_4bit(codes, state)


def write(path, tensors):
    """Writes tensors, of which a mapping is one quantised weight."""
    flat = {}
    for name, tensor in tensors.items():
        parts = tensor if isinstance(tensor, dict) else {"": tensor}
        flat |= {f"{name}{ending}": part for ending, part in parts.items()}
    safetensors.save_file(flat, path)
    return path


def random_weight(shape, dtype="float32", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.02).to(getattr(torch, dtype))
