"""What llama.cpp computes."""

import numpy as np

_CONTEXT = 256


def logits_in_llama_cpp(path, tokens, adapter=None, scale=1.0):
    """Returns the logits (tokens, vocabulary), with an adapter that it has accepted."""
    import llama_cpp

    llama = llama_cpp.Llama(
        model_path=str(path),
        lora_path=None if adapter is None else str(adapter),
        lora_scale=scale,
        n_ctx=_CONTEXT,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    try:
        # The handle of an adapter that was refused is a null pointer, which is not None.
        assert bool(llama._lora_adapter) == (adapter is not None), "refused"
        llama.eval(list(tokens))
        return np.array(llama.scores[: len(tokens)])
    finally:
        llama.close()
