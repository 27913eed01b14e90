# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Changing creation options of an open image.

Everything is checked first; then, in qemu's order: upgrade, key slots,
refcount width, data file, lazy refcounts, size, downgrade.  Each step is
complete on storage before the next, and right at every cut:

============== ===========================================================
upgrade        snapshot table with the longer entries at a new place; header
keys           the writes of :mod:`qcowlib.luks`, each durable before the next
refcount width :mod:`.refcount_width`
flags, name    one write of the header, or :mod:`.header_update`
size           :mod:`.resize`
downgrade      bitmaps deleted, zero clusters gone (:mod:`.expand_zeros`); header
============== ===========================================================

Invariants: I5; I7, a snapshot shows the same before and after; a step that
fails leaves the image as a valid one, with the earlier steps done.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

from qcowlib.driver import DATA
from qcowlib.errors import UsageError, printable
from qcowlib.ondisk import (
    AUTOCLEAR_RAW_DATA,
    COMPAT_LAZY_REFCOUNTS,
    COMPRESSION_ZLIB,
    CRYPT_LUKS,
    CRYPT_NONE,
    INCOMPAT_COMPRESSION,
    INCOMPAT_DIRTY,
    pack_snapshots,
    snapshot_table_size,
)
from qcowlib.qcow2.bitmap_session import session_of
from qcowlib.qcow2.directories import read_snapshots
from qcowlib.qcow2.expand_zeros import expand_zeros, has_compressed
from qcowlib.qcow2.ordering import PREPARE
from qcowlib.qcow2.refcount_width import change_refcount_width
from qcowlib.qcow2.resize import resize
from qcowlib.units import SECTOR, MiB, ceil_div, round_up

if TYPE_CHECKING:
    from qcowlib.luks import KeyChange
    from qcowlib.ondisk import Header
    from qcowlib.qcow2.image import Qcow2Image
    from qcowlib.qcow2.write import Writer

__all__ = ["AmendOptions", "amend"]

_VERSIONS: Final = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
_COMPATIBLE_FIELD = (80, 88)
_AUTOCLEAR_FIELD = (88, 96)
_MAX_LUKS_AREA = 16 * MiB

Report = Callable[[int, int], object]


class AmendOptions(NamedTuple):
    """What is to change, named and meant as qemu-img's ``-o``; ``None`` leaves it.

    ``backing_file`` and ``backing_format`` are only compared.  An empty
    ``data_file`` removes the name.
    """

    compat: str | None = None
    size: int | None = None
    backing_file: str | None = None
    backing_format: str | None = None
    lazy_refcounts: bool | None = None
    refcount_bits: int | None = None
    data_file: str | None = None
    data_file_raw: bool | None = None
    encrypt: KeyChange | None = None


async def amend(
    writer: Writer,
    options: AmendOptions,
    *,
    backing_size: int,
    refresh: Callable[[], None],
    progress: Report | None = None,
    like_qemu: bool = False,
) -> None:
    """Carry out *options*; *backing_size* and *refresh* as for :func:`~qcowlib.qcow2.resize.resize`.

    *progress* gets ``(done, total)``, in units that only mean something to each
    other, while the engine is locked.  With *like_qemu* a downgrade is refused
    only when its turn comes.
    Raises: UsageError with qemu's words, before anything is changed but for
    what only the work itself can find; SecretError; StorageError.
    """
    image = writer.image
    header = image.header
    wanted = _Wanted.of(header, options, image.storage.name)
    wanted.check(header, options)
    if options.size is not None and options.size % SECTOR:
        raise UsageError("The new size must be a multiple of 512", path=image.storage.name)
    if wanted.version < 3 and not like_qemu:
        await _check_downgrade(image, options, wanted)
    changes = (wanted.version != header.version, wanted.order != header.refcount_order, options.encrypt is not None)
    report = _Progress(progress, sum(changes))
    if wanted.version > header.version:
        await _upgrade(writer, report.operation())
    if options.encrypt is not None:
        await _change_keys(image, options.encrypt)
    if wanted.order != header.refcount_order:
        async with _quiet(writer):
            await change_refcount_width(image, wanted.order, report.operation())
    await _change_header(writer, options, wanted.lazy)
    if options.size is not None and options.size != header.size:
        sparse = not like_qemu
        await resize(writer, options.size, backing_size=backing_size, refresh=refresh, shrink=True, sparse=sparse)
    if wanted.version < header.version:
        if like_qemu:
            await _check_downgrade(image, options, wanted)
        await _downgrade(writer, report.operation())


