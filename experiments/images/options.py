"""The command line of `image_lora`: which digits a base model has never seen, and what learns."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from experiments.common.errors import InputError
from experiments.common.options import (
    Option,
    fraction,
    parsed_as,
    positive_float,
    positive_int,
)
from experiments.common.shared_options import Alpha, FolderOptions, Rank, Seed
from experiments.mnist.options import DataOptions

_DESCRIPTION = """\
LoRA on a text-to-image diffusion model, from words to pictures.

Captions are encoded by a frozen sentence encoder, MiniLM. A small U-Net with
cross-attention learns to draw MNIST at 32 x 32 from them; but some digits are held out,
which it never sees. Then adapters beside its attention and its convolutions learn each
held-out digit from a hundred pictures and its caption. A classifier of real digits says
how often it recognises what is drawn, before and after, at adapter strengths of 0, 0.5
and 1, and full fine-tuning stands beside it.

The base is trained once and used again. After Ctrl-C the same command continues.
The pictures, all numbers, and the adapters as Orbax, diffusers and kohya files are in
--out.
"""

_EXAMPLES = """\
examples:
  python -m experiments.image_lora                        about an hour on two cores
  python -m experiments.image_lora --base-steps 300       a short base, rough digits
  python -m experiments.image_lora --held-out 3 --rank 4
"""

# Attention, convolutions, and the layers that bring the time in.
TARGETS = (
    r"attentions_\d+",
    r"resnets_\d+/(conv1|conv2|conv_shortcut|time_emb_proj)",
)


@dataclass(frozen=True, kw_only=True)
class BaseOptions:
    """How the base model is trained."""

    held_out: Annotated[
        tuple[int, ...],
        Option(
            "the digits that it never sees", int, several=True, choices=range(10), metavar="0-9"
        ),
    ] = (7, 4)
    base_steps: Annotated[int, Option("its steps", positive_int)] = 3_000
    base_batch: Annotated[int, Option("pictures of a step", positive_int)] = 64
    base_learning_rate: Annotated[float, Option("AdamW's greatest", positive_float)] = 1e-3
    channels: Annotated[
        tuple[int, ...],
        Option("the channels of each resolution, the finest first", positive_int, several=True),
    ] = (32, 64, 64)
    without_text: Annotated[
        float,
        Option("the share of pictures whose caption is left out, for guidance", fraction),
    ] = 0.1
    seed: Seed = 0

    def check(self) -> None:
        """Raises an `InputError` unless a digit is left to learn."""
        if len(set(self.held_out)) != len(self.held_out):
            raise InputError(f"--held-out names a digit twice: {self.held_out}")
        if len(self.held_out) > 9:
            raise InputError("--held-out names all digits; leave at least one for the base")
        if any(count % 8 for count in self.channels):
            raise InputError(f"--channels is {self.channels}; expected multiples of 8")

    def as_json(self) -> dict[str, Any]:
        return {name: _as_list(value) for name, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class TuningOptions:
    """How each held-out digit is learned."""

    rank: Rank = 8
    alpha: Alpha = None
    examples: Annotated[int, Option("pictures of the digit", positive_int)] = 100
    steps: Annotated[int, Option("steps of its training", positive_int)] = 200
    batch_size: Annotated[int, Option("pictures of a step", positive_int)] = 32
    learning_rate: Annotated[float, Option("AdamW's greatest, of adapters", positive_float)] = 2e-3
    full_learning_rate: Annotated[float, Option("the same of full fine-tuning", positive_float)] = (
        2e-4
    )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class DrawingOptions:
    """How pictures are drawn, and how many."""

    drawn: Annotated[int, Option("pictures of each digit that are judged", positive_int)] = 40
    sampling_steps: Annotated[int, Option("steps from noise to a picture", positive_int)] = 20
    guidance: Annotated[
        float, Option("how much more a caption counts than none", positive_float)
    ] = 2.0
    strengths: Annotated[
        tuple[float, ...],
        Option("adapter strengths to draw with", fraction, several=True),
    ] = (0.0, 0.5, 1.0)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the caller chose; `--help` says what each means."""

    base: BaseOptions = BaseOptions()
    tuning: TuningOptions = TuningOptions()
    drawing: DrawingOptions = DrawingOptions()
    data: DataOptions = DataOptions()
    model: Annotated[
        Path | None,
        Option(
            "the sentence encoder's folder (default: the package's MiniLM)", Path, metavar="DIR"
        ),
    ] = None
    output: FolderOptions = FolderOptions(out=Path("runs/image_lora"))


def parsed(arguments: Sequence[str] | None) -> Options:
    """Returns the options on the command line; exits, as argparse does, if one is wrong."""
    return parsed_as(
        Options, arguments, command="image_lora", description=_DESCRIPTION, examples=_EXAMPLES
    )


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
