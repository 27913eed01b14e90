# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The client's side of the wire for tests: requests as bytes, replies as records, a channel in memory."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from struct import Struct
from typing import NamedTuple

OPTION_MAGIC = 0x49484156454F5054
REQUEST = Struct(">IHHQQI")
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FUA, NO_HOLE, DF, ONE, FAST = 1, 2, 4, 8, 16
SIMPLE, STRUCTURED = 0x67446698, 0x668E33EF


def option(number: int, data: bytes = b"") -> bytes:
    return Struct(">QII").pack(OPTION_MAGIC, number, len(data)) + data


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return len(data).to_bytes(4, "big") + data


def go(name: str = "", *infos: int, number: int = 7) -> bytes:
    return option(number, text(name) + Struct(f">H{len(infos)}H").pack(len(infos), *infos))


def contexts(*names: str, export: str = "", number: int = 10) -> bytes:
    return option(number, text(export) + len(names).to_bytes(4, "big") + b"".join(map(text, names)))


def request(command: int, offset: int = 0, length: int = 0, *, flags: int = 0, cookie: int = 1) -> bytes:
    return REQUEST.pack(0x25609513, flags, command, cookie, offset, length)


class OptionReply(NamedTuple):
    option: int
    kind: int
    data: bytes


def option_replies(data: bytes) -> list[OptionReply]:
    """Return all replies in *data*, which holds nothing else."""
    found, at = [], 0
    while at < len(data):
        magic, number, kind, length = Struct(">QIII").unpack_from(data, at)
        assert magic == 0x3E889045565A9
        found.append(OptionReply(number, kind, data[at + 20 : at + 20 + length]))
        at += 20 + length
    assert at == len(data)
    return found


class Chunk(NamedTuple):
    flags: int
    kind: int
    cookie: int
    data: bytes


def chunks(data: bytes) -> Iterator[Chunk]:
    """Yield the chunks of structured replies in *data*, which holds nothing else."""
    at = 0
    while at < len(data):
        magic, flags, kind, cookie, length = Struct(">IHHQI").unpack_from(data, at)
        assert magic == STRUCTURED
        yield Chunk(flags, kind, cookie, data[at + 20 : at + 20 + length])
        at += 20 + length
    assert at == len(data)


class Memory:
    """A channel that gives *sent* in portions and keeps what it is given; ends where *sent* ends."""

    def __init__(self, sent: bytes, portions: Iterable[int] = ()) -> None:
        self._left = memoryview(sent)
        self._portions = iter(portions)
        self.received = bytearray()

    def recv_into(self, buffer: memoryview) -> int:
        count = min(len(buffer), len(self._left), next(self._portions, len(buffer)))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def sendmsg(self, buffers: Iterable[bytes]) -> int:
        data = b"".join(bytes(buffer) for buffer in buffers)
        count = min(len(data), next(self._portions, len(data)) or 1)
        self.received += data[:count]
        return count


class Client:
    """A connection over a socket, negotiated for simple replies."""

    def __init__(self, path: str, name: str = "") -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(30)
        self.socket.connect(path)
        self.take(18)
        self.socket.sendall((3).to_bytes(4, "big") + option(1, name.encode()))
        self.size, self.flags = Struct(">QH").unpack(self.take(10))

    def take(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self.socket.recv(count - len(data))
            assert part, "the server went"
            data += part
        return data

    def call(self, command: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> int:
        """Send a request and return the error of its reply."""
        self.socket.sendall(request(command, offset, length or len(data), flags=flags) + data)
        magic, error, cookie = Struct(">IIQ").unpack(self.take(16))
        assert (magic, cookie) == (SIMPLE, 1)
        return int(error)

    def read(self, offset: int, length: int) -> bytes:
        assert self.call(READ, offset, length) == 0
        return self.take(length)

    def close(self) -> None:
        self.socket.close()
