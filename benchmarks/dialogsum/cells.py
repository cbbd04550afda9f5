"""The cells of the grids: each is one training, one round of answers, or both."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.llm.dialogsum import NAME as DIALOGSUM

Found = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Cell:
    """A part of the grid that is finished and stored as a whole.

    Attributes:
      name: the name of its file.
      label: what it is, in a table.
      training: options of `llm_lora` that say how it trains; None for the model as it is.
      search: the cells of which the best gives the learning rate; none where it is an option.
      examples: how many dialogues it trains on.
      answers: how many test dialogues it answers.
    """

    name: str
    label: str
    training: tuple[str, ...] | None
    search: tuple[str, ...] = ()
    examples: int = 1_000
    answers: int = 500

    def training_options(self, found: Mapping[str, Found]) -> list[str] | None:
        """Returns the options of its training, without the folder; None if nothing trains.

        Args:
          found: what the cells before it have found, by name.
        """
        if self.training is None:
            return None
        options = ["--data", DIALOGSUM, "--train-examples", str(self.examples)]
        options += ["--validation-examples", "64", "--evaluate-every", "100", *self.training]
        if self.search:
            options += ["--learning-rate", f"{best_rate(found, self.search):g}"]
        return options

    def answering_options(self) -> list[str] | None:
        """Returns the options of its answers, without adapter and folder; None if there are none.

        The first test dialogues are answered.
        """
        if not self.answers:
            return None
        return ["evaluate", "--data", DIALOGSUM, "--limit", str(self.answers), "--batch-size", "16"]


@dataclasses.dataclass(frozen=True)
class Grid:
    """Cells that are compared with each other.

    Attributes:
      results: the name of the folder of results.
      search: the cells that look for learning rates.
      methods: the cells that are compared.
      ranks: the cells that compare ranks on a smaller budget.
      seconds_to_train: what a dialogue takes on two cores, as measured.
      seconds_to_answer: the same of an answer.
      model: the model, where it is not the packaged one.
    """

    results: str
    search: Mapping[str, Cell]
    methods: Mapping[str, Cell]
    ranks: Mapping[str, Cell]
    seconds_to_train: float
    seconds_to_answer: float
    model: Path | None = None

    @property
    def cells(self) -> dict[str, Cell]:
        """All of them in the order in which they are computed: a search before what it decides."""
        return {**self.search, **self.methods, **self.ranks}

    def expected_minutes(self, cell: Cell) -> float:
        """What a cell takes on two cores, roughly."""
        trained = 0 if cell.training is None else cell.examples
        seconds = trained * self.seconds_to_train + cell.answers * self.seconds_to_answer
        return seconds / 60


def best_rate(found: Mapping[str, Found], names: tuple[str, ...]) -> float:
    """Returns the learning rate whose training has the least held-out loss."""
    best = min((found[name]["training"] for name in names), key=lambda each: each["best"]["loss"])
    return float(best["training"]["learning_rate"])


def _searched(
    method: str, options: tuple[str, ...], rates: tuple[str, ...], *, examples: int
) -> dict[str, Cell]:
    cells = (
        Cell(
            name=f"search-{method}-{rate}",
            label=f"{method}, learning rate {rate}",
            training=(*options, "--learning-rate", rate),
            examples=examples,
            answers=0,
        )
        for rate in rates
    )
    return {cell.name: cell for cell in cells}


_SMALL = 250
_FULL = ("--method", "full")
_LORA = ("--rank", "8")
# It starts from what is asked for.
_PROMPT = ("--soft-prompt", "20", "--soft-prompt-from", "Summarize the following dialogue.")
FULL_SEARCH = _searched("full", _FULL, ("3e-5", "1e-4", "3e-4"), examples=_SMALL)
LORA_SEARCH = _searched("lora", _LORA, ("3e-4", "1e-3", "3e-3", "1e-2"), examples=_SMALL)
_RATE_OF_FULL, _RATE_OF_LORA = tuple(FULL_SEARCH), tuple(LORA_SEARCH)

_METHODS = (
    Cell("base", "the model as it is", None),
    Cell("lora-8", "LoRA, rank 8", _LORA, _RATE_OF_LORA),
    Cell("full", "full fine-tuning", _FULL, _RATE_OF_FULL),
    Cell("lora-32", "LoRA, rank 32", ("--rank", "32"), _RATE_OF_LORA),
    Cell(
        "qlora-8",
        "QLoRA, rank 8, on the codes as stored",
        (*_LORA, "--quantize", "as-stored"),
        _RATE_OF_LORA,
    ),
    Cell("dora-8", "DoRA, rank 8", ("--method", "dora", *_LORA), _RATE_OF_LORA),
    Cell("prompt-20", "a soft prompt of 20", ("--method", "none", *_PROMPT)),
    Cell(
        "lora-8-prompt-20",
        "LoRA, rank 8, and a soft prompt of 20",
        (*_LORA, *_PROMPT),
        _RATE_OF_LORA,
    ),
    Cell("lora-8-seed-1", "LoRA, rank 8, another seed", ("--seed", "1"), _RATE_OF_LORA),
    Cell(
        "full-seed-1",
        "full fine-tuning, another seed",
        (*_FULL, "--seed", "1"),
        _RATE_OF_FULL,
    ),
)
METHODS = {cell.name: cell for cell in _METHODS}

RANKS = {
    f"rank-{rank}": Cell(
        f"rank-{rank}",
        f"LoRA, rank {rank}",
        ("--rank", str(rank)),
        _RATE_OF_LORA,
        examples=_SMALL,
        answers=100,
    )
    for rank in (4, 8, 16, 32)
}

# The small T5 that `experiments.pretrain_t5` leaves has seen no summary: it learns from all.
_ALL = 12_460
_PART = 2_000
_T5_FULL_SEARCH = _searched("full", _FULL, ("3e-4", "1e-3", "3e-3"), examples=_PART)
_T5_LORA_SEARCH = _searched("lora", _LORA, ("1e-3", "3e-3", "1e-2"), examples=_PART)
_T5_METHODS = (
    Cell("base", "the model as it is", None),
    Cell("lora-8", "LoRA, rank 8", _LORA, tuple(_T5_LORA_SEARCH), examples=_ALL),
    Cell("full", "full fine-tuning", _FULL, tuple(_T5_FULL_SEARCH), examples=_ALL),
)

GRIDS = {
    "smollm2": Grid(
        results="dialogsum",
        search={**FULL_SEARCH, **LORA_SEARCH},
        methods=METHODS,
        ranks=RANKS,
        seconds_to_train=1.9,
        seconds_to_answer=1.3,
    ),
    "t5": Grid(
        results="dialogsum_t5",
        search={**_T5_FULL_SEARCH, **_T5_LORA_SEARCH},
        methods={cell.name: cell for cell in _T5_METHODS},
        ranks={},
        seconds_to_train=0.05,
        seconds_to_answer=0.08,
        model=Path("runs/pretrain_t5/model"),
    ),
}
