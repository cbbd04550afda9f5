"""The ratios that the README shows, from the stored results."""

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.limit import ADAPT, BY_HAND
from benchmarks.peers.contender import OURS, PEFT
from experiments.common.tables import Table

Found = Mapping[str, Any]

_BY_HAND = "LoRA written into the model by hand"
_PEFT = "PEFT on PyTorch"


def tables(results: Mapping[str, Found]) -> list[Table]:
    """Returns the table, of `RESULTS` by name."""
    rows = [
        *_compiled(results["compiled_cost"]["models"]),
        *_timed(results["limit_llama"]["steps"]),
        *_beside_peft_on_mnist(results["peft_mnist"]),
        *_beside_peft_on_text(results["peft_text"]),
        *_beside_peft_on_language(*(results[name]["targets"] for name in LANGUAGE)),
    ]
    header = ["a training step through `adapt`", "compared with", "ratio"]
    return [Table("Ratios of a training step", header, rows)]


# On the machine of the others, and on one whose products are half as fast.
LANGUAGE = ("peft_llm", "peft_llm_slower")
RESULTS = ("compiled_cost", "limit_llama", "peft_mnist", "peft_text", *LANGUAGE)


def _compiled(models: Iterable[Found]) -> list[list[str]]:
    names = {
        "flops": "FLOPs of five models (MLP, transformer, scan with remat, CNN, tied head)",
        "bytes": "bytes read and written, the same models",
        "temporary_bytes": "temporary memory, the same models",
        "seconds": "tracing and compiling, the same models",
    }
    built = [each["costs"]["adapt"]["flops"] / each["costs"]["W + AB"]["flops"] for each in models]
    same = all(each["merged_is_base"] for each in models)
    return [
        *(
            [name, _BY_HAND, _range([each["ratios"][cost] for each in models], style)]
            for (cost, name), style in zip(names.items(), ("3", "3", "3", "2"), strict=True)
        ),
        ["FLOPs, the same models", "building W + AB", _range(built, "2")],
        ["inference after `merge`", "the base model", "the same program" if same else "another"],
    ]


def _timed(steps: Iterable[Found]) -> list[list[str]]:
    of_limit = {(each["rank"], each["step"]): each["of_limit"] for each in steps}
    ranks = dict.fromkeys(rank for rank, _ in of_limit)
    name = f"time, Llama-shaped blocks on 8 × 512 tokens, rank {' / '.join(map(str, ranks))}"
    by_hand = [of_limit[rank, ADAPT] / of_limit[rank, BY_HAND] for rank in ranks]
    return [
        [name, _BY_HAND, _both(by_hand)],
        [
            "the same blocks",
            "the frozen model's own forward pass and input gradient",
            _both(of_limit[rank, ADAPT] for rank in ranks),
        ],
    ]


def _beside_peft_on_mnist(found: Found) -> list[list[str]]:
    return [["time, MNIST network, batch 10, rank 1", _PEFT, f"{1 / found['faster'][PEFT]:.2f}"]]


def _beside_peft_on_text(found: Found) -> list[list[str]]:
    ours, theirs = (found["with_dropout"][side] for side in (OURS, PEFT))
    times = [1 / found["faster"][name] for name in ("with dropout", "without dropout")]
    ready, memory = (ours[name] / theirs[name] for name in ("seconds_to_ready", "peak_bytes"))
    return [
        [
            "time, BERT on text, with dropout / without",
            _PEFT,
            _both(times),
        ],
        ["peak memory, BERT on text, with dropout", _PEFT, f"{memory:.2f}"],
        ["seconds until BERT is ready to train", _PEFT, f"{ready:.1f}: JAX compiles"],
    ]


def _beside_peft_on_language(*targets: Iterable[Found]) -> list[list[str]]:
    found = [
        {each["description"].partition(",")[0]: each["found"] for each in own} for own in targets
    ]
    names = {
        "training tokens/s": "tokens/s of training, SmolLM2-135M, fastest beside fastest",
        "training memory": "peak memory of training, SmolLM2-135M, leanest beside leanest",
        "written tokens/s": "tokens/s of writing, SmolLM2-135M, adapter merged",
    }
    return [
        [f"{name}, here / on a slower machine", _PEFT, _both(each[target] for each in found)]
        for target, name in names.items()
    ]


def _both(values: Iterable[float]) -> str:
    return " / ".join(f"{value:.2f}" for value in values)


def _range(values: list[float], digits: str) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"
