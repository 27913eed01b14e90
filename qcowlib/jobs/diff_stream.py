# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The stream of a difference: what :func:`write_diff` writes and :func:`apply` takes, from a pipe too.

Big-endian, one pass, nothing in it points anywhere::

    header  48  "QCOWDIFF", u32 version 1, u32 length 48, u64 size of the new side, u64 size of the old side,
                u32 unit, u32 flags (0), u32 0, u32 CRC-32 of the 44 bytes before
    record  40  u32 kind ("DATA", "ZERO", "ENDS"), u32 flags (1: the old CRC counts), u64 offset, u64 length,
                u32 CRC-32 of the old bytes, u32 CRC-32 of the new bytes, u32 0, u32 CRC-32 of the 36 bytes before
                behind DATA: length bytes; a record with data or an old CRC is 1 MiB at most
                behind ENDS (offset: number of records, length: bytes of DATA): the BLAKE2b-256 of all before

Records ascend and do not overlap.

Invariants: nothing of a record is written before its checksums were right; a
record is refused unless the target holds the old bytes or already the new
ones, so a stream is applied to what it began from and to nothing else.  A
journal beside the target (``.apply``), durable before the first change, tells
that this stream was begun; only then may a range hold a mixture, which a cut
left, and the same stream makes it whole.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from qcowlib.errors import CorruptImage, UsageError
from qcowlib.gate import References, qemu_like
from qcowlib.image import Image
from qcowlib.image import open as open_image
from qcowlib.jobs.creation import create
from qcowlib.jobs.diff import DEFAULT_UNIT, PIECE, Unit, open_sides, walk
from qcowlib.jobs.journal import read_journal, remove_journal, write_journal
from qcowlib.jobs.pipeline import DEFAULT_MEMORY, Control

if TYPE_CHECKING:
    from qcowlib.image import CacheMode
    from qcowlib.opening import Source as OpenSource

    class Output(Protocol):
        """Where a stream goes: a binary file or pipe."""

        def write(self, data: memoryview | bytes, /) -> object: ...

    class Input(Protocol):
        """Where a stream comes from."""

        def read(self, size: int, /) -> bytes | None: ...


__all__ = ["Applied", "apply", "read_diff", "write_diff"]

_MAGIC: Final = b"QCOWDIFF"
_VERSION: Final = 1
_HEADER: Final = Struct(">8sIIQQIIII")
_RECORD: Final = Struct(">4sIQQIIII")
_DIGEST: Final = 32
_HAS_OLD: Final = 1
_MAX_SIZE: Final = 1 << 63


class Applied(NamedTuple):
    """What a stream changed: records, guest bytes written, guest bytes that became zeros."""

    records: int
    data: int
    zeros: int


# -- writing -------------------------------------------------------------------


class _Writer:
    def __init__(self, output: Output) -> None:
        self._output = output
        self._digest = hashlib.blake2b(digest_size=_DIGEST)
        self.records = 0
        self.data = 0

    def _put(self, data: memoryview | bytes) -> None:
        self._digest.update(data)
        view = memoryview(data)
        while view:
            # A raw file may take less than it was given; None is a pipe that would block.
            done = self._output.write(view)
            view = view[done if isinstance(done, int) else len(view) :]

    def header(self, new_size: int, old_size: int, unit: int) -> None:
        head = _HEADER.pack(_MAGIC, _VERSION, _HEADER.size, new_size, old_size, unit, 0, 0, 0)[:-4]
        self._put(head + zlib.crc32(head).to_bytes(4, "big"))

    def _record(self, kind: bytes, flags: int, offset: int, length: int, old: int, new: int) -> None:
        head = _RECORD.pack(kind, flags, offset, length, old, new, 0, 0)[:-4]
        self._put(head + zlib.crc32(head).to_bytes(4, "big"))

    def unit(self, unit: Unit) -> None:
        self.records += 1
        flags, old = (0, 0) if unit.old_crc is None else (_HAS_OLD, unit.old_crc)
        if unit.data is None:
            self._record(b"ZERO", flags, unit.start, unit.length, old, 0)
            return
        self.data += unit.length
        self._record(b"DATA", flags, unit.start, unit.length, old, zlib.crc32(unit.data))
        self._put(unit.data)

    def end(self) -> None:
        self._record(b"ENDS", 0, self.records, self.data, 0, 0)
        self._put(self._digest.digest())


