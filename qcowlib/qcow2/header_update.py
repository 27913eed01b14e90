# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Replacing the header area of an existing image: fields, extensions, backing file name.

A change inside one sector is one write.  Where the old area or the new one ends
in the first sector, that sector is the switch.  Else the rest cannot change
together with it, so the change takes a way round: the new content is written
where the old header does not look, and a first sector that points there, and
skips the rest, makes it the header.  Then the rest is rewritten where nobody
looks, and a second write of the first sector gives the area its usual form.

======= ============================================== =======
step    write                                          then
======= ============================================== =======
1       new extensions and name, in free sectors       barrier
2       first sector, pointing to them                 barrier
3       what it usually has behind the first sector    barrier
4       first sector                                   barrier
5       zeros where nothing of the header is any more
======= ============================================== =======

Invariant: a cut leaves the old header or the new one, whole (I5); unknown
extensions and fields are kept; unknown autoclear bits go with the change (I10).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qcowlib.errors import UsageError
from qcowlib.ondisk import AUTOCLEAR_MASK, Header
from qcowlib.ondisk.extensions import EXT_END, EXT_FEATURE_NAMES, pack_extension, walk_extensions
from qcowlib.qcow2.directories import read_header
from qcowlib.units import SECTOR, round_up

if TYPE_CHECKING:
    from qcowlib.storage.base import Storage

__all__ = ["set_backing", "write_header"]

#: An extension that nobody knows, and so everybody skips; it only exists between two steps.
_SKIP: Final = 0x736B_6970
_HEAD: Final = 8


def set_backing(storage: Storage, name: bytes | None, format: bytes | None) -> Header:
    """Make *name* (``None``: nothing) the backing file of the image in *storage*; return the new header.

    Raises: UsageError when the header has no room; FormatError; StorageError.
    """
    header = read_header(storage, writable=True).copy()
    header.backing_file = name
    header.backing_format = format
    write_header(storage, header)
    return header


def write_header(storage: Storage, header: Header) -> None:
    """Make *header* the header of the image in *storage* (blocking; nobody else writes meanwhile).

    Raises: UsageError when it does not fit, before anything is written; StorageError.
    """
    header.autoclear_features &= AUTOCLEAR_MASK
    header.unknown_extensions = tuple(one for one in header.unknown_extensions if one.type != _SKIP)
    packed = header.pack()
    old = bytearray(header.cluster_size)
    storage.read_into(0, [old])
    changed = [at for at in range(0, len(packed), SECTOR) if old[at : at + SECTOR] != packed[at : at + SECTOR]]
    if not changed:
        return
    storage.flush()
    if len(changed) == 1:
        storage.write(changed[0], [packed[changed[0] : changed[0] + SECTOR]])
        storage.flush()
        return
    if _used(bytes(old)) > SECTOR and _used(packed) > SECTOR:
        _detour(storage, header, bytes(old), packed)
    if _used(packed) > SECTOR:
        storage.write(SECTOR, [packed[SECTOR : round_up(_used(packed), SECTOR)]])
        storage.flush()
    # Invariant: I5
    storage.write(0, [packed[:SECTOR]])
    storage.flush()
    storage.write(SECTOR, [packed[SECTOR:]])


def _detour(storage: Storage, header: Header, old: bytes, packed: bytes) -> None:
    """Make the new content valid without a change to what old and new header use behind the first sector."""
    place = round_up(max(_used(old), _used(packed)), SECTOR)
    start = header.header_length
    extensions = _extensions(packed)
    name = header.backing_file or b""
    inside = start + len(extensions) <= SECTOR
    area = name if inside else extensions + name
    if place + len(area) > header.cluster_size or start + _HEAD > SECTOR:
        raise UsageError("No space left in the file header", path=storage.name)
    if area:
        storage.write(place, [area])
        storage.flush()
    if not inside:
        extensions = _SKIP.to_bytes(4, "big") + (place - start - _HEAD).to_bytes(4, "big")
    first = bytearray(packed[:start] + extensions).ljust(SECTOR, b"\0")
    if header.backing_file is not None:
        first[8:16] = (place + len(area) - len(name)).to_bytes(8, "big")
    # Invariant: I5
    storage.write(0, [first])
    storage.flush()


def _area(cluster: bytes) -> tuple[int, int]:
    """Where the extensions of a header area start, and where they must end."""
    version = int.from_bytes(cluster[4:8], "big")
    start = 72 if version == 2 else int.from_bytes(cluster[100:104], "big")
    return start, int.from_bytes(cluster[8:16], "big") or len(cluster)


def _used(cluster: bytes) -> int:
    """Return the end of what the header in *cluster* uses."""
    start, end = _area(cluster)
    used = start
    for _, offset, length in walk_extensions(cluster, start, end, path=None):
        used = offset + round_up(length, 8)
    name = int.from_bytes(cluster[8:16], "big")
    if name:
        used = max(used, name + int.from_bytes(cluster[16:20], "big"))
    return used


def _extensions(cluster: bytes) -> bytes:
    """Return the packed extensions of the header in *cluster* that change its meaning, with END."""
    start, end = _area(cluster)
    parts = []
    for kind, offset, length in walk_extensions(cluster, start, end, path=None):
        if kind not in (EXT_FEATURE_NAMES, EXT_END):
            parts.append(pack_extension(kind, cluster[offset : offset + length]))
    return b"".join([*parts, pack_extension(EXT_END, b"")])
