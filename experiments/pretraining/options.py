"""The command line of `pretrain_t5`: how large the model is, and how it learns."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from experiments.common.options import (
    Option,
    count_or_all,
    fraction,
    parsed_as,
    positive_float,
    positive_int,
)
from experiments.common.shared_options import (
    Epochs,
    EvaluateEvery,
    FolderOptions,
    Resume,
    Seed,
    Warmup,
)
from experiments.pretraining.vocabulary import SENTINELS

_DESCRIPTION = """\
Pretrains a small T5 from nothing, as T5 was: spans of a text are missing, the encoder
reads what is left, and the decoder writes what is missing (Raffel et al., 2020). The
texts are the training dialogues of DialogSum; its vocabulary is trained on them too.

The model is in OUT/model, a folder in Hugging Face's format, which
`python -m experiments.llm_lora --model OUT/model` fine-tunes. Ctrl-C leaves a
checkpoint, from which --resume continues as if nothing had happened.
"""

_EXAMPLES = """\
examples:
  python -m experiments.pretrain_t5                               an hour and a quarter on one core
  python -m experiments.pretrain_t5 --resume                      continue after Ctrl-C
  python -m experiments.pretrain_t5 --texts 500 --epochs 1        a minute, to see it work
  python -m experiments.llm_lora --model runs/pretrain_t5/model --data dialogsum
"""


@dataclass(frozen=True, kw_only=True)
class SizeOptions:
    """How large the model is."""

    vocabulary: Annotated[int, Option("pieces of words, besides the sentinels", positive_int)] = (
        8_000
    )
    width: Annotated[int, Option("numbers of a hidden state", positive_int)] = 128
    hidden: Annotated[int, Option("numbers inside of a feed-forward layer", positive_int)] = 384
    layers: Annotated[int, Option("of the encoder, and of the decoder", positive_int)] = 3
    heads: Annotated[int, Option("of attention", positive_int)] = 4

    def entries(self) -> dict[str, Any]:
        """Returns what `config.json` holds."""
        return {
            "architectures": ["T5ForConditionalGeneration"],
            "model_type": "t5",
            "is_encoder_decoder": True,
            "vocab_size": self.vocabulary + SENTINELS,
            "d_model": self.width,
            "d_kv": self.width // self.heads,
            "d_ff": self.hidden,
            "num_layers": self.layers,
            "num_decoder_layers": self.layers,
            "num_heads": self.heads,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
        }


@dataclass(frozen=True, kw_only=True)
class GapOptions:
    """What is missing in a text."""

    missing: Annotated[float, Option("the share of tokens that are missing", fraction)] = 0.15
    span: Annotated[
        float, Option("how many of them are one behind the other, on average", positive_float)
    ] = 3.0


@dataclass(frozen=True, kw_only=True)
class LearningOptions:
    """How it learns."""

    texts: Annotated[
        int | None, Option("how many dialogues to learn from, or all", count_or_all, metavar="N")
    ] = None
    held_out: Annotated[int, Option("how many others to test with", positive_int)] = 200
    max_length: Annotated[int, Option("tokens of a text, and of a row", positive_int)] = 512
    epochs: Epochs = 6
    batch_size: Annotated[int, Option("rows of a batch", positive_int)] = 2
    learning_rate: Annotated[
        float,
        Option("Adafactor's greatest, in proportion to the size of each matrix", positive_float),
    ] = 1e-2
    warmup: Warmup = 0.05
    evaluate_every: EvaluateEvery = 500
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the caller chose; `--help` says what each means."""

    size: SizeOptions = SizeOptions()
    gaps: GapOptions = GapOptions()
    learning: LearningOptions = LearningOptions()
    resume: Resume = False
    output: FolderOptions = FolderOptions(out=Path("runs/pretrain_t5"))

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self.size), **asdict(self.gaps), **asdict(self.learning)}


def parsed(arguments: Sequence[str] | None) -> Options:
    """Returns the options on the command line; exits, as argparse does, if one is wrong."""
    return parsed_as(
        Options, arguments, command="pretrain_t5", description=_DESCRIPTION, examples=_EXAMPLES
    )
