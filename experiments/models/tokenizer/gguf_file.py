"""The tokenizer in the metadata of a GGUF file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.common.errors import InputError, needed_module
from experiments.models.tokenizer.chat import ChatTokenizer
from experiments.models.tokenizer.sentencepiece import SPACE

# What GGUF says a token is.
_CONTROL, _USER_DEFINED = 3, 4
# What is not known, among the pieces of SentencePiece.
_UNKNOWN = "<unk>"

# How texts are cut into words before tokens are made of them, by GGUF's name.
_CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
_WORDS_OF_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
_WORDS_OF_LLAMA3 = (
    rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS_OF_QWEN2 = _WORDS_OF_LLAMA3.replace("{1,3}", "")
_WORDS: Mapping[str, str] = {
    "default": _WORDS_OF_GPT2,
    "gpt-2": _WORDS_OF_GPT2,
    "smollm": _WORDS_OF_GPT2,
    "llama-bpe": _WORDS_OF_LLAMA3,
    "llama3": _WORDS_OF_LLAMA3,
    "qwen2": _WORDS_OF_QWEN2,
}
_EACH_DIGIT = ("smollm",)
_NORMALISED = ("qwen2",)


def tokenizer_of_gguf(path: Path, metadata: Mapping[str, Any]) -> ChatTokenizer:
    """Returns the tokenizer in the metadata of a GGUF file.

    Raises:
      InputError: it is of a kind that is not read, or lacks something; that is named.
    """
    tokens = _needed(path, metadata, "tokenizer.ggml.tokens")
    kind, words = (metadata.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind == "llama":
        scores = _needed(path, metadata, "tokenizer.ggml.scores")
        begins = metadata.get("tokenizer.ggml.add_space_prefix", True)
        tokenizer = _of_pieces(tokens, scores, begins_with_space=begins)
    elif kind == "gpt2" and words in _WORDS:
        tokenizer = _byte_level(tokens, _needed(path, metadata, "tokenizer.ggml.merges"), words)
    else:
        raise InputError(
            f"{path} has a tokenizer of the kind {kind!r}, which cuts words as {words!r}; expected "
            f"'llama', or 'gpt2' and one of {', '.join(_WORDS)}. Pass the model's folder in "
            "Hugging Face's format"
        )
    types = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    _add_special(tokenizer, tokens, types)

    def token(name: str) -> str | None:
        place = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return None if place is None else tokens[place]

    begin = token("bos")
    return ChatTokenizer(
        tokenizer,
        str(path),
        template=metadata.get("tokenizer.chat_template"),
        begin=begin,
        end=token("eos"),
        begins_texts=begin is not None
        and metadata.get("tokenizer.ggml.add_bos_token", kind == "llama"),
    )


def _byte_level(tokens: Sequence[str], merges: Sequence[str], words: str) -> Any:
    """Returns a tokenizer that merges pairs of bytes (Radford et al., GPT-2, 2019)."""
    tokenizers = needed_module("tokenizers", "lora-jax[llm]")
    vocabulary = {token: place for place, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, pairs, ignore_merges=words == "llama-bpe")
    )
    parts = [
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(_WORDS[words]), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    if words in _EACH_DIGIT:
        parts.insert(0, tokenizers.pre_tokenizers.Digits(individual_digits=True))
    if words in _NORMALISED:
        tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(parts)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def _of_pieces(tokens: Sequence[str], scores: Sequence[float], *, begins_with_space: bool) -> Any:
    """Returns a tokenizer that merges the pair of the best score, and falls back to bytes.

    Source: Kudo and Richardson, SentencePiece, 2018; the kind of Llama, Llama 2 and Mistral.
    """
    tokenizers = needed_module("tokenizers", "lora-jax[llm]")
    vocabulary = {token: place for place, token in enumerate(tokens)}
    of_token = dict(zip(tokens, scores, strict=True))
    pairs = [
        (token[:cut], token[cut:])
        for token in tokens
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    pairs.sort(key=lambda pair: -of_token[pair[0] + pair[1]])
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocabulary, pairs, unk_token=_UNKNOWN, fuse_unk=True, byte_fallback=True
        )
    )
    parts = [tokenizers.normalizers.Replace(" ", SPACE)]
    decoders = [
        tokenizers.decoders.Replace(SPACE, " "),
        tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(),
    ]
    if begins_with_space:
        parts.insert(0, tokenizers.normalizers.Prepend(SPACE))
        decoders.append(tokenizers.decoders.Strip(content=" ", left=1))
    tokenizer.normalizer = tokenizers.normalizers.Sequence(parts)
    tokenizer.decoder = tokenizers.decoders.Sequence(decoders)
    return tokenizer


def _add_special(tokenizer: Any, tokens: Sequence[str], types: Sequence[int]) -> None:
    tokenizers = needed_module("tokenizers", "lora-jax[llm]")
    of_type = list(zip(tokens, types, strict=True))
    control = [token for token, kind in of_type if kind == _CONTROL]
    given = [token for token, kind in of_type if kind == _USER_DEFINED]
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in control])
    tokenizer.add_tokens([tokenizers.AddedToken(token, special=False) for token in given])


def _needed(path: Path, metadata: Mapping[str, Any], name: str) -> Any:
    if name not in metadata:
        raise InputError(f"{path} has no {name}; expected a model with its tokenizer")
    return metadata[name]
