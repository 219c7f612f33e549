"""Blocks behind a marked prefix over the real scheduler: they stay cached while there is room, and leave first."""

from __future__ import annotations

import pytest

from kvarn.vllm.kept_prefixes import evict_first
from tests.support.scheduling import GROUP, World, make_request, make_scheduler

SHARED, OWN, EARLIER = [0] * 2 * GROUP, [1] * 2 * GROUP, [2] * 4 * GROUP
PROMPT = SHARED + OWN


@pytest.fixture(params=[False, True])
def world(request: pytest.FixtureRequest) -> World:
    return World(make_scheduler(24, max_running=2, asynchronous=request.param, retained_sinks=16))


def answer(world: World, prompt: list[int], kept: int | None = None, max_tokens: int = 2) -> list[int]:
    """Run a request to its end; return all of its tokens."""
    request = world.submit([*prompt, 0], max_tokens, kept=kept)
    while world.prompts:
        world.step()
    world.step()
    return list(request.all_token_ids)


def cached(world: World, prompt: list[int]) -> int:
    """Return the number of leading blocks of a prompt that are in the cache."""
    keys = world.scheduler._keys(make_request("probe", [*prompt, 0], 1))
    return next((n for n, key in enumerate(keys) if not world.scheduler._is_cached(key)), len(keys))


def evict(world: World, blocks: int) -> None:
    """Use all free blocks without contents, and `blocks` cached ones."""
    held = sum(block.block_hash is not None for block in world.pool.blocks)
    world.take_blocks(held - blocks)


@pytest.mark.parametrize(
    ("kept", "left"),
    [
        (None, (2, 4)),  # the least recently used leave
        (len(SHARED), (4, 2)),
        (len(SHARED) + 1, (3, 3)),  # blocks are kept whole
        (len(PROMPT), (2, 4)),
    ],
)
def test_what_is_behind_the_mark_leaves_first(world: World, kept: int | None, left: tuple[int, int]) -> None:
    answer(world, EARLIER)
    answer(world, PROMPT, kept)
    assert (cached(world, EARLIER), cached(world, PROMPT)) == (4, 4)
    evict(world, 2)
    assert (cached(world, EARLIER), cached(world, PROMPT)) == left


def test_what_another_request_had_left_in_the_cache_stays(world: World) -> None:
    answer(world, PROMPT)
    answer(world, EARLIER)
    answer(world, PROMPT, kept=len(SHARED))
    evict(world, 2)
    assert (cached(world, EARLIER), cached(world, PROMPT)) == (2, 4)


def test_a_hit_behind_the_mark_is_worth_as_much_as_any(world: World) -> None:
    answer(world, PROMPT, kept=len(SHARED))
    answer(world, EARLIER)
    answer(world, PROMPT)
    evict(world, 2)
    assert (cached(world, EARLIER), cached(world, PROMPT)) == (2, 4)


@pytest.mark.parametrize("shared", [len(PROMPT), len(SHARED) + GROUP])
def test_a_hit_behind_the_mark_of_a_running_request_counts_too(world: World, shared: int) -> None:
    answer(world, EARLIER)
    marked = world.submit([*PROMPT, 0], 3 * GROUP, kept=len(SHARED))
    world.step()
    world.step()
    hitting = world.submit([*PROMPT[:shared], 3], 1)
    while hitting.request_id in world.prompts:
        world.step()
    assert marked.request_id in world.prompts
    while world.prompts:
        world.step()
    world.step()
    tokens = list(marked.all_token_ids)
    evict(world, cached(world, tokens) - shared // GROUP + 1)
    assert (cached(world, EARLIER), cached(world, tokens)) == (3, shared // GROUP)


def test_the_output_is_behind_the_mark(world: World) -> None:
    answer(world, EARLIER)
    tokens = answer(world, SHARED, kept=len(SHARED), max_tokens=2 * GROUP)[: 4 * GROUP]
    assert cached(world, tokens) == 4
    evict(world, 2)
    assert (cached(world, EARLIER), cached(world, tokens)) == (4, 2)


def test_a_block_is_moved_once_and_one_in_use_not_at_all(world: World) -> None:
    answer(world, PROMPT)
    pool = world.pool
    held = [block for block in pool.blocks if block.block_hash is not None]
    free = pool.get_num_free_blocks()
    (used,) = pool.get_new_blocks(1)
    evict_first(pool, [pool.null_block, used, *held, *held])
    assert pool.get_num_free_blocks() == free - 1
    assert [block.block_id for block in pool.get_new_blocks(len(held))] == [b.block_id for b in held[::-1]]
