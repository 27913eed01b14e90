# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The transmission phase of one connection: requests in, replies out, in their order.

Invariants: a connection keeps two buffers of fixed size whatever a client
asks; every request is answered once or the connection ends; replies are held
back only while whole requests are already at hand, never while waiting for
the client.  Guest bytes go from the compiled core to the socket without a copy.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from qcowlib.errors import CorruptImage, Error, OutOfRange, ReadOnly, StorageError
from qcowlib.nbd import protocol as p
from qcowlib.nbd.export import Export
from qcowlib.nbd.negotiation import Agreed
from qcowlib.nbd.protocol import simple_reply, structured_chunk, structured_error
from qcowlib.units import KiB, MiB

if TYPE_CHECKING:
    from collections.abc import Iterable

    from _typeshed import ReadableBuffer

__all__ = ["Channel", "Ended", "Transmission", "send_all"]

_PIECE: Final = 1 * MiB
"""Bytes that are moved at once; larger requests go in pieces of it."""
_INPUT: Final = 128 * KiB
_MAX_PENDING: Final = 64
_KNOWN_FLAGS: Final = {
    p.CMD_READ: p.FLAG_FUA | p.FLAG_DF,
    p.CMD_WRITE: p.FLAG_FUA,
    p.CMD_FLUSH: p.FLAG_FUA,
    p.CMD_TRIM: p.FLAG_FUA,
    p.CMD_CACHE: p.FLAG_FUA,
    p.CMD_WRITE_ZEROES: p.FLAG_FUA | p.FLAG_NO_HOLE | p.FLAG_FAST_ZERO,
    p.CMD_BLOCK_STATUS: p.FLAG_FUA | p.FLAG_REQ_ONE,
}
_CHANGES: Final = (p.CMD_WRITE, p.CMD_TRIM, p.CMD_WRITE_ZEROES)


class Channel(Protocol):
    """What a connection is: a stream socket, or something like it.

    One that has a time limit raises BlockingIOError when nothing moved within it.
    """

    def recv_into(self, buffer: memoryview, /) -> int: ...

    def sendmsg(self, buffers: Iterable[ReadableBuffer], /) -> int: ...


class Ended(Exception):
    """The connection is over; the text says why where that is not the client's wish."""


