"""DialogSum (Chen et al., 2021): dialogues and summaries of them, as conversations."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.common.errors import InputError
from experiments.llm.examples import Example, read_lines

NAME = "dialogsum"
_FOLDER = "DIALOGSUM_DIR"
_INSTRUCTION = "Summarize the following dialogue.\n\n"
# The test file has three summaries of each dialogue.
_SUMMARIES = ("summary", "summary1", "summary2", "summary3")


@dataclass(frozen=True)
class Dialogue:
    """A dialogue with the summaries that people wrote of it."""

    text: str
    summaries: tuple[str, ...]
    where: str

    @property
    def question(self) -> dict[str, str]:
        """What a model is asked."""
        return {"role": "user", "content": f"{_INSTRUCTION}{self.text}"}

    @property
    def example(self) -> Example:
        """The dialogue with its first summary, to learn from."""
        answer = {"role": "assistant", "content": self.summaries[0]}
        return Example(self.where, messages=(self.question, answer))


def dialogues(part: str) -> list[Dialogue]:
    """Returns the dialogues of a part: `train`, `dev` or `test`.

    Raises:
      InputError: the environment names no folder with the files, or one of them is damaged.
    """
    folder = os.environ.get(_FOLDER)
    if not folder:
        raise InputError(
            f"--data {NAME} reads the folder that {_FOLDER} names, and it is not set; expected one "
            f"with {', '.join(_names('train'))} and the same for dev and test"
        )
    names = _names(part)
    path = next((Path(folder) / name for name in names if (Path(folder) / name).is_file()), None)
    if path is None:
        raise InputError(f"{_FOLDER} {folder} has neither {' nor '.join(names)}")
    return [_dialogue(entry, where) for entry, where in read_lines(path)]


def _names(part: str) -> Sequence[str]:
    return f"{NAME}.{part}.jsonl", f"{NAME}.{part}.jsonl.gz"


def _dialogue(entry: dict[str, Any], where: str) -> Dialogue:
    text = entry.get("dialogue")
    summaries = tuple(entry[name] for name in _SUMMARIES if isinstance(entry.get(name), str))
    if not isinstance(text, str) or not summaries:
        raise InputError(
            f"{where} has the keys {', '.join(entry) or 'none'}; expected `dialogue` and `summary`"
        )
    return Dialogue(text, summaries, where)
