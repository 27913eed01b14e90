# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""External leases: the index in the volume ``xleases`` of domains from version 4.

The volume is an array of areas, one alignment each: 0 unused, 1 the index,
2 reserved, 3+n the lease of record n.  The index is 62 x 4096 bytes:

======== ===== ====================================================
offset   bytes
======== ===== ====================================================
0        4     magic 0x12152016, big endian
5        4     version ``0001``
10       48    lockspace, NUL padded
59       10    time of formatting, decimal
70       1     flag ``-``, or ``u`` while being formatted
511      1     line feed
512+64n  64    record n: name 48, NUL, offset 11 digits, NUL, flag, ``-``, line feed
======== ===== ====================================================

Invariant: the index is the truth and is usable after a cut at any point: a
lease is written before its record, a record is emptied before its lease; one
block of the index is written at a time.

Source: VDSM's external leases.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from .errors import AlreadyExists, InvalidName, MetadataError, NoSpace, NotFound, printable
from .ids import check_id, is_id
from .lease_records import read_leader, resource_area, write_area
from .leases import Lease, LeaseArea

if TYPE_CHECKING:
    from qcowlib.storage.base import Storage

__all__ = ["INDEX_SIZE", "MAX_RECORDS", "ExternalLease", "Index", "RebuildStep", "XleaseVolume", "format_index"]

MAGIC: Final = 0x12152016
_VERSION: Final = 1
INDEX_SIZE: Final = 62 * 4096
RECORD_SIZE: Final = 64
_RECORDS_BASE: Final = 512
MAX_RECORDS: Final = (INDEX_SIZE - _RECORDS_BASE) // RECORD_SIZE
#: Areas before the lease of record 0.
RESERVED_AREAS: Final = 3
_HEADER: Final = struct.Struct(">IB4sB48sB10sBc")
_RECORD: Final = struct.Struct("48sB11sBcc1s")
_EMPTY: Final = _RECORD.pack(b"", 0, b"0" * 11, 0, b"-", b"-", b"\n")


class ExternalLease(NamedTuple):
    """A lease: byte *offset* in the volume; *updating* was left by old hosts and counts as missing."""

    offset: int
    updating: bool


class _Record(NamedTuple):
    name: str
    updating: bool


def _number(text: bytes, what: str) -> int:
    if not (text.isdigit() and text.isascii()):
        raise MetadataError(f"{what} of the lease index is not a number: '{printable(text)}'")
    return int(text)


def format_index(lockspace: str, mtime: int, *, updating: bool = False) -> bytes:
    """Return an index without leases, *mtime* in seconds since 1970."""
    check_id(lockspace, "domain UUID")
    flag = b"u" if updating else b"-"
    header = _HEADER.pack(MAGIC, 0, b"%04d" % _VERSION, 0, lockspace.encode(), 0, b"%010d" % mtime, 0, flag)
    return header.ljust(_RECORDS_BASE - 1, b"\0") + b"\n" + _EMPTY * MAX_RECORDS


