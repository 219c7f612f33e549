"""A worker's half of the shared store: copies between the cache, or the side pool, and files, on threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Semaphore
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.logger import init_logger

from kvarn.vllm.slot_map import NO_SLOT
from kvarn.vllm.store.block_files import BlockFiles
from kvarn.vllm.store.daemon_threads import DaemonThreads
from kvarn.vllm.store.store_scheduler import BlockCopy, Transfers

if TYPE_CHECKING:
    from kvarn.vllm.slot_map import SlotMap

logger = init_logger(__name__)

READERS = 4
WRITERS = 2
MAX_UNWRITTEN_BYTES = 2**30  # in host memory; blocks beyond that are not saved
MAX_UNCOPIED_BYTES = 2**30  # read into host memory; further reads wait
MAX_STEP_BYTES = 2**27  # copied to the device in one step, which delays it and takes as much of its memory
CLOSE_S = 10.0  # for what is left to write when the engine ends
UNSAVED = "The shared store did not take blocks: %s. They are computed again where they are needed."
UNLOADED = "The shared store did not give blocks: %s. They are computed."


@dataclass
class _Block:
    """A block that is being loaded into host memory.

    Attributes:
        copy: the block.
        records: [layers, bytes of a record] uint8.
        raw: [layers, bytes of a raw tile] uint8; no bytes unless it begins a prefix.
    """

    copy: BlockCopy
    records: Tensor
    raw: Tensor

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.records.nbytes + self.raw.nbytes


@dataclass
class _Load:
    """The blocks that a request waits for, and the time at which it stops waiting."""

    blocks: dict[Future[_Block], int]
    until_s: float


class StoreWorker:
    """Copies the blocks of one rank.

    The device is read and written by the engine's own thread, between steps and in their order; files by others. A
    request that stops waiting therefore leaves nothing that could still write its blocks.

    Args:
        caches: records of each layer by its name, [blocks, ...] uint8.
        vllm_config: the engine's configuration.
        files_of: returns the store of a kind.
        load_timeout_s: time after which a request stops waiting for its blocks.
    """

    def __init__(
        self,
        caches: Mapping[str, Tensor],
        vllm_config: Any,
        files_of: Callable[[str], BlockFiles],
        load_timeout_s: float,
    ) -> None:
        names = sorted(caches)
        layers = [vllm_config.compilation_config.static_forward_context[name].impl for name in names]
        self._caches = [caches[name] for name in names]
        self._record_bytes = self._caches[0][0].numel()
        self._pools: list[Tensor] = [layer.pool for layer in layers]
        self._slot_map: SlotMap = layers[0].slot_map
        self._rank = vllm_config.parallel_config.rank
        self._files_of = files_of
        self._load_timeout_s = load_timeout_s
        self._files: BlockFiles | None = None
        self._reading = DaemonThreads(READERS, "kvarn-store-read")
        self._writing = DaemonThreads(WRITERS, "kvarn-store-write")
        block_bytes = len(layers) * (self._record_bytes + self._pools[0][0].nbytes)
        self._room = Semaphore(max(READERS, MAX_UNCOPIED_BYTES // block_bytes))  # for blocks that are read
        self._pins = self._caches[0].device.type == "cuda"
        self._loads: dict[str, _Load] = {}
        self._stuck: set[Future[_Block]] = set()  # reads that no request waits for any more
        self._failed: set[int] = set()
        self._unwritten: dict[Future[None], int] = {}

    def start_loads(self, transfers: Transfers) -> None:
        """Begin to read the blocks that requests wait for; at once without any while earlier reads are stuck."""
        files = self._store(transfers.kind)
        self._stuck = {read for read in self._stuck if not read.done()}
        for request_id, copies in transfers.loads.items():
            if self._stuck:
                self._failed.update(copy.block for copy in copies)
                copies = []
            blocks = {self._reading.submit(self._read, files, copy): copy.block for copy in copies}
            self._loads[request_id] = _Load(blocks, time.monotonic() + self._load_timeout_s)

    def finish_loads(self) -> set[str]:
        """Copy what was read to the device, `MAX_STEP_BYTES` at a time; return the requests that wait no longer."""
        finished = set()
        loaded: list[tuple[_Block, int]] = []
        room_bytes = MAX_STEP_BYTES
        for request_id, load in self._loads.items():
            for read in [read for read in load.blocks if read.done()]:
                if room_bytes <= 0:
                    break
                number = load.blocks.pop(read)
                if block := self._result(read, number):
                    loaded.append((block, number))
                    room_bytes -= block.nbytes
            if load.blocks and time.monotonic() > load.until_s:
                self._give_up(load)
            if not load.blocks:
                finished.add(request_id)
        for request_id in finished:
            del self._loads[request_id]
        if loaded:
            self._copy_to_device(loaded)
        return finished

    def take_failed_blocks(self) -> set[int]:
        """Blocks that could not be loaded, since the last call."""
        failed, self._failed = self._failed, set()
        return failed

    def start_saves(self, transfers: Transfers) -> None:
        """Copy the blocks to save to host memory, behind the step that fills them, and begin to write them."""
        files = self._store(transfers.kind)
        for write in [write for write in self._unwritten if write.done()]:
            del self._unwritten[write]
        copies, tiles, size = self._fitting(transfers.saves)
        if not copies:
            return
        blocks = torch.tensor([copy.block for copy in copies], device=self._caches[0].device)
        records = self._host(len(self._caches), len(copies), self._record_bytes)
        for layer, cache in enumerate(self._caches):
            records[layer].copy_(cache[blocks].flatten(1), non_blocking=True)
        raw = {block: self._gather(tile) for block, tile in tiles.items()}
        copied = torch.cuda.current_stream().record_event() if self._pins else None
        write = self._writing.submit(self._write, files, transfers.generation, copies, records, raw, copied)
        write.add_done_callback(_log_failed_write)
        self._unwritten[write] = size

    def close(self) -> None:
        """Write what is left, unless that takes too long, and end the threads."""
        self._reading.close(wait_s=0)
        self._writing.close(wait_s=CLOSE_S)

    def _store(self, kind: str) -> BlockFiles:
        if self._files is None:
            self._files = self._files_of(kind)
        return self._files

    def _fitting(self, saves: Sequence[BlockCopy]) -> tuple[list[BlockCopy], dict[int, list[Tensor]], int]:
        """The leading blocks that can wait to be written, raw tiles of those that begin a prefix, and their size."""
        copies: list[BlockCopy] = []
        tiles: dict[int, list[Tensor]] = {}
        size = 0
        room_bytes = MAX_UNWRITTEN_BYTES - sum(self._unwritten.values())
        for copy in saves:
            tile = self._raw_tile(copy.block) if copy.is_first else []
            if copy.is_first and not tile:
                continue
            needed_bytes = len(self._caches) * self._record_bytes + sum(part.nbytes for part in tile)
            if size + needed_bytes > room_bytes:
                logger.warning_once(UNSAVED, "it is too slow")
                break  # later blocks of a prefix are useless without earlier ones
            size += needed_bytes
            copies.append(copy)
            if tile:
                tiles[copy.block] = tile
        return copies, tiles, size

    def _raw_tile(self, block: int) -> list[Tensor]:
        """The raw tile of a block in each layer's side pool; empty if it has no slot."""
        (slot,) = self._slot_map.slots(np.array([block]))
        return [] if slot == NO_SLOT else [pool[slot] for pool in self._pools]

    def _host(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self._pins)

    def _gather(self, tile: Sequence[Tensor]) -> Tensor:
        """The raw tile of each layer as [layers, bytes] uint8 in host memory."""
        gathered = self._host(len(tile), tile[0].nbytes)
        for place, part in zip(gathered, tile, strict=True):
            place.copy_(_as_bytes(part), non_blocking=True)
        return gathered

    def _write(
        self,
        files: BlockFiles,
        generation: int,
        copies: Sequence[BlockCopy],
        records: Tensor,
        raw: dict[int, Tensor],
        copied: torch.cuda.Event | None,
    ) -> None:
        """Write blocks once the device has `copied` them: `records` is [layers, blocks, bytes]."""
        if copied is not None:
            copied.synchronize()
        for place, copy in enumerate(copies):
            if files.holds(copy.name):
                continue  # another request, or engine, has computed it, too
            parts = [_view(layer) for layer in records[:, place]]
            tile = [_view(raw[copy.block])] if copy.is_first else []
            try:
                files.write(copy.name, self._rank, parts, tile, generation)
            except OSError as error:
                logger.warning_once(UNSAVED, str(error))
                return

    def _read(self, files: BlockFiles, copy: BlockCopy) -> _Block:
        """Read a block once there is room for it, which the end of the read leaves taken unless it fails."""
        self._room.acquire()
        try:
            records = self._host(len(self._caches), self._record_bytes)
            raw = self._host(len(self._pools), self._pools[0][0].nbytes if copy.is_first else 0)
            files.read(copy.name, self._rank, _view(records), _view(raw))
        except BaseException:
            self._room.release()
            raise
        return _Block(copy, records, raw)

    def _result(self, read: Future[_Block], number: int) -> _Block | None:
        """What was read for the block `number`, which failed if that is None; its room is free for others."""
        try:
            block = read.result()
            self._room.release()
            return block
        except OSError as error:
            logger.warning_once(UNLOADED, str(error))
        except Exception as error:
            logger.warning_once(UNLOADED, repr(error))
        self._failed.add(number)
        return None

    def _copy_to_device(self, loaded: Sequence[tuple[_Block, int]]) -> None:
        """Copy blocks in one piece each, and distribute them over the layers there."""
        device = self._caches[0].device
        numbers = torch.tensor([number for _, number in loaded], device=device)
        shape = (len(loaded), len(self._caches), self._record_bytes)
        records = torch.empty(shape, dtype=torch.uint8, device=device)
        for place, (block, _) in zip(records, loaded, strict=True):
            place.copy_(block.records, non_blocking=True)
        for layer, cache in enumerate(self._caches):
            cache[numbers] = records[:, layer].view(-1, *cache.shape[1:])
        for block, number in loaded:
            if block.copy.is_first:
                # Without a slot, the request has ended, or lost its first tile to others that needed slots.
                for part, raw in zip(self._raw_tile(number), block.raw, strict=False):
                    _as_bytes(part).copy_(raw, non_blocking=True)

    def _give_up(self, load: _Load) -> None:
        """Fail the blocks that are not read yet: those that are wait for their copy only."""
        for read in [read for read in load.blocks if not read.done()]:
            logger.warning_once(UNLOADED, "it is too slow")
            self._failed.add(load.blocks.pop(read))
            if not read.cancel():
                self._stuck.add(read)
                read.add_done_callback(lambda ended: None if ended.exception() else self._room.release())


def _log_failed_write(write: Future[None]) -> None:
    if not write.cancelled() and (error := write.exception()):
        logger.warning_once(UNSAVED, repr(error))


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8).view(-1)


def _view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory."""
    array: Any = tensor.numpy()
    return memoryview(array).cast("B") if array.nbytes else memoryview(b"")
