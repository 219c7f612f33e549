"""Which attention over pages a GPU gets, and how FlashAttention splits a wave; FlashAttention itself needs a GPU."""

import math
import sys
import types

import numpy as np
import pytest
import torch
from vllm.platforms import current_platform

from kvarn.kernels.pages import PageTiles, fill_pages
from kvarn.kernels.prefill_plan import Chunks, PrefillWave, plan_prefill
from kvarn.kernels.rotate import float16_rows
from kvarn.presets import get_preset
from kvarn.reference import codec
from kvarn.tile import TileLayout
from kvarn.vllm.gpu import page_attention
from kvarn.vllm.gpu.page_attention import FLASH_BLOCK_ROWS, MIN_SPLIT_KEYS, FlashPages, TritonPages

CPU = torch.device("cpu")
PROCESSORS = 132
LOG_SUM = 1.5  # of every softmax of FlashAttention's double


@pytest.fixture
def flash(monkeypatch):
    """FlashAttention's calls; vLLM's module needs a GPU."""
    calls = []
    module = types.ModuleType("kvarn.vllm.access.flash_attention")

    def attend(**given):
        calls.append(given)
        return given["out"], torch.full((given["q"].shape[1], given["q"].shape[0]), LOG_SUM)

    module.flash_attn_varlen_func = attend
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(page_attention, "processors", lambda device: PROCESSORS)
    return calls


@pytest.mark.parametrize("version", [2, 3, 4, None])
def test_a_gpu_gets_the_flash_attention_that_vllm_uses_there(monkeypatch, flash, version):
    asked = []
    utilities = types.ModuleType("vllm.v1.attention.backends.fa_utils")
    utilities.get_flash_attn_version = lambda head_size: asked.append(head_size) or version
    monkeypatch.setitem(sys.modules, utilities.__name__, utilities)
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: False)
    assert isinstance(page_attention.page_attention(8, 256, CPU), TritonPages)
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    chosen = page_attention.page_attention(8, 256, CPU, soft_cap=30.0)
    assert asked == [256]
    if version is None:
        assert isinstance(chosen, TritonPages)
        return
    query, pages = torch.zeros(1, 32, 256).half(), torch.zeros(2, 1, 128, 8, 256).half()
    chosen.warm_up(query, pages)
    assert {(call["fa_version"], call["softcap"]) for call in flash} == {(version, 30.0)}
    # Version 4 compiles its kernels when they first run.
    assert [call["num_splits"] for call in flash] == ([1, 2] if version == 4 else [1])


def wave(tiles: int, tokens: int, longest: int) -> PrefillWave:
    none = torch.empty(0, dtype=torch.int32)
    nothing = PageTiles(none, none, none)
    numbers = torch.zeros(tiles, dtype=torch.int32)
    return PrefillWave(0, tokens, nothing, nothing, nothing, numbers, numbers, numbers[:, None], longest)


