# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Our server and qemu-nbd, byte for byte: what they answer to options, which zeros are quick, what bitmaps record."""

from __future__ import annotations

import random
import socket
from pathlib import Path
from typing import Any

import pytest

import qcowlib
from tests.qcowlib.nbd import wire
from tests.qcowlib.nbd.test_real_clients import SIZE, make_chain, qemu_nbd
from tests.qcowlib.nbd.wire import FAST, NO_HOLE, TRIM, WRITE, ZEROES, Client
from tests.qcowlib.qemu import qemu_img, run

pytestmark = [pytest.mark.bare, pytest.mark.real("qemu-img", "qemu-nbd")]

MiB = 1 << 20
ENOTSUP = 95
REFUSED = 1 << 31


def path_of(uri: str) -> str:
    return uri.partition("socket=")[2]


def answers(path: str, options: bytes) -> list[tuple[int, int, bytes]]:
    """What a server answers to *options*, without what is its choice: order, numbers of contexts, texts, sizes."""
    with socket.socket(socket.AF_UNIX) as channel:
        channel.settimeout(30)
        channel.connect(path)
        channel.sendall(b"\0\0\0\3" + options + wire.option(2))
        data = b""
        while part := channel.recv(65536):
            data += part
    found = []
    for option, kind, body in wire.option_replies(data[18:]):
        if kind & REFUSED:
            body = b""
        elif kind == 4:
            body = body[4:]
        elif kind == 3 and body[:2] == b"\0\3":
            body = body[:6] + body[10:]
        found.append((option, kind, body))
    return sorted(found)


def listed(*queries: str, export: str = "") -> bytes:
    return wire.contexts(*queries, export=export, number=9)


def test_options_are_answered_as_by_qemu_nbd(tmp_path: Path) -> None:
    top = make_chain(tmp_path, 2)
    structured, info = wire.option(8), 6
    queries = [
        *(listed(query) for query in ("qemu:", "base:", "base:allocation", "qemu:dirty-bitmap:", "", "nope:", "qemu")),
        *(listed(f"qemu:{rest}") for rest in ("dirty-bitmap:since", "dirty-bitmap:no", "dirty-", "allocation-depth")),
        *(listed(*names) for names in ((), ("qemu:", "base:"), ("base:", "base:"), ("base:allocation", "qemu:"))),
        *(structured + wire.contexts(query) for query in ("base:", "qemu:", "qemu:dirty-bitmap:", "base:allocation")),
        structured + wire.contexts("base:allocation", "qemu:dirty-bitmap:since", "base:allocation", "other:x"),
        structured + wire.contexts(),
        structured + wire.contexts("base:allocation", export="none"),
        structured + listed("qemu:"),
        wire.contexts("base:allocation"),
        listed(export="none"),
        *(wire.go("", *infos, number=info) for infos in ((), (3,), (1, 3), (1, 2, 3), (77,))),
        *(wire.go(name, number=info) for name in ("none", "n" * 4097, "\N{BLACK STAR}")),
        wire.option(3) + wire.option(3, b"x") + wire.option(8, b"x"),
        *(wire.option(number, b"x") for number in (0, 4, 99)),
        *(wire.option(info, body) for body in (b"", wire.text("") + b"\0\5", wire.text("") + b"\0\0x")),
        wire.option(9, wire.text("") + b"\0\0\0\2" + wire.text("base:")),
    ]
    with qemu_nbd(top, tmp_path, "-r", "-A", "-B", "since") as theirs, qcowlib.serve(top, bitmaps=["since"]) as ours:
        for query in queries:
            assert answers(str(ours.socket), query) == answers(path_of(theirs), query), query


@pytest.mark.parametrize("options", [{}, {"cluster_size": 4096}, {"extended_l2": True}], ids=str)
def test_zeros_are_fast_where_qemu_nbd_has_them_fast(tmp_path: Path, options: Any) -> None:
    """What would have to be written is refused by both; here nothing has changed then."""
    chance = random.Random(3)
    unit = 65536 // 32 if options.get("extended_l2") else options.get("cluster_size", 65536)
    paths = [tmp_path / "ours", tmp_path / "theirs"]
    for path in paths:
        qcowlib.create(path, SIZE, **options)
    refused = 0
    with qemu_nbd(paths[1], tmp_path, "--discard=unmap") as theirs, qcowlib.serve(paths[0], writable=True) as ours:
        clients = Client(str(ours.socket)), Client(path_of(theirs))
        for number in range(120):
            # A few clusters that nobody touched; some of them hold data.
            start = number * 6 * unit % (SIZE - 6 * unit)
            data = b"d" * unit * chance.randrange(1, 4)
            for client in clients:
                assert client.call(WRITE, start + unit, data=data) == 0
            offset = start + chance.randrange(4) * unit + chance.choice([0, 0, 512, unit // 2])
            length = chance.choice([512, unit, 2 * unit, 2 * unit - 512])
            flags = FAST | chance.choice([0, NO_HOLE])
            before = clients[0].read(start, 6 * unit)
            got = [client.call(ZEROES, offset, length, flags=flags) for client in clients]
            assert got[0] == got[1], (options, offset, length, number)
            if got[0] == ENOTSUP:
                refused += 1
                # Theirs may have done a part of it.
                assert clients[0].read(start, 6 * unit) == before
            for client in clients:
                assert client.call(ZEROES, start, 6 * unit) == 0
    assert 20 < refused < 100
    qemu_img("check", paths[0])


@pytest.mark.parametrize("kind", [TRIM, ZEROES])
def test_bitmaps_record_all_that_a_request_named(tmp_path: Path, kind: int) -> None:
    chance = random.Random(kind)
    paths = [tmp_path / "ours", tmp_path / "theirs"]
    for path in paths:
        qcowlib.create(path, SIZE)
        with qcowlib.open(path, "r+") as image:
            image.pwrite(b"x" * SIZE, 0)
            image.add_bitmap("b", 4096)
    with qemu_nbd(paths[1], tmp_path, "--discard=unmap") as theirs, qcowlib.serve(paths[0], writable=True) as ours:
        clients = Client(str(ours.socket)), Client(path_of(theirs))
        for _ in range(40):
            offset, length = chance.randrange(SIZE - 200_000), chance.choice([1, 512, 5000, 65536, 140_000])
            assert [client.call(kind, offset, length) for client in clients] == [0, 0]
        ours_at, theirs_at = (client.read(0, SIZE) for client in clients)
        assert ours_at == theirs_at
    run("sh", "-c", f"while ! qemu-img info {paths[1]} >/dev/null 2>&1; do :; done")
    recorded = []
    for path in paths:
        with qcowlib.open(path) as image:
            recorded.append(list(image.bitmap_extents("b")))
    assert recorded[0] == recorded[1] and len(recorded[0]) > 10
