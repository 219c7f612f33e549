"""Reservations of requests that have not ended: blocks not used yet, and prompt tokens not computed yet."""

from __future__ import annotations

from dataclasses import dataclass, field

from serve_app.routing.types import RequestNeed


@dataclass(slots=True)
class _Reservation:
    """One request: `blocks` and `pending_tokens` are still reserved, `length` is its tokens so far."""

    owner: str
    need: RequestNeed
    tile_tokens: int
    blocks: int
    pending_tokens: int
    length: int
    starting: bool = True

    def blocks_ahead(self) -> int:
        """Blocks needed beyond those its tokens fill; at least one while it may outgrow its likely length."""
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
    """Reservations by request, summed by owner: a gateway sums by replica, an engine by gateway.

    Blocks are counted until the engine's own state shows them as used: `grow` counts a request's output, `settle`
    subtracts it from the sums once the next state is there. Releasing a request twice is harmless.
    """

    def __init__(self) -> None:
        self._requests: dict[str, _Reservation] = {}
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
        """Reserve `blocks` and the prefill of `pending_tokens` for a request, replacing its earlier reservation."""
        self.release(request_id)
        reservation = _Reservation(owner, need, tile_tokens, blocks, pending_tokens, need.prompt_tokens)
        self._requests[request_id] = reservation
        sums = self._sums.setdefault(owner, _Sums())
        sums.requests += 1
        sums.blocks += blocks
        sums.pending_tokens += pending_tokens
        sums.starting += 1

    def expect(self, request_id: str, pending_tokens: int) -> None:
        """Reserve the prefill of `pending_tokens` instead of as many as before."""
        reservation = self._requests.get(request_id)
        if reservation is not None:
            self._sums[reservation.owner].pending_tokens += pending_tokens - reservation.pending_tokens
            reservation.pending_tokens = pending_tokens

    def grow(self, request_id: str, tokens: int) -> None:
        """Count `tokens` more of a request's output; with the first of them its prefill is done."""
        reservation = self._requests.get(request_id)
        if reservation is None:
            return
        sums = self._sums[reservation.owner]
        sums.pending_tokens -= reservation.pending_tokens
        reservation.pending_tokens = 0
        filled = reservation.length // reservation.tile_tokens
        reservation.length += tokens
        if reservation.starting or reservation.length // reservation.tile_tokens != filled:
            sums.grown.add(request_id)

    def settle(self, owner: str) -> None:
        """Subtract all growth counted so far, as the engine's state now shows it."""
        sums = self._sums.get(owner)
        if sums is None:
            return
        for request_id in sums.grown:
            reservation = self._requests[request_id]
            ahead = reservation.blocks_ahead()
            sums.blocks += ahead - reservation.blocks
            sums.starting -= reservation.starting
            reservation.blocks, reservation.starting = ahead, False
        sums.grown.clear()

    def release(self, request_id: str) -> None:
        """Release the reservation of a request, if it has one."""
        reservation = self._requests.pop(request_id, None)
        if reservation is None:
            return
        sums = self._sums[reservation.owner]
        sums.requests -= 1
        sums.blocks -= reservation.blocks
        sums.pending_tokens -= reservation.pending_tokens
        sums.starting -= reservation.starting
        sums.grown.discard(request_id)
        if not sums.requests:
            del self._sums[reservation.owner]

    def blocks(self, owner: str) -> int:
        """Blocks reserved and not used yet."""
        return self._of(owner).blocks

    def pending_tokens(self, owner: str) -> int:
        """Prompt tokens reserved and not computed yet."""
        return self._of(owner).pending_tokens

    def starting(self, owner: str) -> int:
        """Number of requests whose slots the engine's state does not show yet."""
        return self._of(owner).starting

    @property
    def total_blocks(self) -> int:
        """Blocks reserved by all owners and not used yet."""
        return sum(sums.blocks for sums in self._sums.values())

    def owners(self) -> list[str]:
        """Owners with requests."""
        return list(self._sums)

    def by_owner(self) -> tuple[dict[str, int], dict[str, int]]:
        """Return the blocks and the pending prompt tokens of every owner that has any."""
        blocks = {owner: sums.blocks for owner, sums in self._sums.items() if sums.blocks}
        tokens = {owner: sums.pending_tokens for owner, sums in self._sums.items() if sums.pending_tokens}
        return blocks, tokens

    def _of(self, owner: str) -> _Sums:
        return self._sums.get(owner) or _NOTHING


_NOTHING = _Sums()
