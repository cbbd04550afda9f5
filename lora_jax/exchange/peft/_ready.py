"""Rules that are ready: those of known architectures in the trees of known libraries."""

from collections.abc import Iterator
from typing import Literal

from lora_jax._paths import listed
from lora_jax.exchange.peft._architectures import NAMES, TREES, Leaf, Tree
from lora_jax.exchange.peft._rules import Rule

TreeName = Literal["lora_jax", "flax", "tunix"]

_SHOWN = 20


def ready_rules(model_type: str, tree: TreeName, *, tied: bool | None = None) -> tuple[Rule, ...]:
    """Returns the rules for all weights of a known architecture in a known library's tree.

    They serve `load`, `save` and `preview` of adapters, and `exchange.place` of a whole checkpoint
    in Hugging Face's format. They know the axes too: `preview(params, names=...).axes` has them as
    `wrap` takes them. Rules for weights that a model doesn't have do nothing.

    Args:
      model_type: the architecture, as the key `model_type` of Hugging Face's `config.json` has it.
      tree: whose parameters it is about: `"lora_jax"`, of this project's `experiments.models`;
        `"flax"`, of the Flax classes of `transformers` 4, such as `FlaxLlamaForCausalLM`;
        `"tunix"`, of `tunix.models`.
      tied: whether the output layer is the embedding, as `tie_word_embeddings` in `config.json`
        has it; unless given, as the architecture's default has it.

    Returns:
      The rules, of which each leaf has one. That of a tied embedding has the name of the output
      layer too.

    Raises:
      ValueError: there are no rules for the architecture, for its tree, or for one that is tied or
        isn't.

    Examples:
      >>> from lora_jax.exchange import peft
      >>> rules = peft.ready_rules("llama", "tunix", tied=True)
      >>> rules[0].name, rules[0].path, rules[0].tied
      ('model.embed_tokens.weight', 'embedder/input_embedding', 'lm_head.weight')
      >>> rules[2].name, rules[2].path, rules[2].axes
      ('model.layers.{layer}.self_attn.q_proj.weight', ..., ('in', 'out', 'out'))
    """
    _check_known(model_type, tree)
    found = TREES[model_type, tree]
    ties = found.ties[0] if tied is None else tied
    if ties not in found.ties:
        raise ValueError(
            f"`tied` is {tied!r} for the model type {model_type!r} in the tree {tree!r}; expected "
            f"{found.ties[0]}, since its output layer is "
            f"{'always' if found.ties[0] else 'never'} the embedding."
        )
    return tuple(_rules(model_type, found, ties=ties))


def _check_known(model_type: str, tree: str) -> None:
    if model_type not in NAMES:
        raise ValueError(
            f"`model_type` is {model_type!r}; expected one of {listed(sorted(NAMES), _SHOWN)}, as "
            "in the `config.json` of the model. For any other, write rules: "
            "Rule('model.layers.{layer}.self_attn.q_proj.weight', 'layer_{layer}/query/kernel')."
        )
    trees = [other for each, other in TREES if each == model_type]
    if tree not in trees:
        types = sorted(each for each, other in TREES if other == tree)
        has = f"; that tree has {listed(types, _SHOWN)}" if types else ""
        raise ValueError(
            f"`tree` is {tree!r} for the model type {model_type!r}; expected "
            f"{' or '.join(map(repr, trees))}, for which there are rules{has}."
        )


def _rules(model_type: str, tree: Tree, *, ties: bool) -> Iterator[Rule]:
    names = NAMES[model_type]
    for weight, leaf in tree.leaves.items():
        is_tied_head = weight == "head" and ties
        if weight in names and not is_tied_head:
            yield _rule(names[weight], leaf, tied=_tied(model_type, tree, weight, ties=ties))


def _rule(name: str, leaf: Leaf, *, tied: bool | str) -> Rule:
    return Rule(name, leaf.path, kind=leaf.kind, axes=leaf.axes, tied=tied)


def _tied(model_type: str, tree: Tree, weight: str, *, ties: bool) -> bool | str:
    """Returns what a rule says of another parameter that the weight is too."""
    if weight != "embedding":
        return False
    # PEFT would adapt one of the modules, and no name stands for all the others.
    if tree.is_shared:
        return True
    return NAMES[model_type]["head"] if ties else False
