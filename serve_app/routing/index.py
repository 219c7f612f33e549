"""The prefix index: which replica holds which prefix, exactly as reported by the engines' events."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain as concatenated
from itertools import repeat
from operator import and_, or_

from serve_app.routing.hashing import end_name, store_name, tier_name

TILE_BYTES = 200  # upper bound of the index's memory per tile
SWEEP_TILES = 1024  # tiles cleared of lost replicas each time events are applied
SWEEP_WHEN_FULL = 8  # the same, for each tile that does not fit
GHOSTS = 4096  # evicted tiles remembered per replica, to measure how many are computed again
RECOMPUTE_WEIGHT = 0.002


@dataclass(slots=True)
class _Holder:
    """One replica's part of the index.

    `bit` marks its tiles, and the names of usable ends and of tiles in a tier or a shared store among them;
    `unconfirmed` maps tiles that no event has confirmed to the request that reserved them.
    """

    bit: int
    epoch: int
    sequence: int
    tiles: int = 0
    unconfirmed: dict[int, str] = field(default_factory=dict)
    ghosts: OrderedDict[int, None] = field(default_factory=OrderedDict)
    recompute_rate: float = 0.0


class PrefixIndex:
    """Maps the hash of every cached prefix to the set of replicas that hold it, as a bit mask. Not thread-safe.

    A replica that leaves or sends a new snapshot loses its bit at once. Lost bits are cleared from tiles gradually,
    while events are applied, so that dropping a replica costs the same however much it held.

    Args:
        max_tiles: maximum number of prefixes; tiles that engines store beyond that are not indexed.
    """

    def __init__(self, max_tiles: int) -> None:
        self._max_tiles = max_tiles
        self._tiles: dict[int, int] = {}
        self._unswept: dict[int, int] = {}
        self._holders: dict[str, _Holder] = {}
        self._owner: dict[int, str] = {}
        self._end_bits = 0  # of replicas whose prefixes can be used at known ends only
        self._tier_bits = 0  # of replicas that hold tiles outside their cache, too
        self._dropping_bits = 0  # of replicas that compute the last tile of a cached prefix again
        self._store_bits = (
            0  # of replicas that can load what any of them knows to be in a store that they share
        )
        self._stores: dict[str, int] = {}  # those of each store
        self._lost_bits = 0
        self._sweeping_bits = 0
        self._reservations: dict[str, tuple[str, int, Sequence[int]]] = {}

    def __len__(self) -> int:
        """Number of prefixes, including those of lost replicas until they are swept."""
        return len(self._tiles) + len(self._unswept)

    def tiles(self, replica_id: str) -> int:
        """Number of tiles indexed for a replica."""
        holder = self._holders.get(replica_id)
        return holder.tiles if holder else 0

    def epoch(self, replica_id: str) -> int | None:
        """Epoch of the engine whose tiles are indexed for a replica, None without any."""
        holder = self._holders.get(replica_id)
        return holder.epoch if holder else None

    def recompute_rate(self, replica_id: str) -> float:
        """Share of a replica's evicted tiles that it soon computes again, 0 to 1."""
        holder = self._holders.get(replica_id)
        return holder.recompute_rate if holder else 0.0

    def share_store(self, replica_id: str, other_id: str) -> bool:
        """Whether two replicas can load what the other one stores."""
        holder, other = self._holders.get(replica_id), self._holders.get(other_id)
        if holder is None or other is None:
            return False
        return any(mask & holder.bit and mask & other.bit for mask in self._stores.values())

    def replace(
        self,
        replica_id: str,
        epoch: int,
        sequence: int,
        tiles: Iterable[int],
        has_ends: bool = False,
        has_tier: bool = False,
        drops_last: bool = False,
        store_id: str = "",
    ) -> None:
        """Take a snapshot: `tiles` are all tiles of the replica at state `sequence` of engine life `epoch`.

        With `has_ends`, a prefix can be used up to a tile only if `end_name` of that tile is among them, too. With
        `has_tier`, a tile must be loaded to be used if `tier_name` of it is among them. With `drops_last`, the replica
        computes the last tile of a cached prefix again; ends are then named by the tile that it drops. With
        a `store_id`, a tile whose `store_name` is among them can be loaded by every replica of the same `store_id`.
        """
        self.drop(replica_id)
        bit = self._free_bit()
        self._end_bits |= bit if has_ends else 0
        self._tier_bits |= bit if has_tier else 0
        self._dropping_bits |= bit if drops_last else 0
        if store_id:
            self._store_bits |= bit
            self._stores[store_id] = self._stores.get(store_id, 0) | bit
        holder = self._holders[replica_id] = _Holder(bit, epoch, sequence)
        self._owner[bit] = replica_id
        for tile in tiles:
            self._set(holder, tile)

    def apply(
        self, replica_id: str, epoch: int, sequence: int, stored: Iterable[int], removed: Iterable[int]
    ) -> bool:
        """Take a delta; return False if it does not follow the last one, so that a snapshot is needed."""
        holder = self._holders.get(replica_id)
        if holder is None or (epoch, sequence) != (holder.epoch, holder.sequence + 1):
            return False
        holder.sequence = sequence
        for tile in removed:
            holder.unconfirmed.pop(tile, None)
            self._clear(holder, tile)
            if not self._is_of_tier(holder, tile):
                _remember(holder, tile)
        for tile in stored:
            holder.unconfirmed.pop(tile, None)
            self._set(holder, tile)
            if not self._is_of_tier(holder, tile):
                _recall(holder, tile)
        self._sweep(SWEEP_TILES)
        return True

    def drop(self, replica_id: str) -> None:
        """Forget all tiles of a replica."""
        holder = self._holders.pop(replica_id, None)
        if holder is not None:
            del self._owner[holder.bit]
            self._end_bits &= ~holder.bit
            self._tier_bits &= ~holder.bit
            self._dropping_bits &= ~holder.bit
            self._store_bits &= ~holder.bit
            self._stores = {name: bits for name, mask in self._stores.items() if (bits := mask & ~holder.bit)}
            self._lost_bits |= holder.bit
            self._start_sweep()

    def match(self, chain: Sequence[int], most: int | None = None) -> dict[str, int]:
        """Count the leading tiles of `chain` that each replica can use; replicas that can use none are left out.

        Args:
            chain: the names of a prompt's tiles.
            most: tiles that are looked up at most where prefixes have ends or lose their last tile: engines compute a
                prompt's last token.
        """
        masks: Iterator[int] = map(self._tiles.get, chain, repeat(0))
        if self._unswept:
            masks = map(or_, masks, map(self._unswept.get, chain, repeat(0)))
        if self._store_bits:
            masks = map(or_, masks, map(self._storing, chain))
        owner = self._owner
        depths: dict[str, int] = {}
        held = ~self._lost_bits
        for depth, mask in enumerate(concatenated(masks, (0,))):
            still = held & mask
            if still != held:
                lost, held = held ^ still, still
                while lost and depth:
                    bit = lost & -lost
                    lost ^= bit
                    depths[owner[bit]] = depth
                if not held:
                    break
        most = len(chain) if most is None else most
        if self._end_bits:
            self._shorten(depths, chain, most)
        if self._dropping_bits:
            self._drop_last(depths, most)
        return depths

    def offloaded(self, chain: Sequence[int], depths: Mapping[str, int]) -> dict[str, int]:
        """Count those of the `depths` leading tiles of `chain` that each replica has to load; those with none are left
        out."""
        counts: dict[str, int] = {}
        if not self._tier_bits | self._store_bits:
            return counts
        for place, tile in enumerate(chain[: max(depths.values(), default=0)]):
            held = self._mask(tier_name(tile)) & self._tier_bits | self._storing(tile) & ~self._mask(tile)
            while held:
                bit = held & -held
                held ^= bit
                replica = self._owner[bit]
                if place < depths.get(replica, 0):
                    counts[replica] = counts.get(replica, 0) + 1
        return counts

    def _shorten(self, depths: dict[str, int], chain: Sequence[int], most: int) -> None:
        """Shorten what replicas hold of `chain` to the last end that they can use."""
        bits = {replica: bit for replica in depths if (bit := self._holders[replica].bit) & self._end_bits}
        starting: dict[int, int] = {}
        for replica, bit in bits.items():
            depth = min(depths.pop(replica), most)
            starting[depth] = starting.get(depth, 0) | bit
        sought = 0
        for depth in range(max(starting, default=0), 0, -1):
            sought |= starting.get(depth, 0)
            found = sought & self._mask(end_name(chain[depth - 1])) if sought else 0
            sought ^= found
            while found:
                bit = found & -found
                found ^= bit
                depths[self._owner[bit]] = depth

    def _drop_last(self, depths: dict[str, int], most: int) -> None:
        """Leave out the last tile of at most `most` where replicas compute it again."""
        dropping = [replica for replica in depths if self._holders[replica].bit & self._dropping_bits]
        for replica in dropping:
            kept = min(depths.pop(replica), most) - 1
            if kept > 0:
                depths[replica] = kept

    def reserve(
        self, request_id: str, replica_id: str, chain: Sequence[int], most: int | None = None
    ) -> None:
        """Count `chain` as held by `replica_id` until events confirm it or `settle` is called.

        Of ends, count that of the longest prefix that the prompt itself could use, of `most` tiles.
        """
        holder = self._holders.get(replica_id)
        if holder is None:
            return
        last = len(chain) if most is None else min(most, len(chain))
        if holder.bit & self._end_bits and last > 0:
            chain = [*chain, end_name(chain[last - 1])]
        reserved = self._set_all(holder, chain)
        holder.unconfirmed.update(dict.fromkeys(reserved, request_id))
        self._reservations[request_id] = (replica_id, holder.bit, reserved)

    def settle(self, request_id: str) -> None:
        """Remove the tiles a request reserved that no event has confirmed."""
        replica_id, bit, reserved = self._reservations.pop(request_id, ("", 0, []))
        holder = self._holders.get(replica_id)
        if holder is None or holder.bit != bit:
            return
        for tile in reserved:
            if holder.unconfirmed.get(tile) == request_id:
                del holder.unconfirmed[tile]
                self._clear(holder, tile)

    def _storing(self, tile: int) -> int:
        """The replicas that can load `tile` from the store that they share."""
        known = self._mask(store_name(tile)) & self._store_bits
        if not known or len(self._stores) == 1:
            return self._store_bits if known else 0
        return sum(mask for mask in self._stores.values() if mask & known)

    def _is_of_tier(self, holder: _Holder, name: int) -> bool:
        """Whether `name` is of a tile that a KV connector holds, or says so of one."""
        others = (
            self._mask(tier_name(name)) & self._tier_bits | self._mask(store_name(name)) & self._store_bits
        )
        return bool(others & holder.bit)

    def _mask(self, tile: int) -> int:
        return self._tiles.get(tile, 0) | self._unswept.get(tile, 0)

    def _set(self, holder: _Holder, tile: int) -> bool:
        """Mark that the replica holds `tile`; return whether that is new."""
        mask = self._mask(tile)
        if mask & holder.bit or (not mask and not self._has_room()):
            return False
        self._tiles[tile] = self._tiles.get(tile, 0) | holder.bit
        holder.tiles += 1
        return True

    def _set_all(self, holder: _Holder, chain: Sequence[int]) -> Sequence[int]:
        """Call `_set` for each tile of `chain`; return those that are new.

        A cold prompt adds hundreds of tiles in the middle of a decision. The usual case, in which all fit and none is
        held, therefore runs without a Python loop.
        """
        bit, tiles = holder.bit, self._tiles
        masks = list(map(tiles.get, chain, repeat(0)))
        if self._unswept or len(tiles) + len(chain) > self._max_tiles or any(map(and_, masks, repeat(bit))):
            return [tile for tile in chain if self._set(holder, tile)]
        tiles.update(zip(chain, map(or_, masks, repeat(bit)), strict=True))
        holder.tiles += len(chain)
        return chain

    def _has_room(self) -> bool:
        if len(self) >= self._max_tiles:
            self._sweep(SWEEP_WHEN_FULL)
        return len(self) < self._max_tiles

    def _clear(self, holder: _Holder, tile: int) -> None:
        if not self._mask(tile) & holder.bit:
            return
        holder.tiles -= 1
        for tiles in (self._tiles, self._unswept):
            mask = tiles.get(tile, 0)
            if mask & holder.bit:
                _keep(tiles, tile, mask & ~holder.bit)

    def _free_bit(self) -> int:
        used = self._lost_bits
        for bit in self._owner:
            used |= bit
        return ~used & (used + 1)

    def _start_sweep(self) -> None:
        if not self._unswept:
            self._tiles, self._unswept = self._unswept, self._tiles
            self._sweeping_bits = self._lost_bits
            self._sweep(0)

    def _sweep(self, count: int) -> None:
        """Move up to `count` tiles over without their lost bits; once all are moved, the bits are free."""
        tiles, unswept = self._tiles, self._unswept
        for _ in range(min(count, len(unswept))):
            tile, mask = unswept.popitem()
            mask &= ~self._sweeping_bits
            if mask:
                tiles[tile] = tiles.get(tile, 0) | mask
        if self._sweeping_bits and not unswept:
            self._unswept = {}  # a dict keeps its size while items are popped
            self._lost_bits &= ~self._sweeping_bits
            self._sweeping_bits = 0
            if self._lost_bits:
                self._start_sweep()


def _keep(tiles: dict[int, int], tile: int, mask: int) -> None:
    if mask:
        tiles[tile] = mask
    else:
        del tiles[tile]


def _remember(holder: _Holder, tile: int) -> None:
    """Remember an evicted tile; one forgotten before it is stored again was cold."""
    holder.ghosts[tile] = None
    if len(holder.ghosts) > GHOSTS:
        holder.ghosts.popitem(last=False)
        holder.recompute_rate -= RECOMPUTE_WEIGHT * holder.recompute_rate


def _recall(holder: _Holder, tile: int) -> None:
    if holder.ghosts.pop(tile, tile) is None:
        holder.recompute_rate += RECOMPUTE_WEIGHT * (1 - holder.recompute_rate)