def write_diff(
    old: OpenSource | Image | None,
    new: OpenSource | Image,
    output: Output,
    *,
    old_format: str | None = None,
    new_format: str | None = None,
    old_snapshot: str | None = None,
    new_snapshot: str | None = None,
    bitmap: str | None = None,
    exact: bool = True,
    unit: int = DEFAULT_UNIT,
    references: References = qemu_like,
    cache: CacheMode = "writeback",
    force_share: bool = False,
    secret: str | bytes | None = None,
    progress: Callable[[int, int], object] | None = None,
    cancel: Callable[[], bool] | None = None,
    rate: int | None = None,
    workers: int | None = None,
    memory: int = DEFAULT_MEMORY,
) -> Applied:
    """Write the difference of :func:`~qcowlib.jobs.diff.diff` to *output*, a binary file or pipe; returns its amount.

    With *exact* records carry a checksum of the old bytes too, which
    :func:`apply` demands of its target.  The caller keeps *output*.
    Raises: as :func:`~qcowlib.jobs.diff.diff`, and what *output* raises.
    """
    control = Control(progress=progress, cancel=cancel, rate=rate, workers=workers, memory=memory)
    writer = _Writer(output)
    zeros = 0

    def take(piece: Unit) -> None:
        nonlocal zeros
        zeros += piece.length if piece.data is None else 0
        writer.unit(piece)

    with ExitStack() as stack:
        sides = open_sides(
            stack,
            old,
            new,
            formats=(old_format, new_format),
            snapshots=(old_snapshot, new_snapshot),
            bitmap=bitmap,
            exact=exact,
            unit=unit,
            references=references,
            cache=cache,
            force_share=force_share,
            secret=secret,
        )
        writer.header(sides.new.size, sides.old_size, unit)
        walk(sides, take, control, data=True)
    writer.end()
    control.end()
    return Applied(writer.records, writer.data, zeros)


# -- applying ------------------------------------------------------------------


class _Header(NamedTuple):
    new_size: int
    old_size: int


class _Record(NamedTuple):
    kind: bytes
    offset: int
    length: int
    old_crc: int | None
    data: bytes


class _Reader:
    """Takes a stream apart; whatever is wrong with it is CorruptImage."""

    def __init__(self, source: Input, name: str) -> None:
        self._source = source
        self._name = name
        self._digest = hashlib.blake2b(digest_size=_DIGEST)
        self._records = 0
        self._data = 0
        self._end = 0
        self._size = 0

    def wrong(self, what: str) -> CorruptImage:
        return CorruptImage(f"the stream {what} after {self._records} records", path=self._name)

    def _take(self, count: int) -> bytes:
        parts = []
        while count:
            part = self._source.read(count)
            if not part:
                raise self.wrong("is cut off")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def header(self) -> _Header:
        raw = self._take(_HEADER.size)
        self._digest.update(raw)
        magic, version, length, new_size, old_size, _, flags, _, crc = _HEADER.unpack(raw)
        if magic != _MAGIC:
            raise CorruptImage("this is no stream of a difference", path=self._name)
        if crc != zlib.crc32(raw[:-4]):
            raise self.wrong("has a damaged header")
        if version != _VERSION or length != _HEADER.size or flags:
            raise CorruptImage(f"the stream has version {version}, which is not known", path=self._name)
        if new_size >= _MAX_SIZE or old_size >= _MAX_SIZE:
            raise self.wrong("names a size that no image has")
        self._size = new_size
        return _Header(new_size, old_size)

    def next(self) -> _Record | None:
        """Return the next record; ``None`` behind the last, whose digest was right."""
        raw = self._take(_RECORD.size)
        kind, flags, offset, length, old, new, _, crc = _RECORD.unpack(raw)
        if crc != zlib.crc32(raw[:-4]):
            raise self.wrong("is damaged")
        self._digest.update(raw)
        if kind == b"ENDS":
            self._end_record(offset, length)
            return None
        if kind not in (b"DATA", b"ZERO") or flags & ~_HAS_OLD:
            raise self.wrong("holds a record that is not known")
        limit = PIECE if kind == b"DATA" or flags & _HAS_OLD else self._size
        if offset < self._end or not 0 < length <= min(limit, self._size - offset):
            raise self.wrong("holds a record outside of its order or of the image")
        data = b""
        if kind == b"DATA":
            data = self._take(length)
            if zlib.crc32(data) != new:
                raise self.wrong("is damaged")
            self._digest.update(data)
            self._data += length
        self._records += 1
        self._end = offset + length
        return _Record(kind, offset, length, old if flags & _HAS_OLD else None, data)

    @property
    def identity(self) -> str:
        """What tells this stream from others: the digest of all that was taken."""
        return self._digest.hexdigest()

    def _end_record(self, records: int, data: int) -> None:
        digest = self._digest.digest()
        if (records, data) != (self._records, self._data) or self._take(_DIGEST) != digest:
            raise self.wrong("has a wrong sum")


def read_diff(stream: Input) -> Applied:
    """Check *stream* to its end and return what is in it.  Raises: CorruptImage."""
    reader = _Reader(stream, _name_of(stream))
    reader.header()
    records = data = zeros = 0
    while (record := reader.next()) is not None:
        records += 1
        data += len(record.data)
        zeros += 0 if record.data else record.length
    return Applied(records, data, zeros)


def _name_of(stream: Input) -> str:
    name = getattr(stream, "name", None)
    return name if isinstance(name, str) else "stream"


