"""A small byte-level tokenizer that was trained on a few words, with a chat template."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.models.tokenizer import ChatTokenizer

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
END, BEGIN = "<|end|>", "<|begin|>"
SPECIAL = (END, BEGIN, "<|user|>", "<|assistant|>")
TEXTS = [
    "Hello, world! 12345 it's\n\n  next\tline",
    "ñandú 漢字 🙂",
    "def f(x):\n    return x+1\n",
    "one <|user|> two",
]


@functools.cache
def trained() -> tuple[Any, list[str], list[str]]:
    """Returns the tokenizer, its tokens in order and its merges."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=list(SPECIAL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world hello there the other world"] * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    return tokenizer, tokens, merges


def chat_tokenizer(template: str | None = TEMPLATE, *, ends_texts: bool = False) -> ChatTokenizer:
    """Returns the tokenizer with a template, or without one."""
    tokenizer, *_ = trained()
    return ChatTokenizer(
        tokenizer,
        "the model",
        template=template,
        begin=BEGIN,
        end=END,
        begins_texts=False,
        ends_texts=ends_texts,
    )


def write_folder(
    path: Path, *, single: Sequence[str] = ("$A",), changes: Mapping[str, Any] | None = None
) -> None:
    """Writes the tokenizer and its settings as Hugging Face's folders have them.

    Args:
      path: the folder.
      single: what the tokenizer itself puts around a text, `$A`.
      changes: other settings.
    """
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(trained()[0].to_str())
    special = [(each, tokenizer.token_to_id(each)) for each in single if each != "$A"]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=list(single), special_tokens=special
    )
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"chat_template": TEMPLATE, "eos_token": END, "bos_token": {"content": BEGIN}}
    settings |= changes or {}
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
