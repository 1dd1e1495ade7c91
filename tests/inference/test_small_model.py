"""Configs of small models: numbers that belong together in the original still do, whatever their keys are called."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from autotp_plan.inference.small.resized import CANDIDATES, Sizes, resized

FIRST, SECOND = CANDIDATES[0]
LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 4,
    "vocab_size": 32000,
}


def small(sizes: Sizes, **more: Any) -> dict[str, Any]:
    return resized({**LLAMA, **more}, sizes, 2)


@pytest.mark.parametrize("sizes", [FIRST, SECOND])
def test_the_width_of_queries_is_that_of_its_parts(sizes: Sizes) -> None:
    found = small(sizes, qk_nope_head_dim=128, qk_rope_head_dim=64, qk_head_dim=192, v_head_dim=128)
    assert found["qk_head_dim"] == found["qk_nope_head_dim"] + found["qk_rope_head_dim"]
    assert len({found["qk_nope_head_dim"], found["v_head_dim"], found["qk_rope_head_dim"]}) == 3


def test_heads_of_some_layers_are_their_own() -> None:
    """Layers with as many key-value heads as heads in a model where others have fewer; only layers that are kept."""
    own = {"num_attention_heads": 64, "num_key_value_heads": 64}
    found = small(FIRST, per_layer_config={"1": own, "3": own})
    assert found["num_key_value_heads"] < found["num_attention_heads"]
    assert found["per_layer_config"] == {"1": {"num_attention_heads": 8, "num_key_value_heads": 8}}


def test_keys_of_layers_with_sliding_windows_are_known() -> None:
    found = small(FIRST, head_dim=128, swa_head_dim=128, swa_num_attention_heads=64)
    assert (found["swa_head_dim"], found["swa_num_attention_heads"]) == (FIRST.head_dim, FIRST.heads)


def test_every_vocabulary_is_small() -> None:
    found = small(FIRST, vocab_size_per_layer_input=262144, encoder_hash_byte_group_vocab=500002, codebook_size=2048)
    assert found["vocab_size_per_layer_input"] == found["encoder_hash_byte_group_vocab"] == 256
    assert found["codebook_size"] == 2048, "no vocabulary, and no width"


def test_a_hidden_size_of_all_heads() -> None:
    """Where the width of heads has a key, the hidden size need not be that of all heads; some models want it to be."""
    assert small(FIRST, head_dim=128)["hidden_size"] != FIRST.heads * FIRST.head_dim
    square = small(replace(FIRST, square=True), head_dim=128)
    assert square["hidden_size"] == square["num_attention_heads"] * square["head_dim"]
    twice = small(replace(FIRST, square=True), attention_hidden_size=8192, attention_head_dim=256)
    assert twice["attention_hidden_size"] == 2 * twice["hidden_size"]
    assert twice["attention_head_dim"] * twice["num_attention_heads"] == twice["attention_hidden_size"]
