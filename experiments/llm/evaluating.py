"""How good a model's answers are: the command line of `llm_lora evaluate`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from numpy.typing import NDArray

import lora_jax
from experiments.common.console import Console, device_name
from experiments.common.errors import InputError
from experiments.common.files import atomic_path
from experiments.common.options import Option, parsed_as, positive_int
from experiments.common.run import Run
from experiments.common.shared_options import FolderOptions
from experiments.common.tables import Table
from experiments.llm.adapter_folder import AdapterFolder
from experiments.llm.answers import Writer
from experiments.llm.dialogsum import NAME as DIALOGSUM
from experiments.llm.dialogsum import dialogues
from experiments.llm.examples import Example, Message, read_examples
from experiments.llm.loss import losses_at_places
from experiments.llm.options import AdapterPath, ModelPath, NewTokens
from experiments.llm.packing import TrainingSteps
from experiments.llm.rouge import KINDS, Score, mean_score, rouge
from experiments.llm.texts import tokenized

_DESCRIPTION = """\
Answers what people have answered, and compares: ROUGE-1, ROUGE-2 and ROUGE-L, each with
the interval in which the mean is with 95 % confidence, and the perplexity of the answers
of people. The answers are in OUT/answers.md, beside those of people. Without --adapter it
is the model as it is that answers; with --base both do, and stand side by side.
"""

_EXAMPLES = f"""\
examples:
  python -m experiments.llm_lora evaluate --data {DIALOGSUM} --limit 50
  python -m experiments.llm_lora evaluate --data {DIALOGSUM} --adapter runs/llm_lora/adapter
  python -m experiments.llm_lora evaluate --data test.jsonl --adapter runs/llm_lora/adapter --base
