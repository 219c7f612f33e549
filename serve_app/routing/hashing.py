"""Hashes of prefixes: xxh3 chains over tiles of token ids, the same in engines and gateways."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from struct import unpack_from

from xxhash import xxh3_64_intdigest

TOKEN_BYTES = 4


@dataclass(frozen=True, slots=True)
class Namespace:
    """Properties two caches must share for equal tokens to mean equal cache contents."""

    model: str
    cache_dtype: str
    tile_tokens: int
    adapter: str = ""
    salt: str = ""

    def root(self) -> int:
        """Return the hash that chains of this namespace start from."""
        parts = (self.model, self.cache_dtype, str(self.tile_tokens), self.adapter, self.salt)
        return xxh3_64_intdigest("".join(f"{len(part)}:{part}" for part in parts).encode())


def token_array(token_ids: Iterable[int]) -> array[int]:
    """Convert token ids to the 32-bit integers that chains are computed over."""
    return array("I", token_ids)


def extend_chain(parent: int, tile: array[int]) -> int:
    """Hash the prefix that ends with `tile` and follows the prefix hashed to `parent`."""
    return xxh3_64_intdigest(memoryview(tile), parent)


def end_name(tile: int) -> int:
    """Return the name of the fact that the prefix hashed to `tile` may end there: all layers can use it."""
    return tile ^ 1


def tier_name(tile: int) -> int:
    """Return the name of the fact that only a KV connector holds the tile of the prefix hashed to `tile`."""
    return tile ^ 2


def store_name(tile: int) -> int:
    """Return the name of the fact that a shared store holds the tile of the prefix hashed to `tile`."""
    return tile ^ 4


def chain(token_ids: array[int], tile_tokens: int, root: int) -> list[int]:
    """Hash every prefix of `token_ids` that ends with a full tile, shortest first."""
    size = tile_tokens * TOKEN_BYTES
    count = len(token_ids) // tile_tokens
    tiles = unpack_from(f"{size}s" * count, token_ids)  # slicing tile by tile takes longer than hashing
    link = root
    return [link := xxh3_64_intdigest(tile, link) for tile in tiles]


class Prompt:
    """The token ids of a prompt and its chains, each computed once.

    Args:
        token_ids: the prompt.
        salt: separates its prefixes from those of prompts with another salt.
        adapter: LoRA adapter whose cache contents the prompt can use; "" for the model's own.
    """

    __slots__ = ("_chains", "adapter", "salt", "token_ids")

    def __init__(self, token_ids: array[int], salt: str = "", adapter: str = "") -> None:
        self.token_ids = token_ids
        self.salt = salt
        self.adapter = adapter
        self._chains: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return len(self.token_ids)

    def chain(self, tile_tokens: int, root: int) -> list[int]:
        """Return `chain` of the whole prompt."""
        known = self._chains.get(root)
        if known is None:
            known = self._chains[root] = chain(self.token_ids, tile_tokens, root)
        return known