@pytest.mark.parametrize(("query_heads", "kv_heads"), [(32, 8), (8, 8), (16, 1), (6, 2), (64, 8)])
@pytest.mark.parametrize("version", [2, 3, 4])
def test_short_chunks_fill_the_multiprocessors_within_the_scratch(flash, version, query_heads, kv_heads):
    head_dim = 128
    attention = FlashPages(version, kv_heads, head_dim, CPU)
    longest = PROCESSORS * MIN_SPLIT_KEYS
    for tiles in (1, 2, 3, 64):
        for tokens in (tiles, 20 * tiles, 128 * tiles):
            query = torch.empty(tokens, query_heads, head_dim, dtype=torch.float16)
            pages = torch.empty(2, 1, 128, kv_heads, head_dim, dtype=torch.float16)
            attention.attend(query, pages, wave(tiles, tokens, longest), 1.0, query)
            call = flash.pop()
            assert (call["max_seqlen_q"], call["max_seqlen_k"]) == (128, longest)
            splits = call["num_splits"]
            rows = tokens * query_heads // kv_heads
            programs = kv_heads * max(tiles, -(-rows // FLASH_BLOCK_ROWS))
            if version == 2:
                assert splits == 1
            elif programs <= PROCESSORS:
                assert splits * programs <= PROCESSORS < (splits + 1) * programs
            else:
                assert splits == 1
            partial_results = (splits > 1) * splits * tokens * query_heads * (head_dim + 1) * 4
            assert partial_results <= attention.scratch_bytes


@pytest.mark.parametrize("splits_keys", [True, False])
def test_short_contexts_and_a_fixed_split_never_depend_on_the_wave(flash, splits_keys):
    attention = FlashPages(3, 2, 128, CPU, splits_keys)
    query, pages = torch.empty(1, 8, 128).half(), torch.empty(2, 1, 128, 2, 128).half()
    for longest, splits in ((1, 1), (2 * MIN_SPLIT_KEYS - 1, 1), (2 * MIN_SPLIT_KEYS, 2), (32768, 16)):
        attention.attend(query, pages, wave(1, 1, longest), 1.0, query)
        assert flash.pop()["num_splits"] == (splits if splits_keys else 1)
    assert (attention.scratch_bytes > 0) == splits_keys


def test_sinks_take_their_share_of_what_flash_attention_returns(flash):
    sinks = torch.tensor([-300.0, 0.0, LOG_SUM, 300.0]).bfloat16()
    attention = FlashPages(3, 2, 128, CPU, sinks=sinks)
    out, pages = torch.full((3, 4, 128), 8.0).half(), torch.empty(2, 1, 128, 2, 128).half()
    log_sum = attention.attend(out.clone(), pages, wave(1, 3, 128), 1.0, out)
    torch.testing.assert_close(log_sum[:, 0].exp(), math.exp(LOG_SUM) + sinks.float().exp())
    weight = math.exp(LOG_SUM) / (math.exp(LOG_SUM) + 1)
    expected = torch.tensor([8.0, 8 * weight, 4.0, 0.0])[:, None].expand(4, 128)
    torch.testing.assert_close(out, expected.expand(3, 4, 128).half(), rtol=2e-3, atol=0)
    assert flash.pop()["causal"]
    part = torch.full_like(out, 8.0)
    log_sum = attention.attend(part.clone(), pages, wave(1, 3, 128), 1.0, part, causal=False)
    assert not flash.pop()["causal"]
    assert (log_sum == LOG_SUM).all()
    assert (part == 8.0).all()


@pytest.mark.parametrize(("sinks", "soft_cap"), [(None, 0.0), (torch.tensor([-1.0, 5.0]), 0.0), (None, 2.0)])
@pytest.mark.parametrize(("context", "tokens"), [(9 * 64, 1), (0, 5 * 64 + 3), (7 * 64 + 20, 100)])
def test_parts_of_a_context_join_to_the_whole(sinks, soft_cap, context, tokens):
    """Where a chunk's context does not fit the pages, also where it is the chunk's own tiles."""
    layout, random = TileLayout(get_preset("kvarn_k4v4_g64"), 64), torch.Generator().manual_seed(0)
    length, group, head_dim = context + tokens, layout.group, layout.head_dim
    blocks = -(-length // group)
    tiles = torch.randn(blocks, 2, 1, group, head_dim, generator=random).half()
    records = codec.quantize(tiles[:, 0], tiles[:, 1], layout)
    new = torch.randn(2, tokens, 1, head_dim, generator=random).half()
    query = torch.randn(tokens, 2, head_dim, generator=random).half()
    chunks = Chunks(np.zeros(1, np.int64), np.array([0, tokens]), np.array([length]), group)
    own = int(chunks.own_tiles[0])
    attended, parts = [], []
    for page_count in (blocks + own, own + 3, own + 1):
        rows = [torch.empty(tokens, dtype=torch.int32) for _ in range(2)]
        table, slot_of = (
            torch.arange(blocks, dtype=torch.int32)[None],
            torch.tensor([0, -1], dtype=torch.int32),
        )
        (planned,) = plan_prefill(chunks, table, slot_of, page_count, *rows)
        pages = torch.full((2, page_count, group, 1, head_dim), torch.nan).half()

        def fill(chosen, pages=pages):
            fill_pages(records, tiles, pages, chosen, layout)

        fill(planned.begun)
        pages.flatten(1, 2)[:, rows[1].long()] = new
        out = torch.full(query.shape, torch.nan)
        attention = TritonPages(sinks, soft_cap)
        page_attention.attend_wave(
            attention, query, pages, planned, 0.3, float16_rows(out), fill, torch.empty_like(query)
        )
        attended.append(float16_rows(out).clone())
        parts.append(len(planned.rest))
    assert parts[0] == 0 < parts[1] < parts[2]
    for joined in attended[1:]:
        torch.testing.assert_close(joined, attended[0], rtol=0, atol=4e-3)
