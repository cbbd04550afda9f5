"""The check of annotations is on while tests run."""

import jax.numpy as jnp
import jaxtyping
import pytest

import lora_jax
from tests.typechecking import annotations_unchecked


def test_another_type_than_annotated_raises() -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'dora'"):
        lora_jax.wrap({"kernel": jnp.ones((4, 3))}, "kernel", rank=1, dora="yes")


def test_unchecked_the_library_is_called_as_users_do() -> None:
    with annotations_unchecked(), pytest.raises(TypeError, match="`dora`"):
        lora_jax.wrap({"kernel": jnp.ones((4, 3))}, "kernel", rank=1, dora="yes")
