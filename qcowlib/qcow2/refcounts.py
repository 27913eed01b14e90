# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Refcounts of an open image: the compiled counts, with their blocks read on demand.

Invariant: a block is taken into memory only if no commit ended since its read
began, so that an old copy never replaces newer counts; an offset that cannot be
a block is refused before it is read (I9).
"""

from __future__ import annotations

import errno

from qcowlib.errors import CorruptImage
from qcowlib.native import Refcounts
from qcowlib.ondisk import MAX_REFCOUNT_TABLE_BYTES
from qcowlib.units import MiB

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qcowlib.ondisk import Header
    from qcowlib.runtime import Runtime
    from qcowlib.storage.base import Storage

__all__ = ["AtMaximum", "NotCovered", "RefcountStore"]

_OK, _NEED, _NO_BLOCK, _RANGE = range(4)
_CACHE_BYTES = 8 * MiB


class AtMaximum(CorruptImage):
    """A count that has no room for one more reference."""


class NotCovered(CorruptImage):
    """A reference to a cluster that has no refcount block.

    ``errno`` is what qemu reports: EFBIG where no refcount table could reach it.
    """

    def __init__(self, offset: int, block: int, path: str) -> None:
        super().__init__(f"no refcount block covers the cluster at {offset:#x}", path=path)
        self.errno = errno.EFBIG if block >= MAX_REFCOUNT_TABLE_BYTES // 8 else errno.EAGAIN


class RefcountStore:
    """Loads what :class:`~qcowlib.native.Refcounts` asks for.

    ``generation`` is raised by whoever wrote blocks back.
    """

    __slots__ = ("generation", "header", "refs", "runtime", "storage")

    def __init__(self, runtime: Runtime, storage: Storage, header: Header, table: bytes | bytearray) -> None:
        self.runtime = runtime
        self.storage = storage
        self.header = header
        self.generation = 0
        limit = max(4, _CACHE_BYTES >> header.cluster_bits)
        self.refs = Refcounts(header.cluster_bits, header.refcount_order, table, limit)

    async def load(self, index: int) -> None:
        """Bring refcount block *index* into memory."""
        cluster_size = self.header.cluster_size
        while not self.refs.loaded(index):
            offset = self.refs.block_offset(index)
            if offset % cluster_size or offset > self.storage.size - 1:
                place = "unaligned" if offset % cluster_size else "outside the file"
                raise CorruptImage(
                    f"Refblock offset {offset:#x} {place} (reftable index: {index:#x})", path=self.storage.name
                )
            generation = self.generation
            block = bytearray(cluster_size)
            await self.runtime.io(self.storage.read_into, offset, [block])
            if generation == self.generation and offset == self.refs.block_offset(index):
                self.refs.install(index, block)

    async def get(self, cluster: int) -> int:
        """The count of one host cluster."""
        while True:
            code, value = self.refs.get(cluster)
            if code == _OK:
                return value
            await self.load(value)

    async def change(self, cluster: int, count: int, increment: bool) -> None:
        """Add or take one reference on each of *count* clusters.

        Taking a reference that is not there, which only a damaged image can
        ask for, changes nothing: a count never wraps.  Raises CorruptImage when
        one would grow over the refcount width, or has no block.
        """
        per_block = self.refs.per_block
        while count:
            part = min(count, per_block - cluster % per_block)
            code, where = self.refs.change(cluster, part, increment)
            if code == _NEED:
                await self.load(where)
                continue
            if code == _RANGE and increment:
                offset = where << self.header.cluster_bits
                raise AtMaximum(f"the refcount of the cluster at {offset:#x} is at its maximum", path=self.storage.name)
            if code == _RANGE:
                await self._change_each(cluster, part)
            elif code == _NO_BLOCK and increment:
                raise NotCovered(cluster << self.header.cluster_bits, cluster // per_block, self.storage.name)
            cluster += part
            count -= part

    async def _change_each(self, cluster: int, count: int) -> None:
        for one in range(cluster, cluster + count):
            code, _ = self.refs.change(one, 1, False)
            if code == _NEED:
                await self.load(one // self.refs.per_block)
                self.refs.change(one, 1, False)
