"""FlashAttention as vLLM ships it."""

from vllm.vllm_flash_attn import (
    fa_version_unsupported_reason,
    flash_attn_varlen_func,
    is_fa_version_supported,
)

__all__ = ["fa_version_unsupported_reason", "flash_attn_varlen_func", "is_fa_version_supported"]