class _Wanted(NamedTuple):
    """What the header is to say at the end."""

    version: int
    order: int
    lazy: bool
    path: str

    @classmethod
    def of(cls, header: Header, options: AmendOptions, path: str) -> _Wanted:
        version = header.version
        if options.compat is not None:
            if options.compat not in _VERSIONS:
                raise UsageError(f"Unknown compatibility level {printable(options.compat)}", path=path)
            version = _VERSIONS[options.compat]
        bits = header.refcount_bits if options.refcount_bits is None else options.refcount_bits
        if bits <= 0 or bits > 64 or bits & (bits - 1):
            raise UsageError("Refcount width must be a power of two and may not exceed 64 bits", path=path)
        lazy = header.lazy_refcounts if options.lazy_refcounts is None else options.lazy_refcounts
        return cls(version, bits.bit_length() - 1, lazy, path)

    def check(self, header: Header, options: AmendOptions) -> None:
        """Raise UsageError for what the image cannot be."""
        level = "(use compat=1.1 or greater)"
        rules = (
            (
                options.encrypt is not None and header.crypt_method == CRYPT_NONE,
                "Can't amend encryption options - encryption not present",
            ),
            (
                options.encrypt is not None and header.crypt_method not in (CRYPT_NONE, CRYPT_LUKS),
                "Only LUKS encryption options can be amended",
            ),
            (
                options.data_file is not None and not header.has_data_file,
                "data-file can only be set for images that use an external data file",
            ),
            (
                bool(options.data_file_raw) and not header.data_file_raw,
                "data-file-raw cannot be set on existing images",
            ),
            (
                self.version < 3 and self.order != 4 and self.order != header.refcount_order,
                f"Refcount widths other than 16 bits require compatibility level 1.1 or above {level}",
            ),
            (
                self.version < 3 and self.lazy and not header.lazy_refcounts,
                f"Lazy refcounts only supported with compatibility level 1.1 and above {level}",
            ),
        )
        for broken, message in rules:
            if broken:
                raise UsageError(message, path=self.path)
        self._check_backing(header, options)
        if options.encrypt is not None:
            options.encrypt.check()

    def _check_backing(self, header: Header, options: AmendOptions) -> None:
        if options.backing_file is None and options.backing_format is None:
            return
        given = [
            None if name is None else name.encode(errors="surrogateescape")
            for name in (options.backing_file, options.backing_format)
        ]
        if given != [header.backing_file, header.backing_format]:
            raise UsageError(
                "Cannot amend the backing file", path=self.path, hint="You can use 'qemu-img rebase' instead."
            )


class _Progress:
    """Joins the reports of several operations to one, as qemu projects what is to come."""

    def __init__(self, report: Report | None, operations: int) -> None:
        self._report = report
        self._operations = operations
        self._begun = 0
        self._before = self._last = 0

    def operation(self) -> Report:
        """The next operation begins; it reports to what is returned."""
        self._begun += 1
        self._before += self._last
        self._last = 0
        return self._add

    def _add(self, done: int, total: int) -> None:
        self._last = total
        so_far = self._before + total
        projected = so_far * (self._operations - self._begun) // self._begun
        if self._report is not None:
            self._report(self._before + done, so_far + projected)


@asynccontextmanager
async def _quiet(writer: Writer) -> AsyncIterator[None]:
    """Everything committed, counts too, and nobody writing."""
    image = writer.image
    await image.start_writing()
    await writer.quiesce()
    try:
        await image.changing.commit(final=True)
        await image.changing.commit(final=True)
        if image.changing.mend is not None:
            await image.changing.mend()
        yield
    finally:
        writer.resume()


async def _switch(image: Qcow2Image, change: Callable[[Header], None]) -> None:
    """Replace the header by what *change* makes of it."""
    header = image.header
    old = header.copy()
    change(header)
    try:
        await image.changing.replace_header()
    except BaseException:
        for name in header.__slots__:
            setattr(header, name, getattr(old, name))
        raise


# -- version -------------------------------------------------------------------


