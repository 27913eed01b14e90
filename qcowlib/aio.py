# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The same names for asyncio.

The engine runs on the caller's loop; only blocking storage calls go to the
loop's executor, one job for each batch of runs.  A read whose mapping is in
memory and whose bytes are cached costs no task switch when it is small.

Invariant: an image belongs to the loop it was opened on; between two awaits
nothing else of it runs.  Long jobs (convert, compare, ...) run in one thread
of the executor with images of their own.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Literal, ParamSpec, TypeVar

from qcowlib import api
from qcowlib.driver import Bitmap, Extent, Snapshot
from qcowlib.errors import UnsupportedFeature, UsageError
from qcowlib.gate import References, qemu_like
from qcowlib.image import OpenImage, check_range, run_extents
from qcowlib.opening import OpenOptions, open_chain
from qcowlib.qcow2.directories import read_snapshots
from qcowlib.qcow2.image import Qcow2Image
from qcowlib.qcow2.snapshot import apply_snapshot, create_snapshot, delete_snapshot
from qcowlib.qcow2.write import Writer
from qcowlib.runtime import AsyncioRuntime

if TYPE_CHECKING:
    from types import TracebackType

    from _typeshed import ReadableBuffer, WriteableBuffer

    from qcowlib.image import CacheMode
    from qcowlib.info import ImageInfo
    from qcowlib.opening import Secrets, Source
    from qcowlib.qcow2.amend import AmendOptions
    from qcowlib.qcow2.bitmap_session import BitmapSession
    from qcowlib.qcow2.check import Report
    from qcowlib.qcow2.create import Preallocation

__all__ = ["Image", "open"]

_INLINE = 65536
_BATCH = 4096

P = ParamSpec("P")
R = TypeVar("R")


