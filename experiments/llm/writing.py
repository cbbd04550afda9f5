"""What a trained adapter writes: the command line of `llm_lora generate`."""

import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from experiments.common.errors import InputError
from experiments.common.options import Option, fraction, number, parsed_as, positive_int
from experiments.common.programs import keep_programs
from experiments.common.shared_options import Seed
from experiments.llm.adapter_folder import AdapterFolder
from experiments.llm.options import ModelOptions, ModelPath
from experiments.llm.task import loaded_params
from experiments.models.llama import ChatTokenizer, LanguageModel, Llama, Sampling, generate

_DESCRIPTION = """\
Writes an answer to each prompt: what the model writes with its adapter merged, or
without --adapter as it is. The prompts are those of --prompt, or the lines of standard
input; each is a message of a user, or with --plain a text that the model continues.
"""

_EXAMPLES = """\
examples:
  python -m experiments.llm_lora generate --prompt "What is the capital of France?"
  python -m experiments.llm_lora generate --adapter runs/llm_lora/adapter --prompt "Hello"
  python -m experiments.llm_lora generate --adapter runs/llm_lora/adapter --json < prompts.txt
"""

# Prompts are filled up to a multiple of this, so that few programs serve all lengths.
_LENGTHS = 64

_not_negative = number(float, lambda value: 0 <= value < float("inf"), "a number of at least 0")


@dataclass(frozen=True, kw_only=True)
class WritingOptions:
    """What to answer, and with what."""

    adapter: Annotated[
        Path | None,
        Option("the folder `adapter` in the --out of a training", Path, metavar="DIR"),
    ] = None
    model: ModelPath = None
    prompt: Annotated[
        tuple[str, ...] | None,
        Option(
            "a prompt; may be repeated (default: the lines of standard input)",
            repeated=True,
            metavar="TEXT",
        ),
    ] = None
    plain: Annotated[bool, Option("continue prompts as they are, without the chat template")] = (
        False
    )
    new_tokens: Annotated[
        int, Option("how many tokens to write at most", positive_int, metavar="TOKENS")
    ] = 128
    temperature: Annotated[
        float, Option("what logits are divided by; 0 takes the likeliest token", _not_negative)
    ] = 0.0
    top_p: Annotated[
        float,
        Option("leave out the least likely tokens, whose probabilities sum to 1 - P", fraction),
    ] = 1.0
    seed: Seed = 0
    json: Annotated[bool, Option("print a JSON object in each line")] = False


def parsed_for_writing(arguments: Sequence[str]) -> WritingOptions:
    """Returns the options after `generate`; exits, as argparse does, if one is wrong."""
    return parsed_as(
        WritingOptions,
        arguments,
        command="llm_lora generate",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )


def write(options: WritingOptions) -> None:
    """Prints the answer to each prompt."""
    keep_programs()
    prompts = _prompts(options.prompt)
    model, network, params = _merged_model(options)
    tokenizer = model.tokenizer()
    encoded = [_encoded(tokenizer, prompt, plain=options.plain) for prompt in prompts]
    longest = max(map(len, encoded)) + options.new_tokens
    if longest > model.config.max_position_embeddings:
        raise InputError(
            f"a prompt and --new-tokens {options.new_tokens} are {longest} tokens, more than the "
            f"{model.config.max_position_embeddings} that the model was made for"
        )
    answers = _answers(network, params, encoded, tokenizer, options)
    for prompt, answer in zip(prompts, answers, strict=True):
        print(json.dumps({"prompt": prompt, "answer": answer}) if options.json else answer)


def _merged_model(options: WritingOptions) -> tuple[LanguageModel, Llama, Any]:
    """Returns a model, its network, and its parameters with the adapter merged."""
    if options.adapter is None:
        chosen = ModelOptions(model=options.model)
        model = LanguageModel.read(chosen.model)
        params = loaded_params(model, chosen)
    else:
        folder = AdapterFolder(options.adapter)
        chosen = folder.read_card().model_options(options.model)
        model = LanguageModel.read(chosen.model)
        params = lora_jax.merge(folder.restore(loaded_params(model, chosen)))
    return model, Llama(model.config, dtype=jnp.dtype(chosen.dtype)), params


def _answers(
    network: Llama,
    params: Any,
    prompts: Sequence[np.ndarray],
    tokenizer: ChatTokenizer,
    options: WritingOptions,
) -> list[str]:
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    width = -(-int(lengths.max()) // _LENGTHS) * _LENGTHS
    tokens = np.stack([np.pad(prompt, (0, width - len(prompt))) for prompt in prompts])
    run = functools.partial(
        generate,
        # Weights that are not adapted may still be quantised.
        lora_jax.adapt(network.apply),
        model=network,
        new_tokens=options.new_tokens,
        end_ids=tokenizer.end_ids,
        sampling=Sampling(options.temperature, options.top_p),
    )
    written = jax.jit(run)(params, tokens=tokens, lengths=lengths, key=jax.random.key(options.seed))
    return [tokenizer.decoded(row).strip() for row in np.asarray(written)]


def _encoded(tokenizer: ChatTokenizer, prompt: str, *, plain: bool) -> np.ndarray:
    if plain:
        return tokenizer.encoded(prompt)
    return tokenizer.encoded_conversation([{"role": "user", "content": prompt}])


def _prompts(given: Sequence[str] | None) -> list[str]:
    """Returns the prompts of --prompt, or the lines of standard input that are not blank."""
    lines = sys.stdin.read().splitlines() if given is None else given
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise InputError("there is no prompt; pass --prompt TEXT, or lines on standard input")
    return prompts