class Index:
    """An index in memory, changed record by record."""

    __slots__ = ("_data", "lockspace", "mtime")

    def __init__(self, data: bytes, path: str | None = None) -> None:
        """Raises: MetadataError unless the index is whole and not being formatted."""
        if len(data) < INDEX_SIZE:
            raise MetadataError(f"the lease index is truncated to {len(data)} bytes", path=path)
        self._data = bytearray(data[:INDEX_SIZE])
        magic, _, version, _, space, _, mtime, _, flag = _HEADER.unpack_from(self._data)
        if magic != MAGIC:
            raise MetadataError(f"no lease index here (magic {magic:#010x})", path=path, hint="Format or rebuild it.")
        if _number(version, "the version") != _VERSION:
            raise MetadataError(f"lease index of unknown version {printable(version)}", path=path)
        try:
            self.lockspace = check_id(space.rstrip(b"\0").decode("ascii", "replace"), "lockspace")
        except InvalidName as error:
            raise MetadataError(f"the lease index is damaged: {error}", path=path) from error
        self.mtime = _number(mtime, "the time")
        if flag != b"-":
            raise MetadataError("formatting of the lease index did not end", path=path, hint="Rebuild the index.")

    def record(self, number: int) -> _Record | None:
        """Return the record, ``None`` for an empty one.  Raises: MetadataError for a damaged one."""
        raw = self._data[_RECORDS_BASE + number * RECORD_SIZE :][:RECORD_SIZE]
        name, zero, offset, zero_2, flag, _, end = _RECORD.unpack(raw)
        try:
            text = name.rstrip(b"\0").decode()
        except UnicodeDecodeError as error:
            raise MetadataError(f"record {number} of the lease index is damaged") from error
        if zero or zero_2 or end != b"\n" or flag not in (b"-", b"u"):
            raise MetadataError(f"record {number} of the lease index is damaged")
        _number(offset, f"the offset in record {number}")
        return _Record(text, flag == b"u") if text else None

    def find(self, name: str) -> int | None:
        """Return the number of the record, whatever its state, that bears *name*."""
        # The name alone decides which record is meant, so a damaged record is
        # reported to who asks for it and to nobody else.
        wanted = name.encode().ljust(48, b"\0")
        for number in range(MAX_RECORDS):
            start = _RECORDS_BASE + number * RECORD_SIZE
            if self._data[start : start + 48] == wanted:
                return number
        return None

    def lookup(self, name: str) -> int:
        """Return the record number of lease *name*.

        Raises: NotFound, MetadataError when its record is damaged.
        """
        number = self.find(check_id(name, "lease"))
        if number is None:
            raise NotFound(f"there is no lease {name}")
        record = self.record(number)
        if record is None or record.updating:
            raise NotFound(f"the lease {name} was not made completely")
        return number

    def leases(self, alignment: int) -> dict[str, ExternalLease]:
        """Return all leases with readable records."""
        found = {}
        for number in range(MAX_RECORDS):
            start = _RECORDS_BASE + number * RECORD_SIZE
            if self._data[start : start + RECORD_SIZE] == _EMPTY:
                continue
            try:
                record = self.record(number)
            except MetadataError:
                continue
            if record is not None:
                found[record.name] = ExternalLease((RESERVED_AREAS + number) * alignment, record.updating)
        return found

    def reserve(self, name: str) -> int:
        """Return the record number a new lease *name* gets.

        Raises: AlreadyExists, NoSpace, MetadataError when the name stands in a damaged record.
        """
        number = self.find(check_id(name, "lease"))
        if number is not None:
            record = self.record(number)
            if record is None or not record.updating:
                raise AlreadyExists(f"the lease {name} exists")
            # Left by a host that died while making it: made anew in place.
            return number
        for candidate in range(MAX_RECORDS):
            start = _RECORDS_BASE + candidate * RECORD_SIZE
            if self._data[start : start + RECORD_SIZE] == _EMPTY:
                return candidate
        raise NoSpace(f"all {MAX_RECORDS} records of the lease index are in use")

    def set(self, number: int, name: str, alignment: int) -> None:
        """Fill a record; an empty *name* empties it."""
        start = _RECORDS_BASE + number * RECORD_SIZE
        if name:
            offset = b"%011d" % ((RESERVED_AREAS + number) * alignment)
            raw = _RECORD.pack(check_id(name, "lease").encode(), 0, offset, 0, b"-", b"-", b"\n")
        else:
            raw = _EMPTY
        self._data[start : start + RECORD_SIZE] = raw

    def block(self, number: int, block_size: int) -> tuple[int, bytes]:
        """Return offset and bytes of the block that holds the record."""
        start = (_RECORDS_BASE + number * RECORD_SIZE) // block_size * block_size
        return start, bytes(self._data[start : start + block_size])

    def to_bytes(self) -> bytes:
        """Return the whole index."""
        return bytes(self._data)


class RebuildStep(NamedTuple):
    """One repair of an index against the resources found in the lease areas."""

    number: int
    action: Literal["write resource", "clear resource", "write record", "empty record"]
    name: str
    why: str


def rebuild_plan(index: Index, resources: Mapping[int, str], capacity: int) -> list[RebuildStep]:
    """Return what makes index and resources agree; the index is the truth.

    *resources* has the resource name by record number where one is written,
    *capacity* is the number of lease areas in the volume.
    """
    names = set()
    records: dict[int, _Record | None] = {}
    damaged = []
    for number in range(MAX_RECORDS):
        try:
            record = records[number] = index.record(number)
        except MetadataError:
            damaged.append(number)
            continue
        if record is not None:
            names.add(record.name)
    steps = []
    for number, record in records.items():
        if record is None:
            if resources.get(number):
                steps.append(RebuildStep(number, "clear resource", "", "its record is empty"))
        elif number >= capacity:
            steps.append(RebuildStep(number, "empty record", "", "it lies behind the end of the volume"))
        elif resources.get(number) != record.name:
            why = "the resource has another name" if resources.get(number) else "the resource is missing"
            steps.append(RebuildStep(number, "write resource", record.name, why))
        if record is not None and record.updating and number < capacity:
            steps.append(RebuildStep(number, "write record", record.name, "it was left as being updated"))
    for number in damaged:
        name = resources.get(number, "")
        if number < capacity and name and name not in names and is_id(name):
            names.add(name)
            steps.append(RebuildStep(number, "write record", name, "it is damaged, the resource tells its name"))
        else:
            if name and number < capacity:
                steps.append(RebuildStep(number, "clear resource", "", "its record is damaged and its name in use"))
            steps.append(RebuildStep(number, "empty record", "", "it is damaged"))
    return steps