class Image(OpenImage):
    """An open image for coroutines; made by :func:`open`.  Methods as :class:`qcowlib.Image`."""

    __slots__ = ()

    async def pread(self, length: int, offset: int) -> bytes:
        """Return *length* bytes from *offset*, fewer at the end of the image."""
        self._check_open()
        check_range(offset, 0 if offset > self.size else length, max(self.size, offset + max(length, 0)), self.path)
        buffer = bytearray(max(min(length, self.size - offset), 0))
        await self._read(memoryview(buffer), offset)
        return bytes(buffer)

    async def preadinto(self, buffer: WriteableBuffer, offset: int) -> int:
        """Fill *buffer* from *offset*; returns the bytes read."""
        self._check_open()
        view = memoryview(buffer).cast("B")
        check_range(offset, 0, max(self.size, offset), self.path)
        view = view[: max(self.size - offset, 0)]
        await self._read(view, offset)
        return len(view)

    async def _read(self, view: memoryview, offset: int) -> None:
        # Small and cached costs less than a thread's turn; anything else must not hold up the loop.
        if len(view) > _INLINE or not len(view) or not self._map.read_hit(view, offset, True):
            await self._chain.read_into(offset, view)

    async def pwrite(self, data: ReadableBuffer, offset: int) -> int:
        """Write all of *data* at *offset*; durable after the next :meth:`flush`."""
        self._check_writable()
        view = memoryview(data).cast("B")
        check_range(offset, len(view), self.size, self.path)
        if len(view):
            await self._chain.write(offset, view)
        return len(view)

    async def zero(self, length: int, offset: int, *, unmap: bool = True) -> None:
        """Make the range read as zeros."""
        self._check_writable()
        check_range(offset, length, self.size, self.path)
        if length:
            await self._chain.zero(offset, length, unmap=unmap)

    async def discard(self, length: int, offset: int) -> None:
        """Give whole clusters inside the range back."""
        self._check_writable()
        check_range(offset, length, self.size, self.path)
        if length:
            await self._chain.discard(offset, length)

    async def flush(self) -> None:
        """Return when everything written before is durable."""
        self._check_open()
        if self.mode == "r+":
            await self._chain.flush()

    async def resize(
        self, size: int, *, preallocation: Preallocation = "off", shrink: bool = False, sparse: bool = True
    ) -> None:
        """Change the virtual size."""
        self._check_writable()
        await self._chain.resize(size, preallocation=preallocation, shrink=shrink, sparse=sparse)

    async def extents(self, offset: int = 0, length: int | None = None) -> AsyncIterator[Extent]:
        """Yield the extents that cover the range, looking up as it goes; neighbours are not merged over look-ups."""
        self._check_open()
        end = self.size if length is None else offset + length
        check_range(offset, end - offset, self.size, self.path)
        while offset < end:
            runs = await self._chain.map_range(offset, end - offset)
            for extent in run_extents(runs):
                yield extent
            offset = runs.end

    async def info(self) -> ImageInfo:
        """Return what the image says about itself."""
        from qcowlib.info import image_info

        self._check_open()
        top = self._chain.top
        header = top.header if isinstance(top, Qcow2Image) else None
        return await self._chain.runtime.io(image_info, top.storage, header)

    async def check(self, *, repair: Literal["leaks", "all"] | None = None) -> Report:
        """Check the metadata of the top layer, or repair it."""
        from qcowlib.qcow2.inplace import check_open

        self._check_open() if repair is None else self._check_writable()
        top, writer = self._chain.top, self._chain.writer
        if not isinstance(top, Qcow2Image) or not isinstance(writer, Writer):
            raise UnsupportedFeature("This image format does not support checks", path=self.path)
        return await check_open(top, writer, repair)

    # -- internal snapshots ----------------------------------------------------

    async def snapshots(self) -> list[Snapshot]:
        """Return the internal snapshots; empty for raw."""
        self._check_open()
        top = self._chain.top
        if not isinstance(top, Qcow2Image):
            return []
        return list(map(Snapshot.of, await self._chain.runtime.io(read_snapshots, top.storage, top.header)))

    async def create_snapshot(self, name: str, *, as_qemu: bool = False) -> Snapshot:
        """Take an internal snapshot."""
        return Snapshot.of(await create_snapshot(self._writer(), name, as_qemu=as_qemu))

    async def apply_snapshot(self, wanted: str) -> None:
        """Go back to a snapshot (id, else name)."""
        await apply_snapshot(self._writer(), wanted, self._chain.refresh)

    async def delete_snapshot(self, wanted: str, *, by_id: bool = True) -> None:
        """Delete a snapshot."""
        await delete_snapshot(self._writer(), wanted, by_id=by_id)

    def _writer(self) -> Writer:
        self._check_writable()
        if not isinstance(self._chain.writer, Writer):
            raise UnsupportedFeature("raw images have no snapshots", path=self.path)
        return self._chain.writer

    async def amend(
        self, options: AmendOptions, progress: Callable[[int, int], object] | None = None, *, like_qemu: bool = False
    ) -> None:
        """Change creation options; *progress* is called on the loop."""
        self._check_writable()
        await self._chain.amend(options, progress, like_qemu=like_qemu)

    # -- persistent dirty bitmaps ----------------------------------------------

    async def bitmaps(self) -> list[Bitmap]:
        """Return the persistent bitmaps; empty for raw."""
        self._check_open()
        return await self._chain.bitmaps()

    async def bitmap_extents(self, name: str, offset: int = 0) -> AsyncIterator[tuple[int, int]]:
        """Yield ``(offset, length)`` of the guest ranges that bitmap *name* has recorded; see the plain call."""
        self._check_open()
        check_range(offset, 0, self.size, self.path)
        ranges = await self._chain.bitmap_ranges(name, offset)
        while batch := await self._chain.runtime.io(lambda: list(itertools.islice(ranges, _BATCH))):
            for pair in batch:
                yield pair

    async def add_bitmap(self, name: str, granularity: int | None = None, *, disabled: bool = False) -> None:
        """Make an empty bitmap."""
        await self._bitmaps().add(name, granularity, disabled=disabled)

    async def remove_bitmap(self, name: str) -> None:
        """Delete a bitmap."""
        await self._bitmaps().remove(name)

    async def clear_bitmap(self, *names: str) -> None:
        """Forget what bitmaps have recorded."""
        await self._bitmaps().clear(*names)

    async def replace_bitmap(self, name: str, by: str) -> None:
        """Delete bitmap *name* and give its name to bitmap *by*."""
        await self._bitmaps().replace(name, by)

    async def enable_bitmap(self, name: str) -> None:
        """Record changes in a bitmap from now on."""
        await self._bitmaps().enable(name, True)

    async def disable_bitmap(self, name: str) -> None:
        """Stop recording changes in a bitmap."""
        await self._bitmaps().enable(name, False)

    async def merge_bitmap(self, target: str, source: str, source_image: Image | None = None) -> None:
        """Set in *target* all that is set in *source*."""
        other = None
        if source_image is not None and source_image is not self:
            other = (source_image.size, await source_image._chain.bitmap_ranges(source))
        await self._bitmaps().merge_from(target, source, other)

    async def record_bitmap(self, name: str, ranges: Iterable[tuple[int, int]]) -> None:
        """Set in bitmap *name* the guest *ranges*; what lies behind the end is left out."""
        size = self.size
        inside = ((offset, min(length, size - offset)) for offset, length in ranges if offset < size)
        await self._bitmaps().merge_from(name, name, (size, inside))

    async def copy_bitmaps(self, source: Image, *, skip_broken: bool = False) -> list[str]:
        """Add all bitmaps of *source*; returns the names of those left out."""
        contents: list[tuple[Bitmap, Iterator[tuple[int, int]]]] = []
        for bitmap in await source.bitmaps():
            ranges = iter(()) if bitmap.inconsistent else await source._chain.bitmap_ranges(bitmap.name)
            contents.append((bitmap, ranges))
        return await self._bitmaps().add_filled(contents, skip_broken=skip_broken)

    def _bitmaps(self) -> BitmapSession:
        self._check_writable()
        return self._chain.bitmap_session()

    # -- ending ----------------------------------------------------------------

    async def close(self) -> None:
        """Make everything durable and close every file."""
        if self._closed:
            return
        self._closed = True
        try:
            if self.mode == "r+":
                await self._chain.top.finish()
        finally:
            await self._chain.runtime.io(self._chain.close)

    async def __aenter__(self) -> Image:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def open(
    path: Source,
    mode: Literal["r", "r+"] = "r",
    *,
    format: str | None = None,
    snapshot: str | None = None,
    references: References = qemu_like,
    cache: CacheMode = "writeback",
    force_share: bool = False,
    secret: Secrets | None = None,
    data_file: Source | None = None,
    backing: bool = True,
    backing_format: str | None = None,
    lock: bool = True,
    discard: Literal["unmap", "ignore"] = "unmap",
) -> Image:
    """Open an image on the running loop; arguments as :func:`qcowlib.open`."""
    if mode not in ("r", "r+"):
        raise UsageError(f"mode {mode!r} is neither 'r' nor 'r+'")
    loop = asyncio.get_running_loop()
    options = OpenOptions(
        writable=mode == "r+",
        format=format,
        snapshot=snapshot,
        references=references,
        cache=cache,
        force_share=force_share,
        secret=secret,
        data_file=data_file,
        backing=backing,
        backing_format=backing_format,
        lock=lock,
        discard=discard,
    )
    chain = await loop.run_in_executor(None, functools.partial(open_chain, AsyncioRuntime(loop), path, options))
    return Image(chain, mode)


