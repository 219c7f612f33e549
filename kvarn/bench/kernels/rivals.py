"""vLLM's own quantized caches with vLLM's kernels, as rivals of ours beside FlashAttention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from kvarn.bench.kernels.contenders import Launch
from kvarn.bench.kernels.flash import PAGE_TOKENS
from kvarn.reference.hadamard import hadamard_matrix

INT4_SEGMENTS = 16  # splits per sequence in vLLM if requests times KV heads are few
INT4_FEW_PROGRAMS = 128
TURBOQUANT_PARTS = 32  # vLLM's `tq_max_kv_splits_for_cuda_graph`
FLOAT16_BYTES, FLOAT32_BYTES = 2, 4


class RivalCache(Protocol):
    """A paged cache in another format."""

    def store(self, key: Tensor, value: Tensor) -> Launch:
        """Return the launch that stores [N, H, D] float16 keys and values of the first N tokens, page by page."""
        ...

    def attend(self, query: Tensor, table: Tensor, lengths: Sequence[int]) -> Launch:
        """Return the launch of causal attention of the last queries of each sequence.

        Args:
            query: [R * Q, Hq, D] float16, Q queries for each of R sequences.
            table: [R, W] int32, pages of 16 tokens.
            lengths: tokens of each sequence.

        Raises:
            ValueError: Q is more than one, and the kernel supports only one query per sequence.
        """
        ...


class Int4Cache:
    """`kv_cache_dtype="int4_per_token_head"`: two codes per byte, and one float32 scale per token and head.

    Args:
        pages: number of pages, each of 16 tokens.
        heads: number of KV heads.
        head_dim: head dimension.
        device: a CUDA device.

    Raises:
        ImportError: vLLM is not installed.
    """

    def __init__(self, pages: int, heads: int, head_dim: int, device: torch.device) -> None:
        from kvarn.vllm.access.rival_kernels import reshape_and_cache_int4, unified_attention_int4

        self._store, self._attend = reshape_and_cache_int4, unified_attention_int4
        self._heads, self._head_dim, self._device = heads, head_dim, device
        # Half a row is a key with its scale; the value follows.
        codes, half = head_dim // 2, int4_token_bytes(head_dim) // 2
        cache = torch.zeros(pages, PAGE_TOKENS, heads, 2 * half, dtype=torch.uint8, device=device)
        scales = cache.view(torch.float32)
        self._codes = cache[..., :codes], cache[..., half : half + codes]
        self._scales = {
            "k_scale_cache": scales[..., codes // FLOAT32_BYTES],
            "v_scale_cache": scales[..., (half + codes) // FLOAT32_BYTES],
        }

    def store(self, key: Tensor, value: Tensor) -> Launch:
        """See `RivalCache`."""
        places = torch.arange(len(key), device=self._device)
        return partial(self._store, key, value, *self._codes, places, **self._scales)

    def attend(self, query: Tensor, table: Tensor, lengths: Sequence[int]) -> Launch:
        """See `RivalCache`."""
        device = self._device
        queries = len(query) // len(table)
        few = INT4_FEW_PROGRAMS // self._heads
        segments = torch.empty(few, query.shape[1], INT4_SEGMENTS, self._head_dim, device=device)
        return partial(
            self._attend,
            query,
            *self._codes,
            torch.empty_like(query),
            cu_seqlens_q=torch.arange(0, len(query) + 1, queries, dtype=torch.int32, device=device),
            max_seqlen_q=queries,
            seqused_k=torch.tensor(lengths, dtype=torch.int32, device=device),
            max_seqlen_k=max(lengths),
            softmax_scale=self._head_dim**-0.5,
            window_size=(-1, -1),
            block_table=table,
            softcap=0.0,
            sinks=None,
            alibi_slopes=None,
            use_alibi_sqrt=False,
            qq_bias=None,
            output_scale=None,
            mm_prefix_range=None,
            seq_threshold_3D=few,
            num_par_softmax_segments=INT4_SEGMENTS,
            softmax_segm_output=segments,
            softmax_segm_max=torch.empty_like(segments[..., 0]),
            softmax_segm_expsum=torch.empty_like(segments[..., 0]),
            **self._scales,
        )


class TurboQuantCache:
    """A TurboQuant `kv_cache_dtype`: rotated keys on the Lloyd-Max levels of a Gaussian, values rounded per token.

    Args:
        dtype: vLLM's name of the dtype.
        pages, heads, head_dim, device: see `Int4Cache`.

    Raises:
        ImportError: vLLM is not installed.
    """

    def __init__(self, dtype: str, pages: int, heads: int, head_dim: int, device: torch.device) -> None:
        from kvarn.vllm.access.rival_kernels import (
            triton_turboquant_decode_attention,
            triton_turboquant_store,
        )
        from kvarn.vllm.access.turboquant import TurboQuantConfig, get_centroids

        self._store, self._attend = triton_turboquant_store, triton_turboquant_decode_attention
        self._head_dim, self._device = head_dim, device
        config = TurboQuantConfig.from_cache_dtype(dtype, head_dim)
        self._norm_correction = config.norm_correction
        self._format: dict[str, Any] = {
            "mse_bits": config.key_mse_bits,
            "key_packed_size": config.key_packed_size,
            "value_quant_bits": config.effective_value_quant_bits,
            "key_fp8": config.key_fp8,
        }
        self._rotation = hadamard_matrix(head_dim).to(device)
        self._levels = get_centroids(head_dim, config.centroid_bits).to(device, torch.float32).sort().values
        shape = (pages, PAGE_TOKENS, heads, config.slot_size_aligned)
        self._cache = torch.zeros(shape, dtype=torch.uint8, device=device)

    def store(self, key: Tensor, value: Tensor) -> Launch:
        """See `RivalCache`."""
        places = torch.arange(len(key), dtype=torch.int32, device=self._device)
        between = (self._levels[:-1] + self._levels[1:]) / 2
        return partial(self._store, key, value, self._cache, places, self._rotation, between, **self._format)

    def attend(self, query: Tensor, table: Tensor, lengths: Sequence[int]) -> Launch:
        """See `RivalCache`."""
        requests = len(table)
        if len(query) != requests:
            raise ValueError("its decode kernel takes one token per sequence")
        parts = torch.empty(
            requests, query.shape[1], TURBOQUANT_PARTS, self._head_dim + 1, device=self._device
        )
        return partial(
            self._attend,
            query,
            self._cache,
            table,
            torch.tensor(lengths, dtype=torch.int32, device=self._device),
            self._rotation,
            self._levels,
            self._head_dim**-0.5,
            norm_correction=self._norm_correction,
            PiT=self._rotation,
            mid_o_buf=parts,
            output_buf=torch.empty_like(query),
            lse_buf=torch.empty_like(parts[:, :, 0, 0]),
            max_num_kv_splits=TURBOQUANT_PARTS,
            **self._format,
        )


def int4_token_bytes(head_dim: int) -> int:
    """Bytes of one token's key and value per head: 4-bit codes, and one float32 scale for each."""
    return 2 * (head_dim // 2 + FLOAT32_BYTES)


def turboquant_token_bytes(bits: int, head_dim: int) -> int:
    """Bytes of one token's key and value per head: codes of `bits` bits, and in float16 the key's norm and the value's
    scale and zero point."""
    return 2 * (bits * head_dim // 8) + 3 * FLOAT16_BYTES


@dataclass(frozen=True)
class Rival:
    """One rival format.

    Attributes:
        name: its name in tables.
        token_bytes: head_dim -> bytes of one token's key and value per head.
        make: (pages of 16 tokens, KV heads, head_dim, device) -> an empty cache.
    """

    name: str
    token_bytes: Callable[[int], int]
    make: Callable[[int, int, int, torch.device], RivalCache]


RIVALS = (
    Rival("vLLM int4_per_token_head", int4_token_bytes, Int4Cache),
    *(
        Rival(f"vLLM {name}", partial(turboquant_token_bytes, bits), partial(TurboQuantCache, name))
        for name, bits in {"turboquant_4bit_nc": 4, "turboquant_3bit_nc": 3}.items()
    ),
)
