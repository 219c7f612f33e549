"""The host's plan of prefill chunks, resolved page by page and compared with the read rule."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from kvarn.kernels.pages import PageTiles
from kvarn.kernels.prefill_plan import Chunks, PrefillWave, pages_for, plan_prefill

GROUP = 64


class Step:
    """A step of random chunks behind decode rows, whose tokens are planned by others."""

    def __init__(self, seed: int, in_parts: bool = False) -> None:
        rng = random.Random(seed)
        self.raw = rng.random() < 0.3
        count, self.decodes = rng.randint(1, 7), rng.choice([0, 0, 2])
        sizes = [1, 2, GROUP - 1, GROUP, GROUP + 1, 3 * GROUP, rng.randint(1, 5 * GROUP)]
        self.tokens = [1] * self.decodes + [rng.choice(sizes) for _ in range(count)]
        self.context = [rng.choice([0, GROUP, rng.randint(0, 6 * GROUP)]) for _ in self.tokens]
        rows, width = len(self.tokens), 12
        self.table = torch.randperm(rows * width, generator=torch.Generator().manual_seed(seed)).int()
        self.table = self.table.view(rows, width)
        # The last block of the map has no slot, nor have those past its end.
        self.slot_of = torch.full((rows * width - 7,), -1, dtype=torch.int32)
        for slot, block in enumerate(rng.sample(range(len(self.slot_of) - 1), len(self.slot_of) // 2)):
            self.slot_of[block] = slot
        largest = max(2 * -(-(c + t) // GROUP) + 1 for c, t in zip(self.context, self.tokens, strict=True))
        self.page_count = largest + rng.choice([0, 4, 100])
        if in_parts:
            own = [-(-(c % GROUP + t) // GROUP) for c, t in zip(self.context, self.tokens, strict=True)]
            self.page_count = max(own) + rng.randint(1, 3)
        self.slot_rows, self.page_rows = (torch.full((sum(self.tokens),), -9).int() for _ in range(2))

    def plan(self) -> list[PrefillWave]:
        first = np.concatenate([[0], np.cumsum(self.tokens)])[self.decodes :]
        lengths = np.array(self.context) + np.array(self.tokens)
        chunks = Chunks(
            np.arange(self.decodes, len(lengths)), first, lengths[self.decodes :], GROUP, self.raw
        )
        rows = self.slot_rows[first[0] :], self.page_rows[first[0] :]
        return plan_prefill(chunks, self.table, self.slot_of, self.page_count, *rows)

    def slot(self, request: int, tile: int) -> int:
        block = self.table[request, tile]
        return int(self.slot_of[block]) if block < len(self.slot_of) else -1


def written(tiles: PageTiles) -> dict[int, list[tuple]]:
    """What `fill_pages` writes to each page."""
    held: dict[int, list[tuple]] = {}
    for page, block, slot in torch.stack(list(tiles)).T.tolist():
        held.setdefault(page, []).append(("slot", slot) if slot >= 0 else ("record", block))
    return held


def contents(step: Step, wave: PrefillWave) -> dict[int, list[tuple]]:
    """What each page holds, in the order in which the backend writes it."""
    held = written(wave.begun)
    for token in range(wave.first, wave.last):
        page, row = divmod(int(step.page_rows[token]), GROUP)
        held.setdefault(page, []).append(("token", token, row))
    context = written(wave.context)
    assert not held.keys() & context.keys()
    return held | context


def read_later(wave: PrefillWave, at: int, own_pages: set[int]) -> list[list[tuple]]:
    """What the query tile `at` of a wave reads in the further parts of its context."""
    read = []
    for part in wave.rest:
        held = written(part.context)
        assert not held.keys() & own_pages
        skipped = len(wave.key_lens) - len(part.key_lens)
        assert part.first == wave.first_query[skipped]
        assert (part.first_query + part.first).tolist() == wave.first_query[skipped:].tolist()
        assert part.longest == part.key_lens.max()
        if at >= skipped:
            tiles, odd = divmod(int(part.key_lens[at - skipped]), GROUP)
            assert odd == 0
            read += [held[page] for page in part.page_table[at - skipped, :tiles].tolist()]
    return read


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_every_query_tile_reads_what_the_read_rule_says(seed, in_parts):
    step = Step(seed, in_parts)
    waves = step.plan()
    assert in_parts or not any(wave.rest for wave in waves)
    token, tile_of_wave = sum(step.tokens[: step.decodes]), iter(())
    assert (step.slot_rows[:token] == -9).all()
    assert (step.page_rows[:token] == -9).all()
    waves_left = iter(waves)
    filled = {}
    for request in range(step.decodes, len(step.tokens)):
        start, end = step.context[request], step.context[request] + step.tokens[request]
        for tile in range(start // GROUP, (end - 1) // GROUP + 1):
            if (at := next(tile_of_wave, None)) is None:
                wave = next(waves_left)
                assert wave.first == token
                held = contents(step, wave)
                assert set(held) <= set(range(step.page_count))
                filled |= dict(zip(wave.filled.blocks.tolist(), wave.filled.pages.tolist(), strict=True))
                assert wave.longest == wave.key_lens.max()
                tile_of_wave = iter(range(len(wave.key_lens)))
                at = next(tile_of_wave)
            first, last = max(start, tile * GROUP), min(end, (tile + 1) * GROUP)
            assert (wave.first_query[at : at + 2] + wave.first).tolist() == [token, token + last - first]
            own_pages = {int(step.page_rows[at]) // GROUP for at in range(wave.first, wave.last)}
            later = read_later(wave, at, own_pages)
            assert wave.key_lens[at] + len(later) * GROUP == last
            pages = wave.page_table[at, : tile + 1 - len(later)].tolist()
            context_tiles = start // GROUP if step.raw else tile
            first_part = context_tiles - len(later)
            places = [held[page] for page in pages]
            places[first_part:first_part] = later
            assert len(places) == tile + 1
            for key_tile, place in enumerate(places):
                if key_tile < context_tiles:
                    slot = step.slot(request, key_tile) if key_tile == 0 else -1
                    read = ("slot", slot) if slot >= 0 else ("record", int(step.table[request, key_tile]))
                    assert place == [read]
                else:  # raw, with the rows that earlier steps stored
                    begun = [("slot", step.slot(request, key_tile))] if start > key_tile * GROUP else []
                    if begun == [("slot", -1)]:
                        begun = [("record", int(step.table[request, key_tile]))]
                    chunk_start = token - (first - start)
                    positions = range(max(start, key_tile * GROUP), min(end, (key_tile + 1) * GROUP))
                    tokens = [("token", chunk_start + at - start, at % GROUP) for at in positions]
                    assert place == begun + tokens
            block, slot = int(step.table[request, tile]), step.slot(request, tile)
            rows = [slot * GROUP + position % GROUP if slot >= 0 else -1 for position in range(first, last)]
            assert step.slot_rows[token : token + last - first].clamp(min=-1).tolist() == rows
            completes = (tile + 1) * GROUP <= end
            assert filled.get(block) == (pages[-1] if completes else None)
            token += last - first
    assert token == sum(step.tokens)
    assert waves[-1].last == token
    assert next(waves_left, None) is None
    assert all(before.last == after.first for before, after in pairwise(waves))


def test_chunks_share_waves_as_the_pages_allow():
    step = Step(0)
    step.raw, step.decodes, step.tokens, step.context = False, 0, [GROUP] * 3, [GROUP] * 3
    step.table, step.slot_of = torch.arange(36).view(3, 12).int(), torch.full((1,), -1).int()
    step.slot_rows, step.page_rows = (torch.empty(3 * GROUP).int() for _ in range(2))
    for page_count, waves in ((2, 3), (3, 3), (4, 2), (6, 1), (100, 1)):
        step.page_count = page_count
        planned = step.plan()
        assert len(planned) == waves
        for tensor in (planned[-1].page_table, planned[-1].first_query, *planned[-1].context):
            assert tensor.is_contiguous()
            assert tensor.dtype == torch.int32


def test_the_pages_of_long_contexts_are_bounded():
    assert pages_for(1000, 200, 64) == 16 + 4 + 2
    assert pages_for(1000, 200, 64, most=30) == 22
    assert pages_for(1_000_000, 200, 64, most=30) == 30
    assert pages_for(1_000_000, 200, 64, most=5) == 2 * (4 + 2)
