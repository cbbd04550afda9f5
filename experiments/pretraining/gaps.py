"""Texts with gaps: what T5 is pretrained with (Raffel et al., 2020, section 3.1.4)."""

import numpy as np
from jaxtyping import Int

from experiments.llm.texts import TokenizedExample
from experiments.pretraining.options import GapOptions

Tokens = Int[np.ndarray, " length"]


def with_gaps(
    tokens: Tokens,
    options: GapOptions,
    sentinels: Tokens,
    random: np.random.Generator,
    *,
    start: int,
    end: int,
) -> TokenizedExample:
    """Returns an example whose source has gaps, and whose answer fills them.

    In the source a sentinel stands for each span that is missing; the answer is each sentinel with
    its span behind it, one more sentinel, and the end.

    Args:
      tokens: the text, of two tokens at least.
      options: how much is missing.
      sentinels: the tokens that stand for gaps, in their order; the text is not so long that it has
        more gaps.
      random: decides which spans are missing.
      start: the token with which the decoder begins.
      end: the token that ends texts.
    """
    missing = min(max(round(len(tokens) * options.missing), 1), len(tokens) - 1)
    count = max(min(round(missing / options.span), missing, len(tokens) - missing), 1)
    count = min(count, len(sentinels) - 1)
    kept, gone = (_in_parts(total, count, random) for total in (len(tokens) - missing, missing))
    source, answer, place = [], [start], 0
    for sentinel, before, span in zip(sentinels, kept, gone, strict=False):
        source += [*tokens[place : place + before], sentinel]
        place += before
        answer += [sentinel, *tokens[place : place + span]]
        place += span
    answer += [sentinels[count], end]
    return TokenizedExample(
        np.array(answer, np.int32),
        np.arange(len(answer)) > 0,
        np.array([*source, end], np.int32),
    )


def _in_parts(total: int, count: int, random: np.random.Generator) -> Tokens:
    """Returns the lengths of parts of at least one, all ways to divide alike likely."""
    ends = np.sort(random.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(ends, prepend=0, append=total)