async def _upgrade(writer: Writer, report: Report) -> None:
    image = writer.image
    header = image.header
    report(0, 2)
    async with _quiet(writer):
        entries = await image.runtime.io(read_snapshots, image.storage, header)
        old, place = header.snapshots_offset, header.snapshots_offset
        length = round_up(snapshot_table_size(entries), image.cluster_size)
        if any(entry.disk_size is None for entry in entries):
            data = pack_snapshots(entries, header.size)
            clusters = ceil_div(len(data), image.cluster_size)
            place, _, _ = await image.allocation.clusters(clusters, contiguous=True)
            image.changing.queue(PREPARE, place, data)
            await image.changing.commit(final=True)
        report(1, 2)

        def upgraded(header: Header) -> None:
            header.version = 3
            header.snapshots_offset = place
            header.incompatible_features = header.compatible_features = header.autoclear_features = 0
            header.compression_type, header.unknown_fields = COMPRESSION_ZLIB, b""
            # A stale directory of bitmaps would come to life: it is not ours to trust.
            header.bitmaps = None

        await _switch(image, upgraded)
        if place != old:
            image.changing.freed.add(DATA, old, length, old)
            await image.changing.commit(final=True)
            await image.changing.commit(final=True)
        await image.runtime.io(image.reload)
    report(2, 2)


async def _check_downgrade(image: Qcow2Image, options: AmendOptions, wanted: _Wanted) -> None:
    """Source: qemu's refusals, in its order."""
    header = image.header
    if header.version < 3:
        return
    path = image.storage.name
    if wanted.order != 4:
        raise UsageError("compat=0.10 requires refcount_bits=16", path=path)
    if header.has_data_file:
        raise UsageError("Cannot downgrade an image with a data file", path=path)
    size = header.size if options.size is None else options.size
    for entry in await image.runtime.io(read_snapshots, image.storage, header):
        if entry.vm_state_size > 0xFFFFFFFF or (entry.disk_size is not None and entry.disk_size != size):
            raise UsageError("Internal snapshots prevent downgrade of image", path=path)
    features = header.incompatible_features & ~(INCOMPAT_DIRTY | INCOMPAT_COMPRESSION)
    if features:
        raise UsageError(f"Cannot downgrade an image with incompatible features {features:#x} set", path=path)
    if header.incompatible_features & INCOMPAT_COMPRESSION and await has_compressed(image):
        raise UsageError(
            "Cannot downgrade an image with zstd compression type and existing compressed clusters", path=path
        )


async def _downgrade(writer: Writer, report: Report) -> None:
    image = writer.image
    await session_of(writer).remove_all()
    async with _quiet(writer):
        if image.changing.dirty_set:
            await image.changing.clear_dirty()
        await expand_zeros(image, image.header.backing_file is not None, report)

        def downgraded(header: Header) -> None:
            header.version = 2
            header.incompatible_features = header.compatible_features = header.autoclear_features = 0
            header.compression_type, header.unknown_fields = COMPRESSION_ZLIB, b""
            header.bitmaps = None

        await _switch(image, downgraded)
        await image.runtime.io(image.reload)


# -- header --------------------------------------------------------------------


async def _change_header(writer: Writer, options: AmendOptions, lazy: bool) -> None:
    image = writer.image
    header = image.header
    if options.data_file_raw is False and header.data_file_raw:
        async with _quiet(writer):
            header.autoclear_features &= ~AUTOCLEAR_RAW_DATA
            await image.changing.write_fields(*_AUTOCLEAR_FIELD)
    if options.data_file is not None:
        name = options.data_file.encode(errors="surrogateescape") or None
        async with _quiet(writer):
            await _switch(image, lambda header: setattr(header, "data_file_name", name))
    if lazy != header.lazy_refcounts:
        async with _quiet(writer):
            changing = image.changing
            if changing.dirty_set:
                await changing.clear_dirty()
            header.compatible_features ^= COMPAT_LAZY_REFCOUNTS
            await changing.write_fields(*_COMPATIBLE_FIELD)
            changing.lazy = lazy


# -- keys ----------------------------------------------------------------------


async def _change_keys(image: Qcow2Image, change: KeyChange) -> None:
    """Write the key slots; the engine's own key stays what it is."""
    from qcowlib.luks import LuksHeader

    pointer = image.header.crypto
    await image.start_writing()
    if pointer is None or pointer.length > _MAX_LUKS_AREA:
        raise UsageError("Can't amend encryption options - encryption not present", path=image.storage.name)
    area = bytearray(pointer.length)
    await image.runtime.io(image.storage.read_into, pointer.offset, [area])
    header = LuksHeader.parse(area)
    writes = header.change(area, change)
    for offset, data in writes:
        await image.runtime.io(image.storage.write, pointer.offset + offset, [data])
        await image.changing.barrier()
