# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The steps of ``demo`` that reach an image from elsewhere: over NBD, and through fsspec.

Invariant: what comes over the wire is compared with the bytes that the demo
began with, not with what the image says of itself.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Iterator

import qcowlib
from qcowlib.cli.demo import Demo, Figures, Problem
from qcowlib.errors import StorageError
from qcowlib.nbd import protocol as p
from qcowlib.units import GiB, MiB

__all__ = ["read_by_ranges", "serve_disk"]


def serve_disk(demo: Demo) -> tuple[str, Figures]:
    """Read the compressed disk over NBD, through a socket; qemu-img does it too where it is installed."""
    disk = demo.path("disk.raw")
    with open(disk, "rb") as file:
        expected = hashlib.file_digest(file, "sha256").hexdigest()
    with qcowlib.serve(demo.path("small.qcow2")) as server:
        started = time.monotonic()
        digest = hashlib.sha256()
        for piece in _read_all(str(server.socket)):
            digest.update(piece)
        seconds = time.monotonic() - started
        if digest.hexdigest() != expected:
            raise Problem("what came over the wire differs from the disk")
        demo.guest_bytes += demo.size
        if demo.judge:
            status, text = demo.judge.run("compare", "-f", "raw", "-F", "raw", server.uri, disk)
            if status:
                raise Problem(f"qemu-img compare over NBD: {text.strip()}")
            demo.judge.verdicts += 1
    rate = demo.size / GiB / seconds
    return f"every byte equal, {rate:.1f} GiB/s over a socket", {"seconds-ours": seconds}


def read_by_ranges(demo: Demo) -> tuple[str, Figures]:
    """Read a few places of the compressed disk out of an object store; that it was replaced is noticed."""
    try:
        import fsspec

        from qcowlib.fs import Qcow2FileSystem
    except ImportError:
        return "left out: fsspec is not installed", {}
    store = fsspec.filesystem("memory")
    image, name = demo.path("small.qcow2"), f"/qcow-demo-{os.getpid()}/small.qcow2"
    store.put_file(str(image), name)
    disk = Qcow2FileSystem(f"memory:/{name}")
    places = range(0, demo.size, max(demo.size // 16, MiB))
    try:
        with open(demo.path("disk.raw"), "rb") as file:
            for offset in places:
                file.seek(offset)
                if disk.cat_file("disk", offset, offset + 4096) != file.read(4096):
                    raise Problem(f"the bytes at {offset} differ from the disk")
        demo.guest_bytes += 4096 * len(places)
        store.put_file(str(image), name)
        try:
            disk.cat_file("disk")
        except StorageError:
            pass
        else:
            raise Problem("an object that was put anew was read on")
    finally:
        store.rm(name.rpartition("/")[0], recursive=True)
    return f"{len(places)} places read by ranges out of an object store, its replacement noticed", {
        "places": len(places)
    }


def _read_all(path: str) -> Iterator[bytes]:
    """Yield the default export in pieces: the least that a client has to say."""
    with socket.socket(socket.AF_UNIX) as channel:
        channel.settimeout(60)
        channel.connect(path)
        _take(channel, p.GREETING.size)
        channel.sendall(
            p.U32.pack(p.FIXED_NEWSTYLE | p.NO_ZEROES) + p.OPTION.pack(p.OPTION_MAGIC, p.OPT_EXPORT_NAME, 0)
        )
        size = int.from_bytes(_take(channel, 10)[:8], "big")
        for offset in range(0, size, MiB):
            length = min(MiB, size - offset)
            channel.sendall(p.REQUEST.pack(p.REQUEST_MAGIC, 0, p.CMD_READ, offset, offset, length))
            if _take(channel, p.SIMPLE_REPLY.size) != p.simple_reply(0, offset):
                raise Problem(f"the server did not answer a read at {offset}")
            yield _take(channel, length)
        channel.sendall(p.REQUEST.pack(p.REQUEST_MAGIC, 0, p.CMD_DISC, 0, 0, 0))


def _take(channel: socket.socket, length: int) -> bytes:
    data = bytearray(length)
    view = memoryview(data)
    while view:
        count = channel.recv_into(view)
        if not count:
            raise Problem("the server ended the connection")
        view = view[count:]
    return bytes(data)
