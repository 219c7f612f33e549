"""Pages that tiles share with the blocks of layers that keep vLLM's own cache."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.attention.backend import MultipleOf

from kvarn.layer_kinds import FULL, SLIDING
from kvarn.presets import get_preset
from kvarn.tile import TileLayout
from kvarn.vllm.mixed_layers import (
    LocalLayers,
    block_sizes,
    pages_of,
    quantized_group,
    share_pages,
    splits_quantized,
    state_pages,
    tile_distance,
    tile_stride,
)
from kvarn.vllm.spec import KVarNSpec


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


def _state_model(attention: int, state_floats: int) -> Any:
    full = SimpleNamespace(kv_cache_dtype="kvarn_k4v2_g128", head_size=128, num_kv_heads=8)
    state = SimpleNamespace(
        get_state_shape=lambda: ((3, 7), (state_floats,)),
        get_state_dtype=lambda: (torch.bfloat16, torch.float32),
    )
    layers = {str(i): layer for i, layer in enumerate([*[full] * attention, state])}
    return SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))


@given(attention=st.integers(1, 40), state_floats=st.integers(1, 10**6))
def test_a_block_beside_states_has_the_fewest_tiles_that_hold_one(attention: int, state_floats: int) -> None:
    tile = 8 * TileLayout(get_preset("kvarn_k4v2_g128"), 128).nbytes
    pages = state_pages(_state_model(attention, state_floats))
    assert 42 + 4 * state_floats <= pages.state_bytes < 42 + 4 * state_floats + 64
    assert (pages.tiles - 1) * attention * tile < pages.state_bytes <= pages.tiles * attention * tile


@pytest.mark.parametrize(
    ("state_floats", "tiles_apart"), [(10, 6), (10**6, None)], ids=["one tile per block", "several"]
)
def test_tiles_are_apart_where_a_block_has_one_of_each_layer(
    state_floats: int, tiles_apart: int | None
) -> None:
    tile = 8 * TileLayout(get_preset("kvarn_k4v2_g128"), 128).nbytes
    distance = tile_distance(_state_model(6, state_floats))
    assert distance == (tiles_apart and tiles_apart * tile)


@pytest.mark.parametrize("others", [0, 3])
def test_tiles_are_counted_over_the_pages_between_them(others: int) -> None:
    """Between the tiles of a layer in consecutive blocks are those of the other layers."""
    spec = KVarNSpec.of(TileLayout(get_preset("kvarn_k4v2_g128"), 128), 2, tiles=5)
    group = SimpleNamespace(kv_cache_spec=spec, layer_names=["a"])
    tensors = [
        SimpleNamespace(layers=["state"], block_stride=7),
        SimpleNamespace(layers=["a"], block_stride=(1 + others) * spec.page_size_bytes),
    ]
    assert tile_stride(SimpleNamespace(kv_cache_groups=[group], kv_cache_tensors=tensors), 0) == 5 * (
        1 + others
    )


class _Kernels:
    """An attention backend of layers with a window."""

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[Any]:
        return [MultipleOf(16)]


def _stage(quantized: int, local: int) -> Any:
    """The configuration of an engine's worker that has these layers of a model with two and six of these kinds."""
    full = SimpleNamespace(
        kv_cache_dtype="kvarn_k4v4_g128", head_size=64, num_kv_heads=2, sliding_window=None
    )
    window = SimpleNamespace(
        kv_cache_dtype="auto",
        kv_cache_torch_dtype=torch.bfloat16,
        head_size=64,
        head_size_v=64,
        num_kv_heads=2,
        sliding_window=1000,
        attn_backend=_Kernels,
    )
    layers = {str(i): layer for i, layer in enumerate([full] * quantized + [window] * local)}
    kinds = SimpleNamespace(layer_types=[FULL] * 2 + [SLIDING] * 6)
    return SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=layers),
        model_config=SimpleNamespace(max_model_len=1024, hf_text_config=kinds),
    )


def test_every_pipeline_stage_has_the_same_pages() -> None:
    """Those of a stage's own layers would differ: blocks of 32 and of 64 tokens."""
    whole = pages_of(_stage(2, 6))
    assert whole is not None
    assert pages_of(_stage(1, 1)) == pages_of(_stage(1, 5)) == whole
