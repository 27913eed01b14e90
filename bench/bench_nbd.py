# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Our NBD server beside qemu-nbd: the same image, the same client, each server in a process of its own."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from struct import Struct
from typing import Any

import images
import pytest
from scale import Scale

import qcowlib

BLOCK = 4096
MiB = 1 << 20
WHO = ["qcowlib", *(["qemu-nbd"] if shutil.which("qemu-nbd") else [])]
REQUEST = Struct(">IHHQQI")
MAGIC, READ, WRITE, FLUSH = 0x25609513, 0, 1, 3


@pytest.fixture(scope="module")
def served(bench_dir: Path, scale: Scale) -> Iterator[Path]:
    """A qcow2 image with every cluster in use."""
    path, raw = bench_dir / "served.qcow2", bench_dir / "served.raw"
    images.dense_raw(raw, scale.copy // 4)
    qcowlib.convert(raw, path, source_format="raw", format="qcow2")
    raw.unlink()
    yield path
    path.unlink()


class Client:
    """The least that a client can be: simple replies, one connection."""

    def __init__(self, channel: socket.socket) -> None:
        channel.settimeout(60)
        self._channel = channel
        self._take(memoryview(bytearray(18)))
        channel.sendall((3).to_bytes(4, "big") + Struct(">QII").pack(0x49484156454F5054, 1, 0))
        self._take(memoryview(bytearray(10)))
        self._buffer = memoryview(bytearray(16 * (MiB + 16)))

    def _take(self, view: memoryview) -> None:
        while view:
            count = self._channel.recv_into(view)
            if not count:
                raise EOFError
            view = view[count:]

    def read(self, offsets: list[int], length: int) -> memoryview:
        """Ask for all at once; returns what the last one was answered."""
        self._channel.sendall(b"".join(REQUEST.pack(MAGIC, 0, READ, 0, offset, length) for offset in offsets))
        answer = self._buffer[: len(offsets) * (16 + length)]
        self._take(answer)
        return answer[-length:]

    def change(self, command: int, data: bytes = b"", offset: int = 0) -> None:
        """Write or flush, and wait for the answer."""
        self._channel.sendall(REQUEST.pack(MAGIC, 0, command, 0, offset, len(data)) + data)
        self._take(self._buffer[:16])


@contextlib.contextmanager
def server(who: str, path: Path, *words: str) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """A server on a listening socket that it is given, and a connection to it."""
    where = path.with_name("nbd.sock")
    command = ["qemu-nbd", "-f", "qcow2", "-t", *words]
    if who == "qcowlib":
        command = [sys.executable, "-m", "qcowlib", "serve", "-q", *(words or ["-w"])]
    start = 'export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@" 3<&0'
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(where))
        stack.callback(where.unlink)
        listener.listen()
        process = subprocess.Popen(["sh", "-c", start, "sh", *command, str(path)], stdin=listener.fileno())
        stack.callback(process.wait)
        stack.callback(process.terminate)
        channel = stack.enter_context(socket.socket(socket.AF_UNIX))
        channel.connect(str(where))
        yield process, channel


def offsets_of(path: Path, count: int, length: int, seed: int = 4) -> list[int]:
    with qcowlib.open(path, force_share=True) as image:
        places = image.size // length
    chance = random.Random(seed)
    return [chance.randrange(places) * length for _ in range(count)]


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("depth", [1, 16])
def bench_nbd_random_read(
    benchmark: Any, measure: Callable[..., None], served: Path, scale: Scale, depth: int, who: str
) -> None:
    benchmark.group = f"NBD: random read, 4 KiB, depth {depth}"
    offsets = offsets_of(served, scale.operations // depth * depth, BLOCK)
    with server(who, served) as (_, channel):
        client = Client(channel)

        def run() -> None:
            for start in range(0, len(offsets), depth):
                client.read(offsets[start : start + depth], BLOCK)

        measure(run, who=who, amount=len(offsets), unit="read")
        assert bytes(client.read([MiB], 8)) == (1).to_bytes(8, "big")


@pytest.mark.benchmark(group="NBD: sequential read, 1 MiB")
@pytest.mark.parametrize("who", WHO)
def bench_nbd_sequential_read(measure: Callable[..., None], served: Path, scale: Scale, who: str) -> None:
    size = scale.copy // 4
    with server(who, served) as (_, channel):
        client = Client(channel)

        def run() -> None:
            for offset in range(0, size, MiB):
                client.read([offset], min(MiB, size - offset))

        measure(run, who=who, amount=size, unit="byte")


@pytest.mark.benchmark(group="NBD: random write, 4 KiB, mapped, depth 1")
@pytest.mark.parametrize("who", WHO)
def bench_nbd_random_write(measure: Callable[..., None], served: Path, scale: Scale, who: str) -> None:
    offsets = offsets_of(served, scale.operations, BLOCK, seed=6)
    data = b"w" * BLOCK
    with server(who, served) as (_, channel):
        client = Client(channel)

        def run() -> None:
            for offset in offsets:
                client.change(WRITE, data, offset)
            client.change(FLUSH)

        measure(run, who=who, amount=len(offsets), unit="write")
        assert bytes(client.read([offsets[-1]], BLOCK)) == data


@pytest.mark.benchmark(group="NBD: fio, random read, 4 KiB, depth 16")
@pytest.mark.parametrize("who", WHO if shutil.which("fio") else [])
def bench_nbd_fio(measure: Callable[..., None], served: Path, scale: Scale, who: str) -> None:
    with server(who, served) as (_, channel):
        uri = f"nbd+unix:///?socket={served.with_name('nbd.sock')}"
        channel.close()
        words = ["--name=r", "--ioengine=nbd", f"--uri={uri}", "--rw=randread", "--bs=4k", "--iodepth=16"]
        limits = [f"--number_ios={scale.operations}", f"--size={scale.copy // 4}", "--output-format=json"]

        def run() -> None:
            done = subprocess.run(["fio", *words, *limits], check=True, capture_output=True, cwd=served.parent)
            # It says something before its report.
            report = json.loads(done.stdout[done.stdout.index(b"{") :])
            assert report["jobs"][0]["read"]["total_ios"] == scale.operations

        measure(run, who=who, amount=scale.operations, unit="read")
