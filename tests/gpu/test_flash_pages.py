"""FlashAttention over pages, with and without splits, against our own kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvarn.kernels.pages import PageTiles
from kvarn.kernels.prefill_plan import Chunks, pages_for, plan_prefill
from kvarn.vllm.gpu.page_attention import FlashPages, PageAttention, TritonPages, attend_wave, page_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GROUP = 128
CHUNKS = {  # (tokens before, new tokens) of each chunk of a step
    "first token": [(0, 1)],
    "short prompts": [(0, 37), (0, 300), (0, 128)],
    "one token after a long context": [(9000, 1)],
    "a chunk of a tile": [(32768, 128)],
    "a chunk across tiles": [(32700, 200)],
    "many chunks": [(i * 311, 5 + 13 * i) for i in range(24)],
}


@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "head_dim"), [(8, 2, 128), (32, 8, 128), (16, 2, 64), (16, 2, 256)]
)
@pytest.mark.parametrize("lengths", CHUNKS.values(), ids=CHUNKS)
def test_flash_attention_and_our_kernel_agree(
    lengths: list[tuple[int, int]], query_heads: int, kv_heads: int, head_dim: int
) -> None:
    device, generator = torch.device("cuda"), torch.Generator("cuda").manual_seed(0)
    if not isinstance(page_attention(kv_heads, head_dim, device), FlashPages):
        pytest.skip("vLLM uses no FlashAttention for these heads here")
    before, new = np.array(lengths).T
    first = np.insert(np.cumsum(new), 0, 0)
    tokens, seq_lens = int(first[-1]), before + new
    pages_needed = sum(
        pages_for(int(length), int(count), GROUP) for length, count in zip(seq_lens, new, strict=True)
    )
    blocks = int(-(-seq_lens.max() // GROUP))
    block_table = torch.arange(len(lengths) * blocks, dtype=torch.int32, device=device).view(
        len(lengths), blocks
    )
    slot_of = torch.full((block_table.numel(),), -1, dtype=torch.int32, device=device)
    rows = [torch.empty(tokens, dtype=torch.int32, device=device) for _ in range(2)]
    chunks = Chunks(np.arange(len(lengths)), first, seq_lens, GROUP)
    (wave,) = plan_prefill(chunks, block_table, slot_of, pages_needed, *rows)
    pages = torch.randn(2, pages_needed, GROUP, kv_heads, head_dim, generator=generator, device=device).half()
    query = torch.randn(tokens, query_heads, head_dim, generator=generator, device=device).half()
    scale = head_dim**-0.5
    logits = torch.linspace(-2, 5, query_heads, device=device).bfloat16()
    for sinks, soft_cap in ((None, 0.0), (logits, 0.0), (logits, 1.0)):
        expected, out = torch.empty_like(query), torch.empty_like(query)
        TritonPages(sinks, soft_cap).attend(query, pages, wave, scale, expected)
        flash = page_attention(kv_heads, head_dim, device, sinks=sinks, soft_cap=soft_cap)
        flash.attend(query, pages, wave, scale, out)
        assert (out - expected).abs().max() <= 2e-3 * expected.abs().max()


@pytest.mark.parametrize("ours", [False, True])
def test_parts_of_a_context_join_to_the_whole(ours: bool) -> None:
    device, generator = torch.device("cuda"), torch.Generator("cuda").manual_seed(0)
    context, tokens, heads, head_dim = 32700, 300, 2, 128
    blocks = -(-(context + tokens) // GROUP)
    tiles, new = (
        torch.randn(2, count, heads, head_dim, generator=generator, device=device).half()
        for count in (blocks * GROUP, tokens)
    )
    query = torch.randn(tokens, 8, head_dim, generator=generator, device=device).half()
    sinks = torch.linspace(-2, 5, 8, device=device).bfloat16()
    attention: PageAttention = (
        TritonPages(sinks) if ours else page_attention(heads, head_dim, device, sinks=sinks)
    )
    chunks = Chunks(np.zeros(1, np.int64), np.array([0, tokens]), np.array([context + tokens]), GROUP)
    table = torch.arange(blocks, dtype=torch.int32, device=device)[None]
    none = torch.full((1,), -1, dtype=torch.int32, device=device)
    attended = []
    for page_count in (blocks + 4, 68):
        rows = [torch.empty(tokens, dtype=torch.int32, device=device) for _ in range(2)]
        (planned,) = plan_prefill(chunks, table, none, page_count, *rows)
        assert len(planned.rest) == (page_count == 68) * 3
        # What an earlier step left; the engine's pages, zeros at first, hold no NaN, by which 0 may not be multiplied.
        pages = torch.full((2, page_count, GROUP, heads, head_dim), 1e4, device=device).half()

        def fill(chosen: PageTiles, pages: torch.Tensor = pages) -> None:
            by_tile = tiles.view(2, blocks, GROUP, heads, head_dim)
            pages[:, chosen.pages.long()] = by_tile[:, chosen.blocks.long()]

        fill(planned.begun)
        pages.flatten(1, 2)[:, rows[1].long()] = new
        out = torch.empty_like(query)
        attend_wave(attention, query, pages, planned, head_dim**-0.5, out, fill, torch.empty_like(query))
        attended.append(out)
    whole, joined = attended
    assert (joined - whole).abs().max() <= 2e-3 * whole.abs().max()