"""

_NAMES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
_BASE, _ADAPTED = "the model", "with its adapter"


@dataclass(frozen=True, kw_only=True)
class EvaluatingOptions:
    """What to answer, and with what."""

    data: Annotated[
        str,
        Option(
            f"a file of JSON lines with `messages`, or {DIALOGSUM}: its test dialogues, with three "
            "summaries of each",
            metavar="FILE",
        ),
    ]
    adapter: AdapterPath = None
    model: ModelPath = None
    base: Annotated[
        bool, Option("answer with the model as it is too, and show both; with --adapter")
    ] = False
    limit: Annotated[
        int | None, Option("how many to answer, from the first on", positive_int, metavar="N")
    ] = None
    new_tokens: NewTokens = 96
    batch_size: Annotated[int, Option("how many to answer at a time", positive_int)] = 8
    output: FolderOptions = FolderOptions(out=Path("runs/llm_lora_evaluate"))


@dataclass(frozen=True)
class Question:
    """What a model is asked, and what people have answered."""

    messages: tuple[Message, ...]
    answers: tuple[str, ...]
    where: str

    @property
    def example(self) -> Example:
        """The question with the first answer of people."""
        answer = {"role": "assistant", "content": self.answers[0]}
        return Example(self.where, messages=(*self.messages, answer))


def parsed_for_evaluating(arguments: Sequence[str]) -> EvaluatingOptions:
    """Returns the options after `evaluate`; exits, as argparse does, if one is wrong."""
    return parsed_as(
        EvaluatingOptions,
        arguments,
        command="llm_lora evaluate",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )


def evaluate(options: EvaluatingOptions) -> None:
    """Answers, compares and reports."""
    if options.base and options.adapter is None:
        raise InputError("--base shows what an adapter changes; pass --adapter DIR with it")
    run = Run(options.output)
    questions = _questions(options.data)[: options.limit]
    run.phase_ended("data")
    answers: dict[str, list[str]] = {}
    perplexities: dict[str, float] = {}
    for name, adapter in _who_answers(options).items():
        writer = Writer.read(adapter, _model_of(options), run.console)
        run.console.note(f"{name}: {writer.model.path}")
        written = writer.answers(
            [writer.texts.question(each.messages) for each in questions],
            new_tokens=options.new_tokens,
            rows=options.batch_size,
            console=run.console,
        )
        answers[name] = [answer for (answer,) in written]
        perplexities[name] = _perplexity(writer, questions, options.batch_size, run.console)
        # The next one would stand beside it: two models take twice the memory.
        del writer
    run.phase_ended("writing")
    references = [question.answers for question in questions]
    scores = {name: rouge(own, references) for name, own in answers.items()}
    _write_answers(options.output.out / "answers.md", questions, answers)
    _present(scores, perplexities, questions, options, run)


def _perplexity(
    writer: Writer, questions: Sequence[Question], rows: int, console: Console
) -> float:
    """Returns that of the first answers of people, over all of their tokens."""
    most = writer.model.greatest_length
    examples = tokenized(
        [question.example for question in questions], writer.texts, max_length=most
    ).examples
    longest = max(map(len, examples))
    steps = TrainingSteps(examples, rows=rows, length=longest, epochs=1, seed=0, pack=False)
    apply = lora_jax.adapt(writer.network.apply)
    summed = jax.jit(lambda params, batch: losses_at_places(apply, params, batch).sum())
    total = learned = 0.0
    with console.progress("Testing", len(steps)) as progress:
        for batch in steps.batches():
            total += float(summed(writer.params, batch))
            learned += float(batch.weights.sum())
            progress.advance()
    return math.exp(min(total / learned, 700.0))


def _who_answers(options: EvaluatingOptions) -> dict[str, Path | None]:
    """Returns the adapter of each that answers; the model as it is has none."""
    if options.adapter is None:
        return {_BASE: None}
    adapted: dict[str, Path | None] = {_ADAPTED: options.adapter}
    return {_BASE: None, **adapted} if options.base else adapted


def _model_of(options: EvaluatingOptions) -> Path | None:
    """Returns the model that was chosen, or that of the adapter."""
    if options.model is not None or options.adapter is None:
        return options.model
    card = AdapterFolder(options.adapter).read_card()
    return card.model_options(None).model


def _questions(data: str) -> list[Question]:
    if data == DIALOGSUM:
        return [
            Question((each.question,), each.summaries, each.where) for each in dialogues("test")
        ]
    questions = []
    for example in read_examples(Path(data)):
        if not example.messages:
            raise InputError(
                f"{example.where} has a `prompt`; expected `messages`, the last of which is what a "
                "person has answered"
            )
        *asked, answer = example.messages
        questions.append(Question(tuple(asked), (answer["content"],), example.where))
    return questions


def _present(
    scores: Mapping[str, Mapping[str, NDArray[np.float64]]],
    perplexities: Mapping[str, float],
    questions: Sequence[Question],
    options: EvaluatingOptions,
    run: Run,
) -> None:
    means = {name: {kind: mean_score(own[kind]) for kind in KINDS} for name, own in scores.items()}
    metrics = {
        "data": options.data,
        "adapter": str(options.adapter) if options.adapter else None,
        "device": device_name(),
        "answers": len(questions),
        "references": sum(len(question.answers) for question in questions),
        "perplexity": dict(perplexities),
        "rouge": {
            name: {kind: score._asdict() for kind, score in own.items()}
            for name, own in means.items()
        },
        # So that two runs can be compared answer by answer.
        "rouge_of_each": {
            name: {kind: own[kind].round(4).tolist() for kind in KINDS}
            for name, own in scores.items()
        },
    }
    for table in tables(metrics):
        table.show(run.console)
    run.finish(metrics)


def tables(metrics: Mapping[str, Any]) -> list[Table]:
    """Returns what metrics.json has of the answers, as a table."""
    rows = [
        [
            name,
            *(str(Score(**own[kind])) for kind in KINDS),
            f"{metrics['perplexity'][name]:.3f}",
        ]
        for name, own in metrics["rouge"].items()
    ]
    title = f"{metrics['answers']:,} answers, means with 95 % confidence"
    return [Table(title, ["", *_NAMES.values(), "perplexity"], rows)]


def _write_answers(
    path: Path, questions: Sequence[Question], answers: Mapping[str, Sequence[str]]
) -> None:
    parts = []
    for number, question in enumerate(questions):
        of_models = "\n\n".join(f"**{name}:** {own[number]}" for name, own in answers.items())
        of_people = "\n".join(f"- {text}" for text in question.answers)
        parts.append(
            f"## {number + 1}\n\n{_quoted(question.messages[-1]['content'])}\n\n{of_models}\n\n"
            f"**People:**\n\n{of_people}\n"
        )
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(parts), encoding="utf-8")


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.splitlines())
