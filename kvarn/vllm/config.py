"""The cache's own settings, given to vLLM as `additional_config={"kvarn": {...}}`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True)
class KVarNConfig:
    """Settings of the quantized cache.

    Attributes:
        retained_sinks: first tiles of cached prefixes kept raw while no running request uses them, in slots of
            the side pool. None: as many as `max_num_seqs`.
        raw_chunks: a prompt's chunk reads all of its own tiles raw, and not only each token's own: a little more
            accurate, but what a prompt's tokens read then depends on where its chunks and its cached prefix end.
    """

    retained_sinks: int | None = None
    raw_chunks: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.raw_chunks, bool):
            raise ValueError(f"kvarn.raw_chunks is {self.raw_chunks!r}; give true or false.")
        if self.retained_sinks is not None and (
            not isinstance(self.retained_sinks, int) or self.retained_sinks < 0
        ):
            raise ValueError(f"kvarn.retained_sinks is {self.retained_sinks!r}; give a number of slots >= 0.")

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> KVarNConfig:
        """Read the settings out of `vllm_config.additional_config`; ValueError names an unknown one."""
        given: dict[str, Any] = dict(vllm_config.additional_config).get("kvarn", {})
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(given) - known):
            raise ValueError(
                f"additional_config['kvarn'] has no setting {', '.join(unknown)}; use {', '.join(sorted(known))}."
            )
        return cls(**given)


def side_pool_slots(vllm_config: VllmConfig) -> int:
    """Slots of the side pool: a tail and a sink for every running request, and the retained sinks."""
    max_num_seqs = vllm_config.scheduler_config.max_num_seqs
    retained = KVarNConfig.of(vllm_config).retained_sinks
    return 2 * max_num_seqs + (max_num_seqs if retained is None else retained)
