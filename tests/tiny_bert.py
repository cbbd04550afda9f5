"""A BERT with random weights and a tokenizer of a few words, in Hugging Face's layout."""

import json
from pathlib import Path
from typing import Any

import numpy as np

CONFIG = {
    "model_type": "bert",
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 36,
    "max_position_embeddings": 20,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "pad_token_id": 0,
}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = (
    *("a", "an", "the", "film", "plot", "is", "was", "not", "very"),
    *("good", "bad", "great", "dull", "##ly", "##er", ".", ",", "!"),
)


def tensors(config: dict[str, Any] = CONFIG, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns the weights of an encoder, its pooler among them, under Hugging Face's names."""
    width, wide = config["hidden_size"], config["intermediate_size"]
    rows = {
        "word": config["vocab_size"],
        "position": config["max_position_embeddings"],
        "token_type": config["type_vocab_size"],
    }
    shapes: dict[str, tuple[int, ...]] = {
        f"embeddings.{name}_embeddings.weight": (count, width) for name, count in rows.items()
    }
    linear = {"pooler.dense": (width, width)}
    norms = ["embeddings.LayerNorm"]
    for number in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{number}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            linear[f"{layer}.attention.{name}"] = (width, width)
        linear[f"{layer}.intermediate.dense"] = (wide, width)
        linear[f"{layer}.output.dense"] = (width, wide)
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    random = np.random.default_rng(seed)
    values = {name: 0.2 * random.standard_normal(shape) for name, shape in shapes.items()}
    for name in norms:
        values[f"{name}.weight"] = 1 + 0.2 * random.standard_normal(width)
        values[f"{name}.bias"] = 0.2 * random.standard_normal(width)
    return {name: value.astype(np.float32) for name, value in values.items()}


def write_model(
    folder: Path, config: dict[str, Any] = CONFIG, weights: dict[str, np.ndarray] | None = None
) -> Path:
    """Writes config.json, model.safetensors and tokenizer.json; returns the folder."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors(config) if weights is None else weights, folder / "model.safetensors")
    write_tokenizer(folder / "tokenizer.json")
    return folder


def write_tokenizer(path: Path) -> None:
    """Writes a tokenizer that, as MiniLM's does, would pad every sentence to one length."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
    )
    tokenizer.enable_padding(length=12)
    tokenizer.enable_truncation(12)
    tokenizer.save(str(path))


def sentences_tsv(seed: int, *, count: int) -> str:
    """Returns lines of sentences of two to ten words, and whether they praise."""
    random = np.random.default_rng(seed)
    lines = ["sentence\tlabel"]
    for number in range(count):
        word = ("bad", "dull", "good", "great")[number % 4]
        others = random.choice(["a", "the", "film", "plot", "very", "is"], random.integers(1, 9))
        lines.append(f"{' '.join(others)} {word}\t{int(number % 4 > 1)}")
    return "\n".join(lines)
