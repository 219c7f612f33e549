"""Rivals in the benchmarks attend to what they stored: otherwise their timings would be meaningless."""

from __future__ import annotations

import pytest
import torch

from kvarn.bench.kernels.flash import paged, whole_pages
from kvarn.bench.kernels.rivals import RIVALS, Rival
from tests.kvarn.bench.test_kernels_comparison import attention, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("rival", RIVALS, ids=lambda rival: rival.name)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_rival_attends_to_what_it_stored(rival: Rival, head_dim: int) -> None:
    device, generator = torch.device("cuda"), torch.Generator("cuda").manual_seed(0)
    lengths, heads, query_heads = [250, 1000, 17], 2, 8
    spans = [whole_pages(length) for length in lengths]
    key_value = torch.randn(2, sum(spans), heads, head_dim, generator=generator, device=device).half()
    query = torch.randn(len(lengths), query_heads, head_dim, generator=generator, device=device).half()
    (key, value), table = paged(key_value, lengths, generator)
    cache = rival.make(len(key), heads, head_dim, device)
    cache.store(key.flatten(0, 1), value.flatten(0, 1))()
    launch = cache.attend(query, table, lengths)
    returned = launch()
    out = launch.args[3] if returned is None else returned
    for request, sequence in enumerate(key_value.split(spans, dim=1)):
        key, value = sequence[:, : lengths[request]]
        expected = attention(query[request : request + 1], key, value)
        assert relative_error(out[request], expected[0]) < 0.35  # values of 3 bits
    assert len(cache_bytes(cache)) == rival.token_bytes(head_dim)


def cache_bytes(cache: object) -> torch.Tensor:
    """Return the cache bytes of one token of one head."""
    stored = getattr(cache, "_cache", None)
    if stored is None:
        stored = cache._codes[0]._base  # type: ignore[attr-defined]
    return stored[0, 0, 0]
