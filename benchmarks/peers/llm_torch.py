"""The study on language models in PyTorch: the same model in `transformers`, with PEFT's adapters.

PEFT is given what helps it: fused attention, logits at the places that are learned alone, which the
study computes too, and in one contender the layers' insides computed again in the backward pass.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.peers.batches import read_batches
from benchmarks.peers.llm_start import StartFolder
from benchmarks.peers.torch_profile import Sizes, torch_seconds
from benchmarks.peers.torch_training import OnTorch, TorchTraining, prepare_process


class Peft(TorchTraining):
    """PEFT's training of the model, with the optimiser that the study has."""

    def __init__(self, folder: str, checkpointing: bool) -> None:
        """Reads what `benchmarks.peers.llm_start.Start` wrote.

        Args:
          folder: the folder that it was written to.
          checkpointing: whether the backward pass computes each layer again.
        """
        self._folder = StartFolder(Path(folder))
        self._checkpointing = checkpointing
        settings = self._folder.settings()
        self._dtype = getattr(torch, settings["dtype"])
        super().__init__(settings, settings["platform"])

    def begin(self) -> None:
        """Takes the adapter and the batches."""
        model = _language_model(self._folder, self.device)
        if self._checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        adapted = peft.PeftModel.from_pretrained(model, self._folder.adapter, is_trainable=True)
        self.train(adapted, read_batches(self._folder.batches))

    def warm_up(self) -> None:
        """Computes a gradient for a batch of every length, and drops it."""
        of_length = {batch["tokens"].shape[-1]: batch for batch in self._batches}
        self.try_batches(list(of_length.values()))

    def profile(self, first: int, count: int) -> dict[str, float]:
        """Takes these steps; returns how long kinds of operations took in all."""
        sizes = Sizes.of(self._model, self._model.get_base_model().config.vocab_size)
        return torch_seconds(lambda: self.steps(first, count)["seconds"], sizes)

    def add_gradients(self, batch: Mapping[str, Any]) -> float:
        """Adds the gradients of batches that are stacked, and returns the loss of a token."""
        parts = max(float(batch["weights"].sum()), 1.0)
        losses = []
        for number in range(len(batch["tokens"])):
            with self._precision():
                loss = self._loss({name: array[number] for name, array in batch.items()}) / parts
            loss.backward()
            losses.append(loss.item())
        return sum(losses)

    def _loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Returns the sum of the cross-entropies of the tokens that are learned."""
        model = self._model.get_base_model()
        count = int(batch["weights"].sum())
        places, targets = (self._placed(batch[name][0, :count]) for name in ("places", "targets"))
        hidden = model.model(
            input_ids=self._placed(batch["tokens"]),
            position_ids=self._placed(batch["positions"]),
            attention_mask=_visible(self._placed(batch["segments"])),
            use_cache=False,
        ).last_hidden_state
        logits = model.lm_head(hidden.flatten(0, 1)[places])
        return nn.functional.cross_entropy(logits, targets, reduction="sum")

    def _precision(self) -> torch.autocast:
        """Returns a context in which products of adapters, whose factors are float32, are not."""
        enabled = self._dtype != torch.float32
        return torch.autocast(self.device.type, self._dtype, enabled=enabled)

    def _placed(self, array: NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(array).to(self.device).long()


class PeftWriter(OnTorch):
    """The model with its adapter merged, which answers all prompts in one batch."""

    def __init__(self, folder: str, new_tokens: int) -> None:
        """Reads the model, the adapter and the prompts.

        Args:
          folder: the folder of `benchmarks.peers.llm_start.Start`.
          new_tokens: how many tokens to write after each prompt.
        """
        prepare_process()
        start = StartFolder(Path(folder))
        super().__init__(start.settings()["platform"])
        adapted = peft.PeftModel.from_pretrained(_language_model(start, self.device), start.trained)
        self._model = adapted.merge_and_unload().eval()
        self._prompts = [
            torch.from_numpy(prompt["tokens"]).to(self.device).long()
            for prompt in read_batches(start.prompts)
        ]
        # The end of an answer is not looked for, so that all sides write the same number of tokens.
        self._model.generation_config = transformers.GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
        )

    def write(self) -> dict[str, Any]:
        """Returns the tokens that follow each prompt, and the seconds that it took."""
        tokens, is_prompt = (
            nn.utils.rnn.pad_sequence(each, batch_first=True, padding_side="left")
            for each in (self._prompts, [torch.ones_like(prompt) for prompt in self._prompts])
        )
        start = time.perf_counter()
        with torch.inference_mode():
            written = self._model.generate(tokens, attention_mask=is_prompt)
        self.wait()
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": written[:, tokens.shape[1] :].tolist()}


def _language_model(folder: StartFolder, device: torch.device) -> transformers.PreTrainedModel:
    chosen = folder.model_options()
    dtype, quantization = getattr(torch, chosen.dtype), None
    if chosen.quantize == "nf4":
        quantization = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder.model,
        dtype=dtype,
        attn_implementation="sdpa",
        quantization_config=quantization,
        device_map={"": device},
    )


def _visible(segments: Tensor) -> Tensor:
    """Returns which tokens each token of packed rows sees: (rows, 1, length, length).

    What fills a row up sees itself: PyTorch's attention gives NaN where nothing is seen.
    """
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same.tril()