def apply(
    stream: Input,
    target: str | os.PathLike[str] | Image,
    *,
    format: str | None = None,
    overlay: str | os.PathLike[str] | None = None,
    check: bool = True,
    references: References = qemu_like,
    cache: CacheMode = "writeback",
    secret: str | bytes | None = None,
    progress: Callable[[int, int], object] | None = None,
    cancel: Callable[[], bool] | None = None,
    rate: int | None = None,
) -> Applied:
    """Make the changes of *stream*, a binary file or pipe, in *target*, which gets the size of the new side.

    With *overlay* they go to a new overlay of that name over *target* (of
    *format*, which must be given then), all or none.  *check* demands of each
    record with a checksum of the old bytes that the target holds them, or the
    new ones already.  *progress* counts guest bytes.

    Cut off, the changes up to there are made; the same stream once more makes
    the rest.  Raises: CorruptImage for a stream that is damaged or was begun
    from something else; UsageError; Cancelled; any error of opening; StorageError.
    """
    control = Control(progress=progress, cancel=cancel, rate=rate)
    reader = _Reader(stream, _name_of(stream))
    header = reader.header()
    with ExitStack() as stack:
        if overlay is not None:
            return _apply_overlay(reader, header, target, format, overlay, check, references, cache, secret, control)
        if not isinstance(target, Image):
            opened = open_image(target, "r+", format=format, references=references, cache=cache, secret=secret)
            target = stack.enter_context(opened)
        return _Apply(reader, header, target, check, control).run()


def _apply_overlay(
    reader: _Reader,
    header: _Header,
    target: str | os.PathLike[str] | Image,
    format: str | None,
    overlay: str | os.PathLike[str],
    check: bool,
    references: References,
    cache: CacheMode,
    secret: str | bytes | None,
    control: Control,
) -> Applied:
    if isinstance(target, Image) or format is None:
        raise UsageError("an overlay needs the name and the format of what it stands on")
    path = os.fspath(overlay)
    if os.path.lexists(path):
        raise UsageError("the file exists already", path=path)
    create(path, header.old_size, backing=os.fspath(target), backing_format=format, references=references, cache=cache)
    try:
        with open_image(path, "r+", format="qcow2", references=references, cache=cache, secret=secret) as image:
            return _Apply(reader, header, image, check, control).run()
    except BaseException:
        os.unlink(path)  # noqa: PTH108
        raise


class _Apply:
    """One run of :func:`apply` on an open image."""

    def __init__(self, reader: _Reader, header: _Header, image: Image, check: bool, control: Control) -> None:
        self.reader = reader
        self.header = header
        self.image = image
        self.check = check
        self.control = control
        self.buffer = memoryview(bytearray(PIECE))
        #: Beside a file only; a storage has no name that would be found again.
        self.journal = f"{image.path}.apply" if os.path.isfile(image.path) else None  # noqa: PTH113
        self.again = False

    def run(self) -> Applied:
        image, header, control = self.image, self.header, self.control
        if image.mode != "r+":
            raise UsageError("the image is open for reading", path=image.path)
        # The second run of a stream that was cut off finds the new size.
        if image.size not in (header.old_size, header.new_size):
            raise CorruptImage(
                f"the stream begins from an image of {header.old_size} bytes, this one has {image.size}",
                path=image.path,
            )
        if image.size < header.new_size:
            image.resize(header.new_size)
        control.begin(header.new_size)
        records = data = zeros = position = 0
        while (record := self.reader.next()) is not None:
            control.check()
            if not records:
                self._begin(self.reader.identity)
            if self.check and record.old_crc is not None and not self.again:
                self._check(record)
            if not records and not self.again and self.journal is not None:
                write_journal(self.journal, {"stream": self.reader.identity})
            if record.kind == b"DATA":
                image.pwrite(record.data, record.offset)
                data += record.length
            else:
                image.zero(record.length, record.offset)
                zeros += record.length
            records += 1
            control.add(record.offset + record.length - position)
            control.throttle(len(record.data))
            position = record.offset + record.length
            control.report()
        if image.size > header.new_size:
            image.resize(header.new_size, shrink=True)
        image.flush()
        if self.journal is not None and records:
            remove_journal(self.journal)
        control.end()
        return Applied(records, data, zeros)

    def _begin(self, identity: str) -> None:
        """Find out whether this stream was begun here before.  Raises: UsageError where another one was."""
        if self.journal is None:
            return
        found = read_journal(self.journal, "a stream")
        if found is not None and found.get("stream") != identity:
            raise UsageError(
                "another stream was begun here and is not whole",
                path=self.image.path,
                hint=f"Apply that one first, or remove {self.journal} to leave it as it is.",
            )
        self.again = found is not None

    def _check(self, record: _Record) -> None:
        """Raise CorruptImage unless the target holds the old bytes of *record*, or the new ones."""
        view = self.buffer[: record.length]
        self.image.preadinto(view, record.offset)
        if zlib.crc32(view) != record.old_crc and bytes(view) != (record.data or bytes(record.length)):
            raise CorruptImage(
                f"at offset {record.offset} the image is not what the stream began from: "
                "nothing there or behind it was changed",
                path=self.image.path,
            )
