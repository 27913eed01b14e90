# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A backing chain: opening its layers through the gate, and one mapping over all of them.

Invariants: the format of a base comes from its overlay's header or from the
caller, never from its first bytes (N4); a chain is finite (loops are found by
file identity, depth is bounded by :data:`MAX_DEPTH`); only the top layer is
ever changed.  A lookup resolves through all layers before any byte is read.
"""

from __future__ import annotations

from qcowlib.driver import COMPRESSED, DATA, HOLE, SPARSE, ZERO, Bitmap
from qcowlib.errors import CorruptImage, Error, FormatError, StorageError, UnsupportedFeature, UsageError
from qcowlib.native import ChainMap, LayerFds, RunList
from qcowlib.ondisk import is_qcow2
from qcowlib.qcow2.directories import read_bitmaps
from qcowlib.qcow2.image import Qcow2Image
from qcowlib.raw import RawImage, RawWriter
from qcowlib.runtime import pause

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Final

    from qcowlib.ondisk import BitmapEntry
    from qcowlib.qcow2.amend import AmendOptions
    from qcowlib.qcow2.bitmap_session import BitmapSession
    from qcowlib.qcow2.create import Preallocation
    from qcowlib.qcow2.write import Writer
    from qcowlib.runtime import Runtime
    from qcowlib.storage.base import Storage

__all__ = ["MAX_DEPTH", "Chain", "Layer"]

MAX_DEPTH: Final = 200
"""Layers in a chain, at most."""

RUN_LIMIT: Final = 4096
"""Runs that one lookup returns, about: what bounds its memory."""

_IO_MISSING = -100000  # as _io.pxd

Layer = Qcow2Image | RawImage


class Chain:
    """Layers, top first, with the mapping through all of them.

    *punch* gives what the guest discards back to the file system;
    *write_through* makes each change durable before its call returns.

    *sparse* refines maps with what the file system knows about holes, where a
    file looks preallocated as qemu judges it.
    """

    def __init__(
        self, runtime: Runtime, layers: list[Layer], *, punch: bool = True, write_through: bool = False
    ) -> None:
        if len(layers) > MAX_DEPTH:
            raise FormatError(f"the chain has more than {MAX_DEPTH} layers", path=layers[0].storage.name)
        self.runtime = runtime
        self.layers = layers
        self.top = layers[0]
        fds = LayerFds(len(layers))
        for number, layer in enumerate(layers):
            self._set_fds(fds, number, layer)
        maps = [layer.cmap if isinstance(layer, Qcow2Image) else None for layer in layers]
        self.map = ChainMap(maps, [layer.size for layer in layers], fds)
        self.map.fast_read = True
        self.map.fast_write = isinstance(self.top, RawImage) and self.top.writable and not write_through
        self._punch = punch
        self._through = write_through
        self._writer: Writer | RawWriter | None = None
        if isinstance(self.top, Qcow2Image):
            self.top.chain_map = self.map
            if self.top.writable and self.top.header.bitmaps_valid:
                self.bitmap_session()

    @staticmethod
    def _set_fds(fds: LayerFds, number: int, layer: Layer) -> None:
        segments = layer.data.fd_map() if layer.plain else None
        pad = layer.cluster_size if isinstance(layer, Qcow2Image) else 512
        fds.set(number, segments, pad)

    @property
    def writer(self) -> Writer | RawWriter:
        """What changes the top layer; made when it is first asked for."""
        if self._writer is None:
            if isinstance(self.top, Qcow2Image):
                from qcowlib.qcow2.write import Writer

                self._writer = Writer(
                    self.top,
                    self.read_into,
                    self.reads_zero,
                    has_backing=len(self.layers) > 1,
                    punch=self._punch,
                    lane=not self._through,
                )
            else:
                self._writer = RawWriter(self.top)
        return self._writer

    def refresh(self) -> None:
        """The top layer's size, or the place of its bytes, changed."""
        self.map.set_size(0, self.top.size)
        self._set_fds(self.map.fds, 0, self.top)

    @property
    def size(self) -> int:
        """Guest bytes."""
        return self.top.size

    # -- mapping ---------------------------------------------------------------

    async def resolve(self, offset: int, length: int, *, limit: int = RUN_LIMIT, ahead: bool = False) -> RunList:
        """Return the runs from *offset* on: all of *length*, or as much as *limit* runs cover."""
        runs = RunList()
        end = offset + length
        while True:
            start = runs.end if len(runs) else offset
            code, layer, guest = self.map.resolve(start, end - start, limit, runs)
            if code == 0:
                return runs
            image = self.layers[layer]
            if not isinstance(image, Qcow2Image):
                raise CorruptImage("a raw layer has no tables", path=image.storage.name)
            if code == 2:
                raise image.tables.corruption()
            index = image.tables.index(guest)
            stop = image.tables.index(end - 1) + 1 if ahead else None
            if stop is not None and not image.writable:
                await image.tables.lend(index, stop)
            else:
                await image.tables.load(index, stop)

    async def reads_zero(self, offset: int, length: int) -> bool:
        """Whether the mapping alone says that the range reads as zeros."""
        runs = await self.resolve(offset, length, limit=16)
        return runs.end >= offset + length and all(run[0] in (HOLE, ZERO) for run in runs)

    async def map_range(self, offset: int, length: int) -> RunList:
        """As :meth:`resolve`, with holes that the file systems know about as runs of their own."""
        runs = await self.resolve(offset, length, ahead=True)
        holes = self._hole_kinds()
        return await self.runtime.io(self._refine, runs, holes) if any(holes) else runs

    def _hole_kinds(self) -> bytes:
        """What a hole in the data of each layer means; 0 where none is looked for."""
        kinds = bytearray(len(self.layers))
        for number, image in enumerate(self.layers):
            if isinstance(image, RawImage):
                kinds[number] = ZERO
            elif image.looks_preallocated():
                kinds[number] = SPARSE
        return bytes(kinds)

    def _refine(self, runs: RunList, holes: bytes) -> RunList:
        refined = RunList()
        fds = self.map.fds
        if all(not kind or fds.whole_file(number) for number, kind in enumerate(holes)):
            code = fds.refine(runs, holes, refined)
            if code == 0:
                return refined
            refined.clear()
        for kind, guest, length, host, layer in runs:
            if kind != DATA or not holes[layer]:
                refined.add(kind, guest, length, host, layer)
                continue
            data = self.layers[layer].data
            inside = min(length, max(data.size - host, 0))
            for extent in data.extents(host, inside):
                is_data = extent.kind == "data"
                at = guest + extent.start - host
                refined.add(DATA if is_data else holes[layer], at, extent.length, extent.start, layer)
            refined.add(holes[layer], guest + inside, length - inside, host + inside, layer)
        return refined

    # -- reading ---------------------------------------------------------------

    async def read_into(self, offset: int, view: memoryview) -> None:
        """Fill *view* from guest *offset*; the caller has checked the bounds."""
        position, end = offset, offset + len(view)
        while position < end:
            # Before the lookup, which may wait for tables half way: what it found until then stays in use.
            pin = self.map.pin()
            try:
                runs = await self.resolve(position, end - position)
                covered = min(runs.end, end)
                await self.runtime.io(self.read_runs, runs, view[position - offset : covered - offset], position)
            finally:
                self.map.unpin(pin)
            position = covered

    def read_runs(self, runs: RunList, view: memoryview, base: int) -> None:
        """Execute *runs* into *view*, whose first byte is guest offset *base* (blocking, thread-safe)."""
        left, code, layer, offset = self.map.fds.read_runs(runs, view, base)
        if code:
            image = self.layers[layer]
            if code == _IO_MISSING:
                raise CorruptImage(f"data at offset {offset:#x} lies past the end of the file", path=image.data.name)
            raise StorageError(code, path=image.data.name, operation="read", offset=offset)
        packed: dict[int, list[tuple[int, int, int]]] = {}
        for index in left:
            kind, guest, length, host, layer = runs[index]
            start = guest - base
            image = self.layers[layer]
            if kind == COMPRESSED and isinstance(image, Qcow2Image) and length == image.cluster_size:
                packed.setdefault(layer, []).append((host, guest, start))
            else:
                image.read_run(kind, host, guest, length, view[start : start + length])
        for layer, clusters in packed.items():
            image = self.layers[layer]
            if isinstance(image, Qcow2Image):
                image.read_packed(clusters, view)

    # -- writing ---------------------------------------------------------------

    async def write(self, offset: int, data: memoryview) -> None:
        """Write *data* at guest *offset*."""
        await self.writer.write(offset, data)
        await self._written()

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make guest bytes read as zeros."""
        await self.writer.zero(offset, length, unmap=unmap)
        await self._written()

    async def discard(self, offset: int, length: int) -> None:
        """Give guest bytes back."""
        await self.writer.discard(offset, length)
        await self._written()

    async def write_compressed(self, offset: int, cluster: memoryview) -> None:
        """Store one whole cluster compressed."""
        writer = self.writer
        if isinstance(writer, RawWriter):
            raise UsageError("Compression not supported for this file format", path=self.top.storage.name)
        await writer.write_compressed(offset, cluster)
        await self._written()

    async def _written(self) -> None:
        """With write-through a change is durable when its call returns, with all that makes it readable."""
        if self._through:
            await self.flush()

    async def resize(self, size: int, *, preallocation: Preallocation, shrink: bool, sparse: bool = True) -> None:
        """Change the size of the top layer."""
        if size < 0:
            raise UsageError("New image size must be positive", path=self.top.storage.name)
        writer = self.writer
        if isinstance(writer, RawWriter):
            await writer.resize(size, preallocation=preallocation, shrink=shrink)
            self.refresh()
            return
        from qcowlib.qcow2.resize import resize

        below = self.layers[1].size if len(self.layers) > 1 else 0
        await resize(
            writer,
            size,
            backing_size=below,
            refresh=self.refresh,
            preallocation=preallocation,
            shrink=shrink,
            sparse=sparse,
        )

    async def amend(
        self, options: AmendOptions, progress: Callable[[int, int], object] | None, *, like_qemu: bool = False
    ) -> None:
        """Change creation options of the top layer."""
        from qcowlib.qcow2.amend import amend
        from qcowlib.qcow2.write import Writer

        if not isinstance(self.writer, Writer):
            await self._amend_luks(options)
            return
        below = self.layers[1].size if len(self.layers) > 1 else 0
        await amend(
            self.writer, options, backing_size=below, refresh=self.refresh, progress=progress, like_qemu=like_qemu
        )

    async def _amend_luks(self, options: AmendOptions) -> None:
        """Change the key slots of a LUKS file, all that can be changed of what is not QCOW2."""
        from qcowlib.storage.encrypted import EncryptedStorage

        storage = self.layers[0].data
        if not isinstance(storage, EncryptedStorage):
            raise UnsupportedFeature("Format driver 'raw' does not support option amendment")
        if options.encrypt is None or options._replace(encrypt=None) != type(options)():
            raise UsageError("only the keys of a LUKS file can be changed", path=storage.name)
        await self.runtime.io(storage.change_keys, options.encrypt)

    # -- persistent bitmaps ----------------------------------------------------

    def bitmap_session(self) -> BitmapSession:
        """What changes the bitmaps of the top layer, and keeps them current."""
        from qcowlib.qcow2.bitmap_session import session_of

        writer = self.writer
        if isinstance(writer, RawWriter):
            raise UnsupportedFeature("raw images have no bitmaps", path=self.top.storage.name)
        return session_of(writer)

    async def bitmaps(self) -> list[Bitmap]:
        """The persistent bitmaps of the top layer."""
        return [Bitmap.of(entry) for entry in await self._bitmap_entries()]

    async def _bitmap_entries(self) -> list[BitmapEntry]:
        top = self.top
        if not isinstance(top, Qcow2Image):
            return []
        if top.tracker is not None:
            return await self.bitmap_session().listed()
        return await self.runtime.io(read_bitmaps, top.storage, top.header)

    async def bitmap_ranges(self, name: str, since: int = 0) -> Iterator[tuple[int, int]]:
        """What a bitmap has recorded up to now, as ``(offset, length)``; the iterator blocks.

        What ends before *since* may be left out.
        """
        from qcowlib.qcow2.bitmap import dirty_ranges, find_bitmap, usable

        top, path = self.top, self.top.storage.name
        entry = usable(find_bitmap(await self._bitmap_entries(), name, path), path)
        if not isinstance(top, Qcow2Image):
            return iter(())
        extra = self.bitmap_session().recorded(entry) if top.tracker is not None else None
        return dirty_ranges(top.storage, top.header, entry, extra, since)

    async def flush(self) -> None:
        """Make every finished change durable."""
        await self.top.flush()

    def close(self) -> None:
        """Close every storage (blocking); errors of the first one are raised at the end.

        Descriptors are taken from the compiled lane first, and operations that
        still use them are waited for: their numbers may soon be another file's.
        """
        self.map.fast_read = self.map.fast_write = self.map.fast_allocate = False
        for number in range(len(self.layers)):
            self.map.fds.set(number, None, 1)
        while self.map.pinned:
            pause()
        first: Error | None = None
        for layer in self.layers:
            for storage in {id(s): s for s in (layer.storage, layer.data)}.values():
                try:
                    storage.close()
                except Error as error:
                    first = first or error
        if first is not None:
            raise first


def probe_format(storage: Storage) -> str:
    """Return ``qcow2`` or ``raw`` by the first bytes: only for what the caller named, never for a base."""
    head = bytearray(8)
    storage.read_into(0, [head])
    return "qcow2" if storage.size >= 8 and is_qcow2(bytes(head)) else "raw"
