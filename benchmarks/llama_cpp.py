"""An adapter of `llm_lora` in llama.cpp, beside what JAX computes with it.

The adapter becomes a GGUF file, and llama.cpp applies it to two files of its base: one with the
weights dequantised to float32, where both must write the same texts, the chat template included;
and the base's own file, whose kernels round activations. There the texts of the base alone differ
already, so that the logits and the likeliest next tokens are compared where both have read the
same text. `make test-llamacpp` makes an environment with llama.cpp.
"""

import argparse
import contextlib
import dataclasses
import functools
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from benchmarks.measuring import MeasuringParser, write_found
from experiments.common.console import Console
from experiments.common.errors import InputError, exit_code, needed_module
from experiments.common.options import positive_int
from experiments.common.tables import Table
from experiments.llm.adapter_folder import AdapterFolder
from experiments.llm.answers import Writer
from experiments.llm.dialogsum import Dialogue, dialogues
from experiments.llm.exporting import ExportingOptions, export
from experiments.models.pretrained import LanguageModel

_LLAMA_CPP = "llama-cpp-python"
_CONTEXT = 2_048
_FLOAT32, _STORED = "float32", "as stored"
_HEADER = (
    *("llama.cpp's base", "", "same texts", "same likeliest tokens"),
    *("mean difference", "greatest"),
)
_BASE, _ADAPTED = "the model", "with its adapter"

Logits = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Read:
    """A prompt and its answer as tokens.

    Attributes:
      tokens: all of them.
      start: where the answer begins.
    """

    tokens: NDArray[np.int32]
    start: int


@dataclasses.dataclass(frozen=True)
class Written:
    """What one program writes, and the logits that it gives to each token of an answer."""

    texts: Sequence[str]
    logits: Sequence[Logits]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far llama.cpp computes what JAX computes.

    Attributes:
      base: the base's file.
      name: the model as it is, or with its adapter.
      texts: how many texts there are.
      same_texts: how many of them both write alike.
      tokens: how many tokens the answers have.
      same_choices: of how many both find the same token the likeliest.
      mean_difference: that of logits.
      greatest_difference: that of logits.
    """

    base: str
    name: str
    texts: int
    same_texts: int
    tokens: int
    same_choices: int
    mean_difference: float
    greatest_difference: float

    @classmethod
    def of(cls, base: str, name: str, found: Written, expected: Written) -> "Agreement":
        """Compares what was found with what JAX computes."""
        ours, theirs = np.concatenate(expected.logits), np.concatenate(found.logits)
        differences = np.abs(theirs - ours)
        pairs = zip(found.texts, expected.texts, strict=True)
        return cls(
            base=base,
            name=name,
            texts=len(found.texts),
            same_texts=sum(one == other for one, other in pairs),
            tokens=len(ours),
            same_choices=int((ours.argmax(axis=-1) == theirs.argmax(axis=-1)).sum()),
            mean_difference=float(differences.mean()),
            greatest_difference=float(differences.max()),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Compares, prints the table, and returns the exit code: 1 if a float32 text differs."""
    return exit_code(lambda: _run(_parser().parse_args(argv)))


def _run(options: argparse.Namespace) -> None:
    needed_module("llama_cpp", _LLAMA_CPP)
    from benchmarks.peers.gguf_float32 import write_float32

    console, asked = Console(), dialogues("test")[: options.dialogues]
    source = _model_file(options.adapter)
    expected: dict[str, Written] = {}
    read: dict[str, list[Read]] = {}
    for name, adapter in ((_BASE, None), (_ADAPTED, options.adapter)):
        writer = Writer.read(adapter, source, console)
        expected[name], read[name] = _in_jax(writer, asked, options.new_tokens, console)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        float32, adapter = Path(folder) / "float32.gguf", Path(folder) / "adapter.gguf"
        write_float32(float32, source)
        export(ExportingOptions(adapter=options.adapter, to="gguf", out=adapter))
        files = [(_FLOAT32, float32), (_STORED, source)]
        programs = [(*file, *own) for file in files for own in ((_BASE, None), (_ADAPTED, adapter))]
        with console.progress("llama.cpp", len(programs)) as progress:
            for base, path, name, own in programs:
                progress.show(f"{base}, {name}")
                written = _in_llama_cpp(path, own, asked, read[name], options)
                found.append(Agreement.of(base, name, written, expected[name]))
                progress.advance()
    _present(found, options, console)


