"""Files of GGUF, of random blocks and of any values that their type quantises to."""

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

TYPES = gguf.GGMLQuantizationType

# Where each type has float16 numbers, in its bytes.
_FLOAT16 = {
    "Q4_0": [slice(0, 2)],
    "Q4_1": [slice(0, 2), slice(2, 4)],
    "Q8_0": [slice(0, 2)],
    "Q4_K": [slice(0, 2), slice(2, 4)],
    "Q6_K": [slice(208, 210)],
}
QUANTISED = tuple(_FLOAT16)


def random_blocks(kind, shape, seed=0, scale=1.0):
    """Returns bytes of any codes, with finite scales of both signs, some of them subnormal."""
    rng = np.random.default_rng(seed)
    count, size = gguf.GGML_QUANT_SIZES[TYPES[kind]]
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // count, size), dtype=np.uint8)
    for place in _FLOAT16[kind]:
        scales = (scale * rng.standard_normal(blocks.shape[:-1])).astype(np.float16)
        scales.reshape(-1)[::7] *= np.float16(1e-5)
        blocks[..., place] = scales[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def write(path, tensors):
    """Writes tensors, each as an array, or as the name of a type and its bytes."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            kind, data = tensor
            writer.add_tensor(name, data, raw_dtype=TYPES[kind])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
