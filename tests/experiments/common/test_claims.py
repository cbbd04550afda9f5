"""The checks of LoRA's claims notice when a claim is broken."""

import dataclasses

import jax
import numpy as np
import pytest

import lora_jax
from experiments.common.claims import (
    Claim,
    check,
    frozen_unchanged,
    max_weight_error,
    predictions_claim,
)
from experiments.common.evaluation import Evaluation


@pytest.fixture
def wrapped(small_network, small_split):
    params = small_network.init(jax.random.key(0), small_split.inputs[:1])["params"]
    return lora_jax.wrap(params, "hidden_1", rank=2, alpha=4)


def with_kernel(wrapped, **changes):
    kernel = dataclasses.replace(wrapped["hidden_1"]["kernel"], **changes)
    return {**wrapped, "hidden_1": {**wrapped["hidden_1"], "kernel": kernel}}


def test_frozen_weights_are_compared_bit_for_bit(wrapped):
    clone = jax.tree.map(np.array, lora_jax.unwrap(wrapped))
    base = np.array(wrapped["hidden_1"]["kernel"].base)
    assert frozen_unchanged(clone, wrapped)
    base[0, 0] = np.nextafter(base[0, 0], np.float32(1))
    assert not frozen_unchanged(clone, with_kernel(wrapped, base=base))


def test_the_weight_error_is_what_merging_leaves_out(wrapped):
    trained = with_kernel(wrapped, lora_B=np.ones((2, 16), np.float32))
    assert max_weight_error(trained, lora_jax.merge(trained)) < 1e-6
    product = 2 * np.abs(np.asarray(trained["hidden_1"]["kernel"].lora_A).sum(axis=1)).max()
    assert max_weight_error(trained, lora_jax.unwrap(trained)) == pytest.approx(product)


def test_predictions_are_counted_and_compared_with_what_must_agree():
    labels = np.zeros(4, np.int32)
    one = Evaluation(np.array([0, 1, 2, 3], np.int32), labels, 0.0)
    other = Evaluation(np.array([0, 1, 2, 0], np.int32), labels, 0.0)
    claim = predictions_claim("alike", one, other, 0.75)
    assert claim == Claim("alike", True, "3 of 4 predictions alike")
    assert not predictions_claim("alike", one, other, 1.0).holds


def test_a_claim_that_does_not_hold_is_named_with_what_was_measured():
    check([Claim("one", True), Claim("two", True, "by far")])
    with pytest.raises(RuntimeError, match=r"^not as claimed: two \(off by 3\); three$"):
        check([Claim("one", True), Claim("two", False, "off by 3"), Claim("three", False)])