def _model_file(adapter: Path) -> Path:
    """Returns the GGUF file of the adapter's model."""
    chosen = AdapterFolder(adapter).read_card().model_options(None)
    path = LanguageModel.read(chosen.model).path
    if path.is_dir():
        raise InputError(f"{path} is a folder; expected the adapter of a model in a GGUF file")
    return path


def _in_jax(
    writer: Writer, asked: Sequence[Dialogue], new_tokens: int, console: Console
) -> tuple[Written, list[Read]]:
    """Returns what JAX writes, and each prompt with its answer."""
    prompts = [writer.texts.question([each.question]) for each in asked]
    answers = writer.answers(prompts, new_tokens=new_tokens, rows=8, console=console)
    texts = [text for (text,) in answers]
    read = [
        Read(np.append(prompt, writer.texts.tokenizer.encoded(text, begins=False)), len(prompt))
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    apply = jax.jit(functools.partial(writer.network.apply, {"params": writer.params}))
    logits = [np.asarray(apply(each.tokens[None]))[0, each.start - 1 : -1] for each in read]
    return Written(texts, logits), read


def _in_llama_cpp(
    path: Path,
    adapter: Path | None,
    asked: Sequence[Dialogue],
    read: Sequence[Read],
    options: argparse.Namespace,
) -> Written:
    with _loaded(path, adapter, options.threads) as llama:
        texts = [_answer(llama, each, options.new_tokens) for each in asked]
        logits = [_logits(llama, each) for each in read]
    return Written(texts, logits)


@contextlib.contextmanager
def _loaded(path: Path, adapter: Path | None, threads: int) -> Iterator[Any]:
    """Yields llama.cpp with a model, and with an adapter that it has accepted."""
    llama_cpp = needed_module("llama_cpp", _LLAMA_CPP)
    llama = llama_cpp.Llama(
        model_path=str(path),
        lora_path=None if adapter is None else str(adapter),
        n_ctx=_CONTEXT,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    with contextlib.closing(llama):
        # The handle of an adapter that was refused is a null pointer, which is not None.
        if bool(llama._lora_adapter) != (adapter is not None):
            raise RuntimeError(f"llama.cpp has refused {adapter}")
        yield llama


def _answer(llama: Any, dialogue: Dialogue, new_tokens: int) -> str:
    """Returns what llama.cpp answers; it applies the chat template of the file itself."""
    found = llama.create_chat_completion(
        [dialogue.question], temperature=0.0, max_tokens=new_tokens
    )
    return str(found["choices"][0]["message"]["content"]).strip()


def _logits(llama: Any, read: Read) -> Logits:
    llama.reset()
    llama.eval(read.tokens.tolist())
    return np.array(llama.scores[read.start - 1 : len(read.tokens) - 1])


def _present(found: Sequence[Agreement], options: argparse.Namespace, console: Console) -> None:
    metrics = {"agreements": list(map(dataclasses.asdict, found))}
    for table in tables(metrics):
        table.show(console)
    write_found(options, metrics)
    different = [each for each in found if each.base == _FLOAT32 and each.same_texts < each.texts]
    if different:
        raise RuntimeError("texts differ on a float32 base; see the table")


def tables(metrics: Mapping[str, Any]) -> list[Table]:
    """Returns what `--json` writes, as a table."""
    rows = [_cells(Agreement(**each)) for each in metrics["agreements"]]
    return [Table("llama.cpp beside JAX", _HEADER, rows)]


def _cells(found: Agreement) -> list[str]:
    return [
        found.base,
        found.name,
        f"{found.same_texts} of {found.texts}",
        f"{found.same_choices} of {found.tokens} ({100 * found.same_choices / found.tokens:.1f} %)",
        f"{found.mean_difference:.2g}",
        f"{found.greatest_difference:.2g}",
    ]


def _parser() -> MeasuringParser:
    parser = MeasuringParser("llama_cpp", __doc__)
    parser.add_argument(
        "--adapter",
        type=Path,
        required=True,
        metavar="DIR",
        help="the folder `adapter` in the --out of a training on a GGUF file",
    )
    parser.add_argument(
        "--dialogues", type=positive_int, default=16, help="test dialogues to answer"
    )
    parser.add_argument("--new-tokens", type=positive_int, default=64, help="of an answer")
    parser.add_argument("--threads", type=positive_int, default=2, help="those of llama.cpp")
    return parser


if __name__ == "__main__":
    sys.exit(main())
