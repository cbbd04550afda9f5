"""The kinds of adapters that the law battery runs: one row for each."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tests.cases import CASES, Case

# A use of each kind: what differs in wrapping alone needs no more than these.
KINDS_OF_USE = (
    "dense_matrix",
    "experts_on_the_last_axis",
    "attention_output",
    "conv_grouped",
    "tied_embedding",
    "concatenated_outputs",
    "scan_over_remat_of_a_stack",
    "elementwise_function_of_the_weight",
)
_WITH_BATCH_AXIS = (
    "experts",
    "experts_on_the_last_axis",
    "expert_of_each_token",
    "ragged_dot",
    "layer_of_a_stack",
    "layers_by_traced_index",
    "scan_over_a_stack",
    "scan_over_remat_of_a_stack",
)


_OF_TABLES = tuple(
    case.name
    for case in CASES
    if not case.axes
    and all(len(shape) == 2 for name, shape in case.shapes.items() if name.startswith("W"))
)


_BUILT = frozenset({"merged", "dense"})
_CUT = ("concatenated_then_sliced_and_transposed", "reshaped", "shard_map")


@dataclasses.dataclass(frozen=True, eq=False)
class Variant:
    """A kind of adapter: how it is wrapped, what it is tested on, and what holds to the bit.

    Attributes:
      name: its name.
      options: what `wrap` is told.
      cases: the names of the cases that it is tested on; all unless given.
      tolerance: the relative error that law 2 allows.
      keeps_base: whether the base is the original weight, bit for bit.
      builds: the cases in which it builds a weight that plain LoRA leaves factored, or the reverse.
    """

    name: str
    options: Mapping[str, Any]
    cases: Sequence[str] | None = None
    tolerance: float = 1e-5
    keeps_base: bool = True
    builds: Mapping[str, frozenset[str]] = dataclasses.field(default_factory=dict)

    def chosen_cases(self) -> list[Case]:
        return [case for case in CASES if self.cases is None or case.name in self.cases]

    def how(self, case: Case) -> frozenset[str]:
        """Returns how each use must be computed."""
        return self.builds.get(case.name, case.how)


VARIANTS = (
    Variant("lora", {}),
    Variant("rslora", {"rslora": True}, KINDS_OF_USE),
    Variant(
        "dora",
        {"dora": True},
        # The gain rounds the output once more, which the sine of a large scalar magnifies.
        tolerance=3e-5,
        # A gain on the side of the sum has to go to the other operand, which is a weight too, or
        # has none where weights are added or joined along their inputs.
        builds={
            "both_operands_adapted": frozenset({"factored", "materialized"}),
            "concatenated_inputs": frozenset({"materialized"}),
            "sums_of_weights": frozenset({"materialized"}),
            "the_same_weight_on_both_sides": frozenset({"factored", "materialized"}),
        },
    ),
    *(
        Variant(
            name,
            {"init": name},
            KINDS_OF_USE,
            keeps_base=False,
        )
        for name in ("pissa", "olora")
    ),
    Variant(
        "pissa, dora",
        {"init": "pissa", "dora": True},
        KINDS_OF_USE,
        keeps_base=False,
    ),
    Variant("mica", {"init": "mica"}, KINDS_OF_USE),
    Variant("orthogonal", {"init": "orthogonal"}, KINDS_OF_USE),
    Variant("lora_A frozen", {"freeze": "lora_A"}, KINDS_OF_USE),
    Variant(
        "rows",
        {"rows": (3, 0)},
        _OF_TABLES,
        # Built, the weight would be a copy for the sake of two rows; but where rows are cut, they
        # are an array of the weight's size already.
        builds={
            **{case.name: frozenset({"factored"}) for case in CASES if case.how & _BUILT},
            **dict.fromkeys(_CUT, frozenset({"dense"})),
        },
    ),
    Variant("some layers", {"layers": (0, 2)}, _WITH_BATCH_AXIS),
    Variant(
        "some layers, dora",
        {"layers": (1,), "dora": True},
        _WITH_BATCH_AXIS,
    ),
)
