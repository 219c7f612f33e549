"""Kernels at sizes that need a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvarn.kernels import decode, decode_work, pages, quantize, rotate
from kvarn.kernels.launches import launch
from kvarn.presets import get_preset
from kvarn.reference import codec, hadamard
from kvarn.tile import TileLayout

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LAYOUT = TileLayout(get_preset("kvarn_k4v2_g128"), 128)
HEADS, PER_HEAD, CONTEXT, DISTINCT = 8, 4, 1 << 20, 16


def test_decode_over_a_million_tokens_in_a_cache_beyond_32_bits() -> None:
    """The context repeats the last few tiles of the cache, so the expected output is computed from those alone."""
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    group, head_dim = LAYOUT.group, LAYOUT.head_dim
    shape = (DISTINCT, 2, HEADS, group, head_dim)
    tiles = torch.randn(shape, generator=generator, device=device).half()
    blocks = 2**31 // (HEADS * LAYOUT.nbytes) + CONTEXT // group
    cache = torch.full((blocks, HEADS, LAYOUT.nbytes), 0xFF, dtype=torch.uint8, device=device)
    assert cache.numel() > 2**31
    last = torch.arange(blocks - DISTINCT, blocks, dtype=torch.int32, device=device)
    quantize.quantize_slots(
        tiles, torch.arange(DISTINCT, dtype=torch.int32, device=device), last, cache, LAYOUT
    )
    table = last.repeat(CONTEXT // group // DISTINCT)
    table[-1] = 0  # the token's own tile is raw
    query = torch.randn(1, HEADS * PER_HEAD, head_dim, generator=generator, device=device)
    shape = decode_work.DecodeShape.of(HEADS * PER_HEAD, HEADS, LAYOUT, 1, device)
    work = decode_work.DecodeWork(1, shape, device)
    out = torch.full(query.shape, torch.nan, device=device)

    def one(value: int) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.int32, device=device)

    decode_work.plan_work(one(CONTEXT), one(-1), group, shape, work)
    decode.decode(
        hadamard.rotate(query).half(),
        cache,
        tiles[-1:].contiguous(),
        table[None],
        one(CONTEXT),
        one(0),
        one(0),
        one(-1),
        head_dim**-0.5,
        LAYOUT,
        shape,
        work,
        decode.Parts(shape.parts(1, LAYOUT, CONTEXT // group) * shape.rows, head_dim, device),
        out,
    )

    key, value = (x.to(device) for x in codec.dequantize(cache[last.long()].cpu(), LAYOUT))
    key, value = torch.cat([key, tiles[-1:, 0].float()]), torch.cat([value, tiles[-1:, 1].float()])
    counts = torch.full((DISTINCT + 1,), CONTEXT / group / DISTINCT, device=device)
    counts[-2:] -= torch.tensor([1.0, counts[-1] - 1.0], device=device)
    rotated = hadamard.rotate(query).view(HEADS, PER_HEAD, head_dim)
    scores = torch.einsum("hmd,thgd->hmtg", rotated, key) * head_dim**-0.5 + counts.log()[:, None]
    weights = scores.flatten(2).softmax(-1).view_as(scores)
    expected = hadamard.rotate(torch.einsum("hmtg,thgd->hmd", weights, value)).view_as(out)
    error = (out - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert (error < 6e-3).all()


def test_calls_that_are_repeated_for_another_layer_write_what_first_calls_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, generator = torch.device("cuda"), torch.Generator("cuda").manual_seed(0)
    group, head_dim, tokens = LAYOUT.group, LAYOUT.head_dim, 300
    launched = []

    def counting(*arguments: Any, **constants: Any) -> None:
        launched.append(arguments[0])
        launch(*arguments, **constants)

    for module in (pages, quantize, rotate):
        monkeypatch.setattr(module, "launch", counting)

    def numbers(count: int) -> torch.Tensor:
        return torch.arange(count, dtype=torch.int32, device=device)

    def layer(packed: torch.Tensor, remembered: bool) -> list[torch.Tensor]:
        """Run a layer whose tensors are its own; calls with keyword arguments are not remembered."""
        query, key, value = packed.split_with_sizes([HEADS * PER_HEAD, HEADS, HEADS], dim=1)
        rotated = torch.zeros(tokens, HEADS * PER_HEAD, head_dim, dtype=torch.float16, device=device)
        pool = torch.zeros(4, 2, HEADS, group, head_dim, dtype=torch.float16, device=device)
        raw, read = (
            torch.zeros(2, 3, group, HEADS, head_dim, dtype=torch.float16, device=device) for _ in range(2)
        )
        cache = torch.zeros(3, HEADS, LAYOUT.nbytes, dtype=torch.uint8, device=device)
        out = packed[:, : HEADS * PER_HEAD].contiguous()
        into = pages.PageTiles(
            numbers(3), numbers(3), torch.tensor([-1, 1, -1], dtype=torch.int32, device=device)
        )
        calls: list[tuple[Callable[..., None], tuple[Any, ...], dict[str, Any]]] = [
            (
                rotate.rotate_store,
                (query, key, value, rotated, pool, numbers(tokens), raw),
                {"page_rows": numbers(tokens)},
            ),
            (quantize.quantize_pages, (raw, numbers(3), numbers(3), cache), {"layout": LAYOUT}),
            (quantize.quantize_slots, (pool, numbers(2)[1:], numbers(2)[1:], cache), {"layout": LAYOUT}),
            (pages.fill_pages, (cache, pool, read, into), {"layout": LAYOUT}),
            (rotate.unrotate, (), {"out": out}),
        ]
        for function, arguments, last in calls:
            if remembered:
                function(*arguments, *last.values())
            else:
                function(*arguments, **last)
        return [rotated, pool, raw, cache, read, out]

    layers = 3
    for _ in range(layers):
        shape = (tokens, HEADS * (PER_HEAD + 2), head_dim)
        packed = torch.randn(shape, generator=generator, device=device).bfloat16()
        for ours, expected in zip(layer(packed, True), layer(packed, False), strict=True):
            assert torch.equal(ours, expected)
    assert len(launched) == 5 + 5 * layers  # the remembered ones once