def _in_thread(function: Callable[P, R]) -> Callable[P, asyncio.Future[R]]:
    """Return *function* as a call that runs in one thread of the loop's executor."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> asyncio.Future[R]:
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(None, functools.partial(function, *args, **kwargs))

    return call


if TYPE_CHECKING:
    apply = _in_thread(api.apply)
    backup = _in_thread(api.backup)
    backup_set = _in_thread(api.backup_set)
    chain_tree = _in_thread(api.chain_tree)
    commit = _in_thread(api.commit)
    compact = _in_thread(api.compact)
    compare = _in_thread(api.compare)
    convert = _in_thread(api.convert)
    create = _in_thread(api.create)
    create_overlays = _in_thread(api.create_overlays)
    dd = _in_thread(api.dd)
    diff = _in_thread(api.diff)
    diff_overlay = _in_thread(api.diff_overlay)
    diff_seals = _in_thread(api.diff_seals)
    finish_set = _in_thread(api.finish_set)
    flatten = _in_thread(api.flatten)
    heal = _in_thread(api.heal)
    inspect = _in_thread(api.inspect)
    measure = _in_thread(api.measure)
    measure_backup = _in_thread(api.measure_backup)
    merge = _in_thread(api.merge)
    plan_compact = _in_thread(api.plan_compact)
    plan_merge = _in_thread(api.plan_merge)
    plan_overlays = _in_thread(api.plan_overlays)
    plan_restore = _in_thread(api.plan_restore)
    plan_seal = _in_thread(api.plan_seal)
    plan_verify = _in_thread(api.plan_verify)
    read_diff = _in_thread(api.read_diff)
    rebase = _in_thread(api.rebase)
    restore = _in_thread(api.restore)
    restore_set = _in_thread(api.restore_set)
    salvage = _in_thread(api.salvage)
    seal = _in_thread(api.seal)
    survey = _in_thread(api.survey)
    verify = _in_thread(api.verify)
    write_diff = _in_thread(api.write_diff)

_NO_JOBS = {"deny_all", "directories", "images_in", "many", "open", "qemu_like", "same_directory", "serve"}
_JOBS = {name for name in api.__all__ if name.islower()} - _NO_JOBS


def __getattr__(name: str) -> object:
    """Jobs of :mod:`qcowlib.api`, awaitable."""
    if name in _JOBS:
        return _in_thread(getattr(api, name))
    raise AttributeError(f"module 'qcowlib.aio' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_JOBS])
