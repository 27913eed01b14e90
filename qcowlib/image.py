# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""An open image for synchronous callers.

Invariant: thin.  It checks bounds, tries the compiled hit lane, and else runs
one engine coroutine under :class:`~qcowlib.runtime.SyncRuntime`; nothing is
decided here.  Any number of threads may use one image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from qcowlib.chain import Chain
from qcowlib.driver import COMPRESSED, DATA, HOLE, NO_OFFSET, SPARSE, ZERO, Extent, Snapshot
from qcowlib.errors import OutOfRange, ReadOnly, UnsupportedFeature, UsageError
from qcowlib.gate import References, qemu_like
from qcowlib.native import RunList
from qcowlib.opening import OpenOptions, open_chain
from qcowlib.qcow2.directories import read_snapshots
from qcowlib.qcow2.image import Qcow2Image
from qcowlib.raw import RawWriter
from qcowlib.runtime import SyncRuntime

TYPE_CHECKING = False
if TYPE_CHECKING:
    import io
    from types import TracebackType
    from typing import Literal

    from _typeshed import ReadableBuffer, WriteableBuffer

    from qcowlib.chain import Layer
    from qcowlib.driver import Bitmap, ExtentKind
    from qcowlib.info import ImageInfo
    from qcowlib.opening import Secrets, Source
    from qcowlib.qcow2.amend import AmendOptions
    from qcowlib.qcow2.bitmap_session import BitmapSession
    from qcowlib.qcow2.check import Report
    from qcowlib.qcow2.create import Preallocation
    from qcowlib.qcow2.write import Writer

    CacheMode = Literal["writeback", "none", "writethrough", "directsync", "unsafe"]

__all__ = ["Image", "OpenImage", "check_range", "open", "run_extents"]


_KINDS: dict[int, ExtentKind] = {
    HOLE: "hole",
    ZERO: "zero",
    DATA: "data",
    COMPRESSED: "compressed",
    SPARSE: "sparse",
}


def run_extents(runs: RunList) -> Iterator[Extent]:
    """Yield *runs* as extents."""
    for kind, guest, length, host, layer in runs:
        offset = None if host == NO_OFFSET or kind == COMPRESSED else host
        yield Extent(_KINDS[kind], guest, length, offset, layer, kind != HOLE)


def check_range(offset: int, length: int, size: int, path: str) -> None:
    """Raise OutOfRange unless *length* bytes from *offset* lie inside *size*."""
    if offset < 0 or length < 0 or offset + length > size:
        raise OutOfRange(f"range {offset}+{length} is outside the image of {size} bytes", path=path)


