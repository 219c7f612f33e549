"""What was promised to requests that have not ended: blocks they do not use yet, prompt tokens not computed yet."""

from __future__ import annotations

from dataclasses import dataclass, field

from serve_app.routing.types import RequestNeed


@dataclass(slots=True)
class _Held:
    """One request: `blocks` and `pending_tokens` are what it still counts for, `length` its tokens so far."""

    owner: str
    need: RequestNeed
    tile_tokens: int
    blocks: int
    pending_tokens: int
    length: int
    starting: bool = True

    def blocks_ahead(self) -> int:
        """Blocks it will take beyond those its tokens fill; one ahead while it may outgrow its likely length."""
        used = -(-self.length // self.tile_tokens)
        return max(self.need.blocks(self.tile_tokens) - used, int(self.length < self.need.total_tokens))


@dataclass(slots=True)
class _Sums:
    requests: int = 0
    blocks: int = 0
    pending_tokens: int = 0
    starting: int = 0
    grown: set[str] = field(default_factory=set)


class Reservations:
    """Promises by request, summed by owner: a gateway counts by replica, an engine by gateway.

    Blocks are counted until the engine's own state shows them as used: `grow` notes a request's output, `settle` takes
    it off the sums once the next state is there. Ending a request twice is harmless.
    """

    def __init__(self) -> None:
        self._requests: dict[str, _Held] = {}
        self._sums: dict[str, _Sums] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def hold(
        self,
        request_id: str,
        owner: str,
        need: RequestNeed,
        tile_tokens: int,
        blocks: int,
        pending_tokens: int,
    ) -> None:
        """Promise `blocks` and the computing of `pending_tokens` to a request, replacing what it held before."""
        self.release(request_id)
        held = _Held(owner, need, tile_tokens, blocks, pending_tokens, need.prompt_tokens)
        self._requests[request_id] = held
        sums = self._sums.setdefault(owner, _Sums())
        sums.requests += 1
        sums.blocks += blocks
        sums.pending_tokens += pending_tokens
        sums.starting += 1

    def grow(self, request_id: str, tokens: int) -> None:
        """Note `tokens` more of a request's output; by the first of them its prompt is computed."""
        held = self._requests.get(request_id)
        if held is None:
            return
        sums = self._sums[held.owner]
        sums.pending_tokens -= held.pending_tokens
        held.pending_tokens = 0
        filled = held.length // held.tile_tokens
        held.length += tokens
        if held.starting or held.length // held.tile_tokens != filled:
            sums.grown.add(request_id)

    def settle(self, owner: str) -> None:
        """Take in that the engine's state shows all growth noted so far."""
        sums = self._sums.get(owner)
        if sums is None:
            return
        for request_id in sums.grown:
            held = self._requests[request_id]
            ahead = held.blocks_ahead()
            sums.blocks += ahead - held.blocks
            sums.starting -= held.starting
            held.blocks, held.starting = ahead, False
        sums.grown.clear()

    def release(self, request_id: str) -> None:
        """Give back what a request holds, if anything."""
        held = self._requests.pop(request_id, None)
        if held is None:
            return
        sums = self._sums[held.owner]
        sums.requests -= 1
        sums.blocks -= held.blocks
        sums.pending_tokens -= held.pending_tokens
        sums.starting -= held.starting
        sums.grown.discard(request_id)
        if not sums.requests:
            del self._sums[held.owner]

    def blocks(self, owner: str) -> int:
        """Blocks promised and not used yet."""
        return self._of(owner).blocks

    def pending_tokens(self, owner: str) -> int:
        """Prompt tokens promised and not computed yet."""
        return self._of(owner).pending_tokens

    def starting(self, owner: str) -> int:
        """Requests whose slots the engine's state does not show yet."""
        return self._of(owner).starting

    @property
    def total_blocks(self) -> int:
        """Blocks promised to all and not used yet."""
        return sum(sums.blocks for sums in self._sums.values())

    def owners(self) -> list[str]:
        """Who has requests."""
        return list(self._sums)

    def by_owner(self) -> tuple[dict[str, int], dict[str, int]]:
        """Blocks and pending prompt tokens of every owner that has any."""
        blocks = {owner: sums.blocks for owner, sums in self._sums.items() if sums.blocks}
        tokens = {owner: sums.pending_tokens for owner, sums in self._sums.items() if sums.pending_tokens}
        return blocks, tokens

    def _of(self, owner: str) -> _Sums:
        return self._sums.get(owner) or _NOTHING


_NOTHING = _Sums()