class Transmission:
    """Answers the requests of one connection; counts them in :attr:`requests`."""

    def __init__(self, channel: Channel, export: Export, agreed: Agreed, rest: bytes | bytearray = b"") -> None:
        self.requests = 0
        self._channel = channel
        self._export = export
        self._image = export.image
        self._size = export.info.size
        self._structured = agreed.structured
        self._contexts = agreed.contexts
        self._input = memoryview(bytearray(max(_INPUT, len(rest))))
        self._input[: len(rest)] = rest
        self._at, self._end = 0, len(rest)
        self._buffer = memoryview(bytearray(_PIECE))
        self._used = 0
        self._pending: list[ReadableBuffer] = []
        self._work: dict[int, Callable[[int, int, int, int], None]] = {
            p.CMD_FLUSH: self._flush,
            p.CMD_TRIM: self._trim,
            p.CMD_CACHE: self._cache,
            p.CMD_WRITE_ZEROES: self._zero,
            p.CMD_BLOCK_STATUS: self._status,
        }

    def run(self) -> None:
        """Serve until the client goes.  Raises: Ended where it broke the rules, OSError of the channel."""
        unpack, size = p.REQUEST.unpack_from, p.REQUEST.size
        while True:
            if self._end - self._at < size and not self._receive(size):
                return
            magic, flags, command, cookie, offset, length = unpack(self._input, self._at)
            self._at += size
            if magic != p.REQUEST_MAGIC:
                raise Ended("the client sent something that is not a request")
            self.requests += 1
            if command == p.CMD_READ:
                self._read(flags, cookie, offset, length)
            elif command == p.CMD_WRITE:
                self._write(flags, cookie, offset, length)
            elif command == p.CMD_DISC:
                self._send()
                return
            else:
                self._other(command, flags, cookie, offset, length)

    # -- the channel -----------------------------------------------------------------

    def _receive(self, wanted: int) -> bool:
        """Have *wanted* bytes of input at hand; false at the end of the stream."""
        self._send()
        have = self._end - self._at
        if self._at:
            self._input[:have] = self._input[self._at : self._end]
            self._at, self._end = 0, have
        while self._end < wanted:
            try:
                count = self._channel.recv_into(self._input[self._end :])
            except BlockingIOError:
                if self._end:
                    raise
                # A client that has nothing to ask may take its time.
                continue
            if count == 0:
                if self._end:
                    raise Ended("the client went in the middle of a request")
                return False
            self._end += count
        return True

    def _payload(self, length: int) -> memoryview:
        """Return *length* bytes of payload, at most a piece; valid until the next call."""
        have = self._end - self._at
        if have >= length:
            view = self._input[self._at : self._at + length]
            self._at += length
            return view
        self._send()
        view = self._buffer[:length]
        view[:have] = self._input[self._at : self._end]
        self._at = self._end = 0
        while have < length:
            count = self._channel.recv_into(view[have:])
            if count == 0:
                raise Ended("the client went in the middle of a write")
            have += count
        return view

    def _reply(self, *buffers: ReadableBuffer) -> None:
        self._pending.extend(buffers)
        if len(self._pending) >= _MAX_PENDING:
            self._send()

    def _send(self) -> None:
        """Send what is held back."""
        if self._pending:
            send_all(self._channel, self._pending)
            self._pending.clear()
        self._used = 0

    def _done(self, error: int, cookie: int, text: str = "") -> None:
        """Answer without data."""
        if not self._structured:
            self._reply(simple_reply(error, cookie))
        elif error:
            self._reply(structured_error(error, cookie, text))
        else:
            self._reply(structured_chunk(p.REPLY_DONE, p.REPLY_NONE, cookie))

    # -- requests --------------------------------------------------------------------

    def _refusal(self, command: int, flags: int, offset: int, length: int) -> tuple[int, str] | None:
        """What is wrong with a request before it is carried out."""
        known = _KNOWN_FLAGS.get(command)
        if known is None or flags & ~known:
            return p.EINVAL, "unknown command or flag"
        if self._export.read_only and command in _CHANGES:
            return p.EPERM, "the export is read-only"
        if command != p.CMD_FLUSH and offset + length > self._size:
            return (p.ENOSPC if command in _CHANGES else p.EINVAL), "outside the export"
        if command in (p.CMD_READ, p.CMD_CACHE) and length > p.MAX_PAYLOAD:
            return p.EINVAL, "the request is too long"
        return None

    def _read(self, flags: int, cookie: int, offset: int, length: int) -> None:
        if flags or offset + length > self._size or length > p.MAX_PAYLOAD:
            refused = self._refusal(p.CMD_READ, flags, offset, length)
            if refused is None and flags & p.FLAG_DF and length > _PIECE:
                refused = p.EOVERFLOW, "too long for one chunk"
            if refused is not None:
                self._done(refused[0], cookie, refused[1])
                return
        if length > _PIECE:
            self._read_pieces(cookie, offset, length)
            return
        if self._used + length > _PIECE:
            self._send()
        view = self._buffer[self._used : self._used + length]
        try:
            self._image.preadinto(view, offset)
        except Error as error:
            self._done(_code(error), cookie, str(error))
            return
        self._used += length
        if self._structured and length:
            magic = p.STRUCTURED_REPLY_MAGIC
            head = p.DATA_CHUNK.pack(magic, p.REPLY_DONE, p.REPLY_OFFSET_DATA, cookie, length + 8, offset)
            self._reply(head, view)
        elif self._structured:
            self._done(0, cookie)
        else:
            self._reply(simple_reply(0, cookie), view)

    def _read_pieces(self, cookie: int, offset: int, length: int) -> None:
        """A long read, a piece after the other.

        Invariant: a simple reply has no place for an error behind its head, so the connection ends with one.
        """
        self._send()
        end, first = offset + length, True
        while offset < end:
            view = self._buffer[: min(_PIECE, end - offset)]
            try:
                self._image.preadinto(view, offset)
            except Error as error:
                if not self._structured and not first:
                    raise Ended(str(error)) from None
                self._done(_code(error), cookie, str(error))
                return
            if self._structured:
                flags = p.REPLY_DONE if offset + len(view) == end else 0
                magic, size = p.STRUCTURED_REPLY_MAGIC, len(view) + 8
                self._reply(p.DATA_CHUNK.pack(magic, flags, p.REPLY_OFFSET_DATA, cookie, size, offset), view)
            elif first:
                self._reply(simple_reply(0, cookie), view)
            else:
                self._reply(view)
            self._send()
            first = False
            offset += len(view)

    def _write(self, flags: int, cookie: int, offset: int, length: int) -> None:
        if length > p.MAX_PAYLOAD:
            raise Ended("the client wants to write more than a request may hold")
        problem = self._refusal(p.CMD_WRITE, flags, offset, length)
        done = 0
        while done < length:
            # What was refused, or has failed, is taken from the stream all the same.
            view = self._payload(min(_PIECE, length - done))
            if problem is None:
                try:
                    self._image.pwrite(view, offset + done)
                except Error as error:
                    problem = _code(error), str(error)
            done += len(view)
        if problem is None and flags & p.FLAG_FUA:
            problem = self._durable()
        self._done(*(0, cookie) if problem is None else (problem[0], cookie, problem[1]))

    def _durable(self) -> tuple[int, str] | None:
        try:
            self._image.flush()
        except Error as error:
            return _code(error), str(error)
        return None

    def _other(self, command: int, flags: int, cookie: int, offset: int, length: int) -> None:
        refused = self._refusal(command, flags, offset, length)
        if refused is not None:
            self._done(refused[0], cookie, refused[1])
            return
        # These may take long: what is ready goes out first.
        self._send()
        try:
            self._work[command](flags, cookie, offset, length)
        except Error as error:
            self._done(_code(error), cookie, str(error))

    def _flush(self, flags: int, cookie: int, offset: int, length: int) -> None:
        if not self._export.read_only:
            self._image.flush()
        self._done(0, cookie)

    def _trim(self, flags: int, cookie: int, offset: int, length: int) -> None:
        self._image.discard(length, offset)
        if flags & p.FLAG_FUA:
            self._image.flush()
        self._done(0, cookie)

    def _zero(self, flags: int, cookie: int, offset: int, length: int) -> None:
        no_hole, fast = bool(flags & p.FLAG_NO_HOLE), bool(flags & p.FLAG_FAST_ZERO)
        code = self._export.zero(length, offset, no_hole=no_hole, fast=fast)
        if not code and flags & p.FLAG_FUA:
            self._image.flush()
        self._done(code, cookie, "zeros are not faster than a write here" if code else "")

    def _cache(self, flags: int, cookie: int, offset: int, length: int) -> None:
        for start in range(offset, offset + length, _PIECE):
            self._image.preadinto(self._buffer[: min(_PIECE, offset + length - start)], start)
        self._done(0, cookie)

    def _status(self, flags: int, cookie: int, offset: int, length: int) -> None:
        if not self._contexts or not length:
            self._done(p.EINVAL, cookie, "no metadata context was chosen" if length else "an empty range has no status")
            return
        last = self._contexts[-1][0]
        for number, name in self._contexts:
            found = self._export.status(name, offset, length, one=bool(flags & p.FLAG_REQ_ONE))
            payload = bytearray(p.U32.pack(number))
            for pair in found:
                payload += p.EXTENT.pack(*pair)
            flag = p.REPLY_DONE if number == last else 0
            self._reply(structured_chunk(flag, p.REPLY_BLOCK_STATUS, cookie, bytes(payload)))