class OpenImage:
    """What every open image tells of itself, whoever runs its engine."""

    __slots__ = ("_chain", "_closed", "_map", "mode", "path")

    def __init__(self, chain: Chain, mode: str) -> None:
        self._chain = chain
        self._map = chain.map
        self._closed = False
        self.mode = mode
        self.path = chain.top.storage.name

    @property
    def size(self) -> int:
        """Guest bytes."""
        return self._chain.size

    @property
    def format(self) -> str:
        """``qcow2`` or ``raw``."""
        return self._chain.top.format

    @property
    def cluster_size(self) -> int | None:
        """Bytes per cluster; ``None`` for raw."""
        top = self._chain.top
        return top.cluster_size if isinstance(top, Qcow2Image) else None

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The chain, top first; each has ``format``, ``size``, ``storage`` and ``data``."""
        return tuple(self._chain.layers)

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("the image is closed", path=self.path)

    def _check_writable(self) -> None:
        self._check_open()
        if self.mode != "r+":
            raise ReadOnly("the image is open for reading", path=self.path)

    def __repr__(self) -> str:
        state = "closed" if self._closed else self.mode
        return f"<{type(self).__module__}.{type(self).__name__} {self.path!r} {self.format} {state}>"


class Image(OpenImage):
    """An open image; made by :func:`open`.  Offsets and lengths are guest bytes.

    Any number of threads may use it.  Every method raises UsageError once the
    image is closed; those that change it raise ReadOnly in mode ``"r"``.
    """

    __slots__ = ("_runtime",)

    def __init__(self, chain: Chain, runtime: SyncRuntime, mode: str) -> None:
        super().__init__(chain, mode)
        self._runtime = runtime

    # -- reading ---------------------------------------------------------------

    def pread(self, length: int, offset: int) -> bytes:
        """Return *length* bytes from *offset*, fewer at the end of the image, as ``os.pread``.

        Raises: OutOfRange for a negative number; CorruptImage, StorageError.
        """
        size = self._chain.size
        if self._closed or offset < 0 or length < 0:
            self._check_open()
            check_range(offset, length, size, self.path)
        if offset + length > size:
            length = max(size - offset, 0)
        data = self._map.read_bytes(length, offset)
        if data is None:
            buffer = bytearray(length)
            self._runtime.run(self._chain.read_into(offset, memoryview(buffer)))
            data = bytes(buffer)
        return data

    def preadinto(self, buffer: WriteableBuffer, offset: int) -> int:
        """Fill *buffer* from *offset*; returns the bytes read, fewer at the end.  Raises: as :meth:`pread`."""
        self._check_open()
        view = memoryview(buffer).cast("B")
        size = self._chain.size
        if offset < 0:
            check_range(offset, len(view), size, self.path)
        if offset + len(view) > size:
            view = view[: max(size - offset, 0)]
        if len(view) and not self._map.read_hit(view, offset):
            self._runtime.run(self._chain.read_into(offset, view))
        return len(view)

    def preadinto_many(self, buffer: WriteableBuffer, offsets: Iterable[int], length: int) -> int:
        """Read *length* bytes from each of *offsets* into *buffer*, one behind the other; returns the bytes read.

        One call for many small reads: threads run in parallel where single
        reads would wait for each other.  Each range must lie inside the image.
        Raises: OutOfRange, UsageError when the buffer is too small, and as :meth:`pread`.
        """
        from array import array

        self._check_open()
        view = memoryview(buffer).cast("B")
        size = self._chain.size
        places = array("Q")
        for offset in offsets:
            check_range(offset, length, size, self.path)
            places.append(offset)
        if len(places) * length > len(view):
            raise UsageError(f"{len(places)} reads of {length} bytes do not fit in {len(view)}", path=self.path)
        done = 0
        while done < len(places):
            done += self._map.read_many(view[done * length :], memoryview(places)[done:], length)
            if done < len(places):
                self._runtime.run(self._chain.read_into(places[done], view[done * length : (done + 1) * length]))
                done += 1
        return len(places) * length

    def file(self) -> io.RawIOBase:
        """Return a seekable file object over the guest bytes; closing it leaves the image open."""
        from qcowlib.fileview import FileView

        self._check_open()
        return FileView(self)

    # -- mapping ---------------------------------------------------------------

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """Yield the extents that cover the range, in order, looking up as it goes.

        Neighbours that continue each other are one extent.
        """
        size = self._chain.size
        end = size if length is None else offset + length
        check_range(offset, end - offset, size, self.path)
        last: Extent | None = None
        while offset < end:
            runs = self.map(offset, end - offset)
            for extent in run_extents(runs):
                if last is not None and _continues(last, extent):
                    last = last._replace(length=last.length + extent.length)
                    continue
                if last is not None:
                    yield last
                last = extent
            offset = runs.end
        if last is not None:
            yield last

    def map(self, offset: int, length: int, *, holes: bool = True) -> RunList:
        """Return the runs from *offset* on, through the chain; may cover less than *length*.

        Each is ``(kind, guest offset, length, host offset, layer)`` with the
        kinds of :mod:`qcowlib.driver`.  Without *holes* no file system is asked, as for reading.
        """
        self._check_open()
        check_range(offset, length, self._chain.size, self.path)
        return self._runtime.run((self._chain.map_range if holes else self._chain.resolve)(offset, length))

    def read_runs(self, runs: RunList, buffer: WriteableBuffer, base: int) -> None:
        """Read what :meth:`map` answered; *base* is the guest offset of the buffer's first byte.

        Only while nobody writes to the image: the runs are as old as the map.
        """
        self._check_open()
        self._chain.read_runs(runs, memoryview(buffer).cast("B"), base)

    # -- writing ---------------------------------------------------------------

    def pwrite(self, data: ReadableBuffer, offset: int) -> int:
        """Write all of *data* at *offset*; returns its length.

        Durable after the next :meth:`flush`.  Raises: OutOfRange past the
        end (nothing is written), ReadOnly, StorageError.
        """
        self._check_writable()
        view = memoryview(data).cast("B")
        check_range(offset, len(view), self._chain.size, self.path)
        if len(view) and not self._map.write_hit(view, offset):
            self._runtime.run(self._chain.write(offset, view))
        return len(view)

    def pwrite_many(self, pieces: Iterable[tuple[int, ReadableBuffer]]) -> int:
        """Write each ``(offset, data)``, in ascending order without overlap; returns the bytes written.

        As many calls of :meth:`pwrite`, but new space for scattered clusters is
        taken and written together.  Raises: UsageError for another order,
        OutOfRange (nothing is written), and as :meth:`pwrite`.
        """
        self._check_writable()
        size, end, checked = self._chain.size, 0, []
        for offset, data in pieces:
            view = memoryview(data).cast("B")
            check_range(offset, len(view), size, self.path)
            if offset < end:
                raise UsageError("the pieces must ascend without overlap", path=self.path)
            end = offset + len(view)
            if len(view):
                checked.append((offset, view))
        self._runtime.run(self._chain.writer.write_many(checked))
        return sum(len(view) for _, view in checked)

    def write_compressed(self, data: ReadableBuffer, offset: int) -> None:
        """Store one whole guest cluster compressed, where nothing is allocated yet.

        What does not get smaller is stored plain.  Raises: UsageError for any
        other range and for raw; UnsupportedFeature, StorageError.
        """
        self._check_writable()
        self._runtime.run(self._chain.write_compressed(offset, memoryview(data).cast("B")))

    def zero(self, length: int, offset: int, *, unmap: bool = True) -> None:
        """Make the range read as zeros, whatever the backing files hold.

        With *unmap* space is given back; without, clusters keep their space.
        Raises: OutOfRange, StorageError.
        """
        self._check_writable()
        check_range(offset, length, self._chain.size, self.path)
        if length:
            self._runtime.run(self._chain.zero(offset, length, unmap=unmap))

    def discard(self, length: int, offset: int) -> None:
        """Give whole clusters inside the range back; they read as zeros afterwards.

        A version 2 image with a backing file keeps them, as qemu does.
        Raises: OutOfRange, StorageError.
        """
        self._check_writable()
        check_range(offset, length, self._chain.size, self.path)
        if length:
            self._runtime.run(self._chain.discard(offset, length))

    def resize(
        self, size: int, *, preallocation: Preallocation = "off", shrink: bool = False, sparse: bool = True
    ) -> None:
        """Change the virtual size; new bytes read as zeros.  Losing bytes needs *shrink*.

        Over a longer backing file zeros are stored where it would show through;
        without *sparse* for all new bytes, as qemu-img does.
        Raises: UsageError with qemu's words, StorageError.
        """
        self._check_writable()
        self._runtime.run(self._chain.resize(size, preallocation=preallocation, shrink=shrink, sparse=sparse))

    def empty(self) -> None:
        """Forget all that the top layer holds; only right where the backing file has the same content.

        Raises: UsageError without a backing file, ReadOnly, StorageError.
        """
        from qcowlib.qcow2.empty import empty

        self._check_writable()
        writer = self._chain.writer
        if isinstance(writer, RawWriter):
            raise UsageError("Image does not have a backing file", path=self.path)
        self._runtime.run(empty(writer))

    def flush(self) -> None:
        """Return when everything written before is durable.  Raises: StorageError; nothing is promised then."""
        self._check_open()
        if self.mode == "r+":
            self._runtime.run(self._chain.flush())

    def amend(
        self, options: AmendOptions, progress: Callable[[int, int], object] | None = None, *, like_qemu: bool = False
    ) -> None:
        """Change creation options (:class:`~qcowlib.qcow2.amend.AmendOptions`); durable when this returns.

        *progress* is called with ``(done, total)`` and must not use the image.
        With *like_qemu* a downgrade that cannot be is refused after the other
        changes were made, and a new size is made as by ``resize(sparse=False)``.
        Raises: UsageError with qemu's words, UnsupportedFeature for raw, SecretError, StorageError.
        """
        self._check_writable()
        self._runtime.run(self._chain.amend(options, progress, like_qemu=like_qemu))

    # -- persistent dirty bitmaps ----------------------------------------------

    def bitmaps(self) -> list[Bitmap]:
        """Return the persistent bitmaps in the order of the directory; empty for raw."""
        self._check_open()
        return self._runtime.run(self._chain.bitmaps())

    def bitmap_extents(self, name: str, offset: int = 0) -> Iterator[tuple[int, int]]:
        """Yield ``(offset, length)`` of the guest ranges that bitmap *name* has recorded, in order, lazily.

        What lies before guest *offset* may be left out.  Lengths are whole bits, cut at
        the end of the image.  Not while bitmaps are being changed.
        Raises: UsageError for an unknown or inconsistent one.
        """
        self._check_open()
        check_range(offset, 0, self._chain.size, self.path)
        return self._runtime.run(self._chain.bitmap_ranges(name, offset))

    def add_bitmap(self, name: str, granularity: int | None = None, *, disabled: bool = False) -> None:
        """Make an empty bitmap; durable when this returns, as all changes of bitmaps are.

        *granularity*: guest bytes a bit, a power of two from 512 to 2 GiB
        (default: the cluster size, at least 4 KiB and at most 64 KiB).
        Raises: UsageError for a name that is there or longer than 1023 bytes, a
        wrong granularity, a version 2 image; UnsupportedFeature for raw.
        """
        self._runtime.run(self._bitmaps().add(name, granularity, disabled=disabled))

    def remove_bitmap(self, name: str) -> None:
        """Delete a bitmap; all that can be done to an inconsistent one.  Raises: UsageError for an unknown one."""
        self._runtime.run(self._bitmaps().remove(name))

    def clear_bitmap(self, *names: str) -> None:
        """Forget what bitmaps recorded, all at one point.  Raises: UsageError for an unknown or inconsistent one."""
        self._runtime.run(self._bitmaps().clear(*names))

    def replace_bitmap(self, name: str, by: str) -> None:
        """Delete bitmap *name* and give its name to bitmap *by*; a cut leaves both or the one.

        Raises: UsageError for an unknown bitmap, or where *by* is inconsistent; StorageError.
        """
        self._runtime.run(self._bitmaps().replace(name, by))

    def enable_bitmap(self, name: str) -> None:
        """Record changes in a bitmap from now on.  Raises: as :meth:`clear_bitmap`."""
        self._runtime.run(self._bitmaps().enable(name, True))

    def disable_bitmap(self, name: str) -> None:
        """Stop recording changes in a bitmap; what it holds stays.  Raises: as :meth:`clear_bitmap`."""
        self._runtime.run(self._bitmaps().enable(name, False))

    def merge_bitmap(self, target: str, source: str, source_image: Image | None = None) -> None:
        """Set in *target* all that is set in *source*, of this image or another of the same size.

        Granularities may differ.  Raises: as :meth:`clear_bitmap`.
        """
        other = None
        if source_image is not None and source_image is not self:
            other = (source_image.size, source_image.bitmap_extents(source))
        self._runtime.run(self._bitmaps().merge_from(target, source, other))

    def record_bitmap(self, name: str, ranges: Iterable[tuple[int, int]]) -> None:
        """Set the guest *ranges*, each ``(offset, length)``, inside the image.  Raises: as :meth:`clear_bitmap`."""
        size = self.size
        inside = ((offset, min(length, size - offset)) for offset, length in ranges if offset < size)
        self._runtime.run(self._bitmaps().merge_from(name, name, (size, inside)))

    def copy_bitmaps(self, source: Image, *, skip_broken: bool = False) -> list[str]:
        """Add all bitmaps of *source*, with contents, granularity and enabled state, by one change.

        Returns the names of inconsistent ones, which *skip_broken* leaves out;
        without it they raise UsageError and nothing is changed.
        """
        contents = [
            (bitmap, iter(()) if bitmap.inconsistent else source.bitmap_extents(bitmap.name))
            for bitmap in source.bitmaps()
        ]
        return self._runtime.run(self._bitmaps().add_filled(contents, skip_broken=skip_broken))

    def _bitmaps(self) -> BitmapSession:
        self._check_writable()
        return self._chain.bitmap_session()

    # -- judging ---------------------------------------------------------------

    def info(self) -> ImageInfo:
        """Return what the image says about itself; opens nothing else."""
        from qcowlib.info import image_info

        self._check_open()
        top = self._chain.top
        return image_info(top.storage, top.header if isinstance(top, Qcow2Image) else None)

    def check(self, *, repair: Literal["leaks", "all"] | None = None) -> Report:
        """Check the metadata of the top layer; *repair* mends leaks, or all that can be mended.

        Writes that are not flushed are flushed first.  Raises
        UnsupportedFeature for raw, ReadOnly for a repair of an image opened
        for reading.
        """
        from qcowlib.qcow2.inplace import check_open

        top = self._chain.top
        self._check_open()
        if not isinstance(top, Qcow2Image):
            raise UnsupportedFeature("This image format does not support checks", path=self.path)
        if repair is not None:
            self._check_writable()
        writer = self._chain.writer
        if isinstance(writer, RawWriter):
            raise UnsupportedFeature("This image format does not support checks", path=self.path)
        return self._runtime.run(check_open(top, writer, repair))

    # -- internal snapshots ----------------------------------------------------

    def snapshots(self) -> list[Snapshot]:
        """Return the internal snapshots, oldest first; empty for raw."""
        self._check_open()
        top = self._chain.top
        return list(map(Snapshot.of, read_snapshots(top.storage, top.header))) if isinstance(top, Qcow2Image) else []

    def create_snapshot(self, name: str, *, as_qemu: bool = False) -> Snapshot:
        """Take an internal snapshot of what the guest sees now; durable when this returns.

        A refused one changes nothing; with *as_qemu* one for which refcounts
        are too narrow leaks its L1 table, as qemu-img's does.  Raises: UsageError
        with 65536 snapshots; UnsupportedFeature for raw or with an external data
        file; StorageError.
        """
        from qcowlib.qcow2.snapshot import create_snapshot

        return Snapshot.of(self._runtime.run(create_snapshot(self._snapshot_writer(), name, as_qemu=as_qemu)))

    def apply_snapshot(self, wanted: str) -> None:
        """Go back to a snapshot (id, else name), its size too.  The snapshot stays.

        Raises: UsageError for an unknown one; UnsupportedFeature, StorageError.
        """
        from qcowlib.qcow2.snapshot import apply_snapshot

        self._runtime.run(apply_snapshot(self._snapshot_writer(), wanted, self._chain.refresh))

    def delete_snapshot(self, wanted: str, *, by_id: bool = True) -> None:
        """Delete a snapshot (id unless *by_id* is false, else the first of that name).

        Raises: as :meth:`apply_snapshot`.
        """
        from qcowlib.qcow2.snapshot import delete_snapshot

        self._runtime.run(delete_snapshot(self._snapshot_writer(), wanted, by_id=by_id))

    def _snapshot_writer(self) -> Writer:
        self._check_writable()
        writer = self._chain.writer
        if isinstance(writer, RawWriter):
            raise UnsupportedFeature("raw images have no snapshots", path=self.path)
        return writer

    # -- ending ----------------------------------------------------------------

    def close(self) -> None:
        """Make everything durable and close every file.

        A second call does nothing.  Raises: StorageError; the files are closed then too.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if self.mode == "r+":
                self._runtime.run(self._chain.top.finish())
        finally:
            self._chain.close()

    def __enter__(self) -> Image:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _continues(last: Extent, extent: Extent) -> bool:
    if last.kind != extent.kind or last.depth != extent.depth or last.present != extent.present:
        return False
    if last.offset is None or extent.offset is None:
        return last.offset is extent.offset
    return extent.offset == last.offset + last.length


