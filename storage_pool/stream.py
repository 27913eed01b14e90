# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Bytes from and to streams that cannot seek, in bounded memory, with progress and SHA-256.

Invariant: every byte of the stream goes into the checksum in its order; size
and checksum are compared before the receiver says that it is done.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

from .errors import Illegal, InvalidName, printable

if TYPE_CHECKING:
    import qcowlib

__all__ = ["Progress", "Readable", "Received", "Writable", "read_piece", "receive", "send"]

PIECE = 4 << 20
Progress = Callable[[int, int], object]


class Readable(Protocol):
    """A file, pipe or socket file opened for reading bytes."""

    def read(self, size: int, /) -> bytes | None:
        """Return at most *size* bytes, none at the end."""


class Writable(Protocol):
    """A file, pipe or socket file opened for writing bytes."""

    def write(self, data: memoryview, /) -> int | None:
        """Take all of *data*, or return how much was taken."""


class Received(NamedTuple):
    """How many bytes went through, and their SHA-256 in hexadecimal."""

    size: int
    sha256: str


def read_piece(stream: Readable, length: int) -> bytes:
    """Return *length* bytes, less only at the stream's end."""
    parts, missing = [], length
    while missing:
        data = stream.read(missing)
        if not data:
            break
        parts.append(data)
        missing -= len(data)
    return b"".join(parts)


def receive(
    stream: Readable,
    write: Callable[[bytes, int], object],
    *,
    size: int | None = None,
    sha256: str | None = None,
    limit: int = 1 << 62,
    first: bytes = b"",
    progress: Progress | None = None,
) -> Received:
    """Pass a stream to *write* with offsets; pieces of zeros are left out.

    *first* was read from the stream already.  *limit* ends a stream that is
    longer than its receiver.

    Raises: Illegal when the stream is longer than *limit*, or size or
    checksum are others than told.
    """
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise InvalidName(f"not a SHA-256 in hexadecimal: '{printable(sha256[:64])}'")
    digest = hashlib.sha256()
    most = limit if size is None else min(limit, size)
    offset, piece = 0, first or read_piece(stream, PIECE)
    while piece:
        if offset + len(piece) > most:
            raise Illegal(f"the stream is longer than {most} bytes")
        digest.update(piece)
        if piece.count(0) != len(piece):
            write(piece, offset)
        offset += len(piece)
        if progress is not None:
            progress(offset, size or offset)
        piece = read_piece(stream, PIECE)
    if size is not None and offset != size:
        raise Illegal(f"the stream ended after {offset} of {size} bytes")
    if sha256 is not None and digest.hexdigest() != sha256.lower():
        raise Illegal(f"the checksum is {digest.hexdigest()}, not {printable(sha256[:64])}")
    return Received(offset, digest.hexdigest())


def send(image: qcowlib.Image, sink: Writable, *, progress: Progress | None = None) -> Received:
    """Write all that a guest would read of *image* to *sink*, zeros too."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(PIECE))
    total, offset = image.size, 0
    while offset < total:
        piece = buffer[: min(PIECE, total - offset)]
        image.preadinto(piece, offset)
        digest.update(piece)
        taken = 0
        while taken < len(piece):
            count = sink.write(piece[taken:])
            taken += len(piece) - taken if count is None else count
        offset += len(piece)
        if progress is not None:
            progress(offset, total)
    return Received(offset, digest.hexdigest())
