# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Refcounts of an open image: the compiled counts, with their blocks read on demand.

Invariant: a block is taken into memory only if no commit ended since its read
began, so that an old copy never replaces newer counts; an offset that cannot be
a block is refused before it is read (I9).
"""

from __future__ import annotations

import errno

from qcowlib.driver import COMPRESSED, DATA
from qcowlib.errors import CorruptImage
from qcowlib.native import Refcounts, RunList
from qcowlib.ondisk import MAX_REFCOUNT_TABLE_BYTES, unpack_compressed
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
            if code and increment:
                raise self._refused(code, where if code == _RANGE else cluster)
            if code == _RANGE:
                await self._change_each(cluster, part)
            cluster += part
            count -= part

    async def release_runs(self, runs: RunList, emptied: RunList) -> None:
        """Take one reference from every cluster of *runs*; those whose count became 0 go to *emptied*.

        One that is not there, in a damaged image, is not taken.  Raises what
        reading a block raises; *runs* is always what is left to do.
        """
        index = inside = 0
        try:
            code = _NEED
            while code:
                code, where, index, inside = self.refs.change_runs(runs, index, inside, False, emptied)
                if code:
                    await self.load(where)
        finally:
            _, left = _split(runs, index, inside, self.header.cluster_bits)
            runs.clear()
            runs.extend(left)

    async def counted(self, runs: RunList, count: int) -> RunList:
        """The clusters of *runs*, compressed ones apart, that have exactly *count* references."""
        found = RunList()
        index = inside = 0
        while True:
            code, where, index, inside = self.refs.counted(runs, index, inside, count, found)
            if code == _OK:
                return found
            await self.load(where)

    async def reference_runs(self, runs: RunList) -> None:
        """Add one reference to every cluster of *runs*, or to none.

        Raises CorruptImage when one would grow over the refcount width, or has no block.
        """
        index = inside = 0
        code = _NEED
        try:
            while code:
                code, where, index, inside = self.refs.change_runs(runs, index, inside, True, RunList())
                if code == _NEED:
                    await self.load(where)
                elif code:
                    raise self._refused(code, where)
        except BaseException:
            done, _ = _split(runs, index, inside, self.header.cluster_bits)
            await self.release_runs(done, RunList())
            raise

    def _refused(self, code: int, cluster: int) -> CorruptImage:
        """The error for a reference that cannot be added."""
        offset = cluster << self.header.cluster_bits
        if code == _RANGE:
            return AtMaximum(f"the refcount of the cluster at {offset:#x} is at its maximum", path=self.storage.name)
        return NotCovered(offset, cluster // self.refs.per_block, self.storage.name)

    async def _change_each(self, cluster: int, count: int) -> None:
        for one in range(cluster, cluster + count):
            code, _ = self.refs.change(one, 1, False)
            if code == _NEED:
                await self.load(one // self.refs.per_block)
                self.refs.change(one, 1, False)


def _split(runs: RunList, index: int, inside: int, cluster_bits: int) -> tuple[RunList, RunList]:
    """Cut *runs* before cluster *inside* of run *index*: those before, those from there on."""
    before, after = RunList(), RunList()
    if index >= len(runs):
        return runs, after
    for number, run in enumerate(runs):
        kind, _, length, host, _ = run
        if number != index or not inside:
            (before if number < index else after).add(*run)
            continue
        if kind == COMPRESSED:
            host, length = unpack_compressed(host, cluster_bits)
        start = host >> cluster_bits << cluster_bits
        middle = start + (inside << cluster_bits)
        before.add(DATA, start, middle - start, start)
        after.add(DATA, middle, host + length - middle, middle)
    return before, after
