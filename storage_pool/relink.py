# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Changing the backing name of an image in a volume, its data untouched.

Invariant: I5.  The new name is written where no reader looks and made
durable, then one sector of the header makes it the name: a cut leaves the
old or the new one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qcowlib.qcow2.image import read_header
from qcowlib.units import round_up

from .errors import MetadataError, printable

if TYPE_CHECKING:
    from qcowlib.storage.base import Storage

__all__ = ["backing_of", "set_backing"]

_SECTOR: Final = 512


def backing_of(storage: Storage) -> tuple[str | None, str | None]:
    """Return the backing name and format that a qcow2 image stores.  Raises: FormatError."""
    header = read_header(storage)
    name = header.backing_file.decode("utf-8", "surrogateescape") if header.backing_file else None
    fmt = header.backing_format.decode("utf-8", "replace") if header.backing_format else None
    return name, fmt


def set_backing(storage: Storage, name: str, fmt: str) -> None:
    """Make *name*, of format *fmt*, what the image stands on.

    Raises: FormatError, MetadataError when the header has no room.
    """
    header = read_header(storage, writable=True)
    if (header.backing_file, header.backing_format) == (name.encode(), fmt.encode()):
        return
    size = header.cluster_size
    old = bytearray(size)
    storage.read_into(0, [old])
    used = range(header.backing_file_offset, header.backing_file_offset + len(header.backing_file or b""))
    header.backing_file, header.backing_format = name.encode(), fmt.encode()
    packed = bytearray(header.pack())
    # Where pack() put the name is the end of the extensions; what lies behind
    # it stays, the old name too, until the header points elsewhere.
    end = header.backing_file_offset
    last = round_up(end, _SECTOR)
    packed[end:last] = old[end:last]
    length = len(name.encode())
    place = last
    if used and place < used.stop and used.start < place + length:
        place = round_up(used.stop, _SECTOR)
    if place + length > size:
        raise MetadataError(f"no room in the header for the name '{printable(name[:80])}'", path=storage.name)
    header.backing_file_offset = place
    fields = header.pack_fields()
    packed[: len(fields)] = fields
    storage.write(place, [name.encode()])
    storage.flush()
    # One sector, unless the image had no format of its backing file: then
    # the extensions move, the first sector last.
    for at in range(last - _SECTOR, -1, -_SECTOR):
        if packed[at : at + _SECTOR] != old[at : at + _SECTOR]:
            storage.write(at, [bytes(packed[at : at + _SECTOR])])
    storage.flush()