def open(
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
    """Open an image: a file name, a descriptor, a storage, or (reading) an object with ``pread`` or ``readinto``.

    A descriptor stays the caller's; a storage is closed with the image.  *mode*
    is ``"r"`` or ``"r+"``.  *format* is ``qcow2`` or ``raw``; without it the first bytes decide for
    this image, never for its bases.  *snapshot* (id or name) reads an internal
    snapshot.  *references* is the policy for files that the image names
    (:mod:`qcowlib.gate`).  *backing* false opens the top layer alone.
    *secret* unlocks an encrypted image: a passphrase, or a mapping from file
    names to passphrases where several layers need one.  *force_share* reads although
    somebody writes; *lock* false takes no locks at all.

    *cache* as qemu's: ``none`` and ``directsync`` go past the page cache,
    ``writethrough`` and ``directsync`` make each write durable before it
    returns, ``unsafe`` ignores flushes.  *data_file* and *backing_format* stand
    in for what the header says; *discard* ``"ignore"`` keeps the space of what
    the guest discards.

    Raises: UsageError, FormatError, UnsupportedFeature, GateDenied, Busy, SecretError,
    StorageError.
    """
    if mode not in ("r", "r+"):
        raise UsageError(f"mode {mode!r} is neither 'r' nor 'r+'")
    runtime = SyncRuntime()
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
    return Image(open_chain(runtime, path, options), runtime, mode)
