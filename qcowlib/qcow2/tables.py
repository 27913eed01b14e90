# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""L2 tables of one layer: reading them into the compiled map, several at once.

Invariant: a table is taken into memory only if no commit ended since its read
began; a table offset is checked before it is read (I9).  What the compiled map
finds wrong in an entry becomes one message here.
"""

from __future__ import annotations

from qcowlib import native
from qcowlib.errors import CorruptImage
from qcowlib.native import ClusterMap
from qcowlib.ondisk import OFFSET_MASK
from qcowlib.units import KiB, MiB

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from qcowlib.ondisk import Header
    from qcowlib.runtime import Runtime
    from qcowlib.storage.base import Storage

__all__ = ["L2Tables", "make_map"]

#: Tables read by one system call when the caller is going through them in order.
_AHEAD_BYTES = 1 * MiB
#: The same where they are only looked at: what the processor's cache holds.
_LENT_BYTES = 512 * KiB
_KEPT_BUFFERS = 4

_MESSAGES = {
    native.BAD_L2_OFFSET: "L2 table offset {value:#x} unaligned (L1 index: {l1:#x})",
    native.BAD_DATA_OFFSET: "Cluster allocation offset {value:#x} unaligned (L2 offset: {table:#x}, L2 index: {l2:#x})",
    native.BAD_ZERO_V2: "Zero cluster entry found in pre-v3 image (L2 offset: {table:#x}, L2 index: {l2:#x})",
    native.BAD_COMPRESSED_DATA_FILE: (
        "Compressed cluster entry found in image with external data file (L2 offset: {table:#x}, L2 index: {l2:#x})"
    ),
    native.BAD_DATA_FILE_OFFSET: (
        "External data file host cluster offset {value:#x} does not match guest cluster offset: {l1:#x}, "
        "L2 index: {l2:#x})"
    ),
    native.BAD_SUBCLUSTERS: "Invalid subcluster bitmap {value:#x} (L2 offset: {table:#x}, L2 index: {l2:#x})",
}


def make_map(header: Header, cache_bytes: int) -> ClusterMap:
    """Return an empty map for *header* that keeps about *cache_bytes* of L2 tables."""
    slots = max(4, cache_bytes >> header.cluster_bits)
    return ClusterMap(
        header.cluster_bits,
        header.virtual_size,
        header.extended_l2,
        header.has_data_file,
        header.version == 2,
        slots,
    )


class L2Tables:
    """Loads L2 tables of one layer on demand.

    *make_room* is awaited when every cached table is dirty: it must commit.
    """

    __slots__ = ("_buffers", "_lent", "cmap", "generation", "header", "make_room", "runtime", "storage")

    def __init__(self, runtime: Runtime, storage: Storage, header: Header, cmap: ClusterMap) -> None:
        self.runtime = runtime
        self.storage = storage
        self.header = header
        self.cmap = cmap
        self.make_room: Callable[[], Awaitable[None]] | None = None
        self.generation: Callable[[], int] = int
        # Fresh memory costs as much as reading into it: buffers are used again.
        self._buffers: list[bytearray] = []
        self._lent = bytearray()

    def index(self, guest: int) -> int:
        """The L1 index that covers guest offset *guest*."""
        return guest // (self.cmap.l2_entries << self.cmap.cluster_bits)

    async def load(self, index: int, stop: int | None = None) -> None:
        """Bring the table of L1 index *index* into memory; up to *stop* (exclusive) on the way."""
        cmap = self.cmap
        cluster_size = self.header.cluster_size
        most = 1 if stop is None else max(1, _AHEAD_BYTES // cluster_size)
        while not cmap.loaded(index):
            offset, wanted = cmap.missing(index, index + 1 if stop is None else stop, most)
            self._check(offset, index)
            generation = self.generation()
            length = len(wanted) * cluster_size
            buffer = self._buffers.pop() if self._buffers else bytearray()
            if len(buffer) < length:
                buffer = bytearray(length)
            await self.runtime.io(self.storage.read_into, offset, [memoryview(buffer)[:length]])
            full = False
            if generation == self.generation():
                full = not self._install(wanted, offset, buffer)
            if len(self._buffers) < _KEPT_BUFFERS:
                self._buffers.append(buffer)
            if full:
                # Only a commit makes tables clean; then the read must be done again.
                await self.room()

    async def lend(self, index: int, stop: int) -> None:
        """Let the map see the table of L1 index *index*, and those behind it in the file up to *stop*, until the next.

        Only where nobody changes the image: what was read stays right.
        """
        cluster_size = self.header.cluster_size
        offset, wanted = self.cmap.missing(index, stop, max(1, _LENT_BYTES // cluster_size))
        self._check(offset, index)
        length = len(wanted) * cluster_size
        buffer = self._buffers.pop() if self._buffers else bytearray()
        if len(buffer) < length:
            buffer = bytearray(length)
        await self.runtime.io(self.storage.read_into, offset, [memoryview(buffer)[:length]])
        self.cmap.lend(buffer, offset, length)
        old, self._lent = self._lent, buffer
        if len(self._buffers) < _KEPT_BUFFERS:
            self._buffers.append(old)

    def _install(self, wanted: list[int], offset: int, data: bytearray) -> bool:
        """Take the tables that L1 still names where they were read; false when there is no room."""
        cluster_size = self.header.cluster_size
        for number, one in enumerate(wanted):
            if self.cmap.l1_entry(one) & OFFSET_MASK != offset + number * cluster_size:
                break
            if not self.cmap.install(one, data, number * cluster_size):
                return False
        return True

    async def room(self) -> None:
        """Make at least one cached table clean."""
        if self.make_room is None:
            raise CorruptImage("no room for an L2 table", path=self.storage.name)
        await self.make_room()

    def _check(self, offset: int, index: int) -> None:
        if offset % self.header.cluster_size:
            raise CorruptImage(f"L2 table offset {offset:#x} unaligned (L1 index: {index:#x})", path=self.storage.name)
        if offset >= self.storage.size:
            raise CorruptImage(
                f"L2 table offset {offset:#x} is past the end of the file (L1 index: {index:#x})",
                path=self.storage.name,
            )

    def corruption(self) -> CorruptImage:
        """The error for what the map found last."""
        cmap = self.cmap
        table = cmap.l1_entry(cmap.bad_l1) & OFFSET_MASK if cmap.bad_l1 < cmap.l1_size else 0
        text = _MESSAGES[cmap.bad].format(value=cmap.bad_value, l1=cmap.bad_l1, l2=cmap.bad_l2, table=table)
        return CorruptImage(text, path=self.storage.name)


CACHE_BYTES = 32 * MiB
MIN_CACHE_BYTES = 256 * KiB