def send_all(channel: Channel, buffers: list[ReadableBuffer]) -> None:
    """Send all *buffers*; the list may be changed."""
    total = sum(memoryview(buffer).nbytes for buffer in buffers)
    sent = channel.sendmsg(buffers)
    while sent < total:
        total -= sent
        while sent >= memoryview(buffers[0]).nbytes:
            sent -= memoryview(buffers.pop(0)).nbytes
        buffers[0] = memoryview(buffers[0])[sent:]
        sent = channel.sendmsg(buffers)


_CODES: Final = {
    errno.ENOSPC: p.ENOSPC,
    errno.EDQUOT: p.ENOSPC,
    errno.EFBIG: p.ENOSPC,
    errno.EPERM: p.EPERM,
    errno.EACCES: p.EPERM,
    errno.EROFS: p.EPERM,
    errno.ENOMEM: p.ENOMEM,
    errno.ENOTSUP: p.ENOTSUP,
}


def _code(error: Error) -> int:
    """Return the number of the protocol for *error*."""
    if isinstance(error, StorageError):
        return _CODES.get(error.errno or 0, p.EIO)
    if isinstance(error, ReadOnly):
        return p.EPERM
    if isinstance(error, CorruptImage):
        return p.EIO
    return p.EINVAL if isinstance(error, OutOfRange) else p.EIO