class XleaseVolume:
    """The index and the lease areas on their storage.

    *storage* is the whole volume ``xleases``; *path* is what leases are named by.
    """

    __slots__ = ("_storage", "alignment", "block_size", "path")

    def __init__(self, storage: Storage, *, path: str, block_size: int, alignment: int) -> None:
        self._storage = storage
        self.path = path
        self.block_size = block_size
        self.alignment = alignment

    def load(self) -> Index:
        """Read the index.  Raises: MetadataError."""
        data = bytearray(INDEX_SIZE)
        self._storage.read_into(self.alignment, [data])
        return Index(bytes(data), self.path)

    def format(self, lockspace: str, mtime: int) -> None:
        """Write an empty index; the flag tells readers of a half written one."""
        self._write(0, format_index(lockspace, mtime, updating=True))
        self._write(0, format_index(lockspace, mtime)[: self.block_size])

    def _write(self, offset: int, data: bytes) -> None:
        self._storage.write(self.alignment + offset, [data])
        self._storage.flush()

    def _offset(self, number: int) -> int:
        return (RESERVED_AREAS + number) * self.alignment

    def _write_resource(self, lockspace: str, number: int, name: str) -> None:
        owner = lockspace if name else ""
        data = resource_area(owner, name, block_size=self.block_size, alignment=self.alignment)
        write_area(self._storage, self._offset(number), data)

    def lookup(self, name: str) -> Lease:
        """Return where lease *name* is.  Raises: NotFound, MetadataError."""
        index = self.load()
        return Lease(index.lockspace, name, LeaseArea(self.path, self._offset(index.lookup(name))))

    def add(self, name: str) -> Lease:
        """Make a lease: resource first, then its record.

        Raises: AlreadyExists, NoSpace, MetadataError.
        """
        index = self.load()
        number = index.reserve(name)
        self._write_resource(index.lockspace, number, name)
        index.set(number, name, self.alignment)
        self._write(*index.block(number, self.block_size))
        return Lease(index.lockspace, name, LeaseArea(self.path, self._offset(number)))

    def remove(self, name: str) -> None:
        """Remove a lease: record first, then its resource.  Raises: NotFound, MetadataError."""
        index = self.load()
        number = index.find(check_id(name, "lease"))
        if number is None:
            raise NotFound(f"there is no lease {name}", path=self.path)
        index.set(number, "", self.alignment)
        self._write(*index.block(number, self.block_size))
        # Afterwards nobody finds it; a failure here leaves a name in an area
        # whose record is empty, which a rebuild clears.
        self._write_resource(index.lockspace, number, "")

    @property
    def capacity(self) -> int:
        """Records whose lease area lies in the volume; a file grows to the full table."""
        return min(MAX_RECORDS, max(0, self._storage.size // self.alignment - RESERVED_AREAS))

    def resources(self) -> dict[int, str]:
        """Return the names found in the lease areas, by record number."""
        found = {}
        for number in range(self.capacity):
            leader = read_leader(self._storage, self._offset(number))
            if leader is not None and leader.resource_name:
                found[number] = leader.resource_name
        return found

    def rebuild(self, *, growable: bool = False) -> list[RebuildStep]:
        """Make index and resources agree; returns what was done.

        *growable* says that areas behind the end of the storage can be made.

        Raises: MetadataError when the header of the index is damaged.
        """
        index = self.load()
        steps = rebuild_plan(index, self.resources(), MAX_RECORDS if growable else self.capacity)
        for step in steps:
            if step.action in ("write resource", "clear resource"):
                self._write_resource(index.lockspace, step.number, step.name)
            else:
                index.set(step.number, step.name, self.alignment)
                self._write(*index.block(step.number, self.block_size))
        return steps
