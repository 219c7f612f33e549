"""Pages that tiles share with the blocks of layers that keep vLLM's own cache."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.attention.backend import MultipleOf

from kvarn.layer_kinds import FULL, SLIDING
from kvarn.vllm.mixed_layers import (
    LocalLayers,
    block_sizes,
    quantized_group,
    share_pages,
    splits_quantized,
)


@given(
    tile_bytes=st.integers(1000, 10**6),
    token_bytes=st.integers(64, 10**4),
    layers=st.integers(1, 60),
    reach=st.integers(1, 5000),
    max_tokens=st.integers(100, 200_000),
)
def test_a_page_holds_a_tile_and_a_block(
    tile_bytes: int, token_bytes: int, layers: int, reach: int, max_tokens: int
) -> None:
    local = LocalLayers(layers, token_bytes, reach, block_sizes=(16, 32, 64, 128))
    pages = share_pages(tile_bytes, 128, 10, local, max_tokens)
    assert pages.block_tokens in local.block_sizes
    needed = max(tile_bytes, pages.block_tokens * token_bytes)
    assert needed <= pages.nbytes < needed + 512


def test_long_sequences_keep_the_pages_of_tiles_small() -> None:
    """A page that fits both kinds wastes nothing; else the kind that a sequence has more of decides."""
    local = LocalLayers(layers=5, token_bytes=1000, reach=1000, block_sizes=(16, 32, 64))
    assert share_pages(32_000, 128, 1, local, 128_000).block_tokens == 32
    assert share_pages(20_000, 128, 1, local, 10**6).block_tokens == 16
    assert share_pages(20_000, 128, 1, local, 1000).block_tokens > 16


def test_blocks_are_powers_of_two_that_a_backend_takes() -> None:
    assert block_sizes([MultipleOf(16)], 128, 16) == [16, 32, 64, 128]
    assert block_sizes([MultipleOf(32)], 64, 16) == [32, 64]
    assert block_sizes([16, 64], 128, 16) == [16, 64]
    assert block_sizes([MultipleOf(1)], 128, 32) == [32, 64, 128]


@pytest.mark.parametrize(
    ("kinds", "splits"),
    [
        ({FULL: 1, SLIDING: 5}, False),
        ({FULL: 13, SLIDING: 12}, False),
        ({FULL: 3, SLIDING: 2}, True),
    ],
    ids=str,
)
def test_vllm_splits_the_most_frequent_layers(kinds: dict[str, int], splits: bool) -> None:
    layers = [kind for kind, number in kinds.items() for _ in range(number)]
    model = SimpleNamespace(hf_text_config=SimpleNamespace(layer_types=layers))
    assert splits_quantized(model) is splits  # type: ignore[arg-type]


def test_several_groups_of_quantized_layers_are_an_error() -> None:
    with pytest.raises(ValueError, match="into 0 cache groups"):
        quantized_group([SimpleNamespace(kv_cache_spec=None)])
