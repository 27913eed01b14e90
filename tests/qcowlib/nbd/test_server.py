# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The server on real sockets: who may connect, how many, how it ends, what survives."""

from __future__ import annotations

import os
import random
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qcowlib
from qcowlib.nbd.address import Listener, activated_descriptor
from qcowlib.storage.memory import MemoryStorage
from qcowlib.testing.crash import CrashState, Finding, assert_crash_safe
from qcowlib.testing.recorder import OpLog
from tests.qcowlib.nbd import wire
from tests.qcowlib.nbd.wire import FLUSH, FUA, READ, TRIM, WRITE, ZEROES, Client

MiB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qcowlib.create(path, 4 * MiB)
    return path


class Events:
    """What a server told; :meth:`wait` returns once it told *count* of a kind."""

    def __init__(self) -> None:
        self.all: list[dict[str, Any]] = []
        self._news = threading.Condition()

    def __call__(self, event: dict[str, Any]) -> None:
        with self._news:
            self.all.append(event)
            self._news.notify_all()

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.all if event["event"] == kind]

    def wait(self, kind: str, count: int = 1) -> list[dict[str, Any]]:
        with self._news:
            assert self._news.wait_for(lambda: len(self.of(kind)) >= count, 30)
            return self.of(kind)


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def served(disk: Path, events: Events) -> Iterator[qcowlib.NbdServer]:
    with qcowlib.serve(disk, writable=True, on_event=events) as server:
        yield server


def test_socket_is_the_owners_alone_and_goes_with_the_server(disk: Path, tmp_path: Path) -> None:
    with qcowlib.serve(disk) as server:
        assert server.socket is not None
        private = Path(server.socket)
        assert stat.S_IMODE(private.stat().st_mode) == 0o600
        assert stat.S_IMODE(private.parent.stat().st_mode) == 0o700
    assert not private.parent.exists()
    with qcowlib.serve(disk, socket=tmp_path / "here"):
        assert stat.S_IMODE((tmp_path / "here").stat().st_mode) == 0o600
    assert not (tmp_path / "here").exists()


def test_stale_socket_is_taken_over_and_nothing_else_is(disk: Path, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with qcowlib.serve(disk, socket=path) as server:
        with pytest.raises(qcowlib.Busy):
            qcowlib.serve(disk, socket=path)
        assert Client(str(server.socket)).read(0, 4) == bytes(4)
    path.write_text("precious")
    with pytest.raises(qcowlib.StorageError):
        qcowlib.serve(disk, socket=path)
    assert path.read_text() == "precious"


def test_addresses_that_cannot_be_are_refused(disk: Path, tmp_path: Path) -> None:
    for wrong in (
        {"socket": tmp_path / ("n" * 120)},
        {"port": 1 << 16},
        {"port": 0, "socket": "x"},
        {"shared": 0},
        {"shared": 1025},
        {"fd": 0},
    ):
        with pytest.raises((qcowlib.UsageError, qcowlib.StorageError)):
            qcowlib.serve(disk, **wrong)  # type: ignore[arg-type]
    # Nothing of that kept the image open.
    qcowlib.open(disk, "r+").close()


def test_tcp_is_loopback(disk: Path) -> None:
    with qcowlib.serve(disk, port=0) as server:
        assert server.port and server.uri == f"nbd://127.0.0.1:{server.port}/"
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            assert client.recv(8) == b"NBDMAGIC"


def test_descriptor_stays_the_callers(disk: Path) -> None:
    listener = Listener()
    for _ in range(2):
        with qcowlib.serve(disk, fd=listener.socket.fileno()):
            assert Client(str(listener.path)).read(0, 4) == bytes(4)
    listener.close()


def test_activation_is_for_this_process_and_one_descriptor() -> None:
    me = str(os.getpid())
    assert activated_descriptor({}) is None
    assert activated_descriptor({"LISTEN_FDS": "1", "LISTEN_PID": "1"}) is None
    assert activated_descriptor({"LISTEN_FDS": "1", "LISTEN_PID": me}) == 3
    with pytest.raises(qcowlib.UsageError):
        activated_descriptor({"LISTEN_FDS": "2", "LISTEN_PID": me})


def test_several_exports_by_name_and_the_first_without(tmp_path: Path) -> None:
    images: dict[str, Any] = {}
    for name in ("a", "b"):
        qcowlib.create(tmp_path / name, MiB)
        with qcowlib.open(tmp_path / name, "r+") as image:
            image.pwrite(name.encode(), 0)
        images[name] = tmp_path / name
    with qcowlib.serve(images) as server:
        assert [Client(str(server.socket), name).read(0, 1) for name in ("a", "b", "")] == [b"a", b"b", b"a"]
        assert server.uri_of("b").startswith("nbd+unix:///b?")


def test_what_one_connection_wrote_and_another_flushed_is_durable(served: qcowlib.NbdServer, disk: Path) -> None:
    one, two = Client(str(served.socket)), Client(str(served.socket))
    assert one.call(WRITE, 5, data=b"hello") == 0
    assert two.read(5, 5) == b"hello"
    assert two.call(FLUSH) == 0
    with qcowlib.open(disk, lock=False) as copy:
        assert copy.pread(5, 5) == b"hello"


@pytest.mark.crash
def test_every_cut_keeps_what_was_flushed_over_the_wire() -> None:
    """Invariant: I6, also where another connection flushed than wrote."""
    storage, log = MemoryStorage(b"", name="memory"), OpLog()
    qcowlib.create(storage, 4 * MiB)
    promised: list[tuple[int, int, bytes]] = []
    with (
        qcowlib.open(log.record(storage), "r+") as image,
        qcowlib.serve(image, writable=True) as server,
    ):
        client, other = Client(str(server.socket)), Client(str(server.socket))
        assert client.call(WRITE, MiB, data=b"a" * 4096) == 0
        assert other.call(FLUSH) == 0
        promised.append((log.position, MiB, b"a" * 4096))
        assert client.call(WRITE, 2 * MiB, data=b"b" * 4096, flags=FUA) == 0
        promised.append((log.position, 2 * MiB, b"b" * 4096))
        assert client.call(WRITE, 3 * MiB, data=b"c" * 4096) == 0

    def judge(state: CrashState) -> list[Finding]:
        with qcowlib.open(MemoryStorage(state.images[0]), format="qcow2") as image:
            findings = [Finding("CORRUPT", "check")] * bool(image.check().corruptions)
            for position, offset, data in promised:
                if state.first >= position and image.pread(len(data), offset) != data:
                    findings.append(Finding("LOST", f"{len(data)} bytes at {offset}"))
        return findings

    assert assert_crash_safe(log, judge).distinct > 10


def test_stop_answers_what_is_at_hand_and_makes_it_durable(disk: Path, events: Events) -> None:
    server = qcowlib.serve(disk, writable=True, on_event=events)
    client = Client(str(server.socket))
    client.socket.sendall(wire.request(WRITE, 0, 4) + b"last")
    client.take(16)
    client.socket.sendall(wire.request(WRITE, 0, 4) + b"ha")
    server.stop()
    server.stop()
    assert events.of("disconnected")[0]["problem"] == "the client went in the middle of a write"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("nbd-")]
    with qcowlib.open(disk) as image:
        assert image.pread(4, 0) == b"last"


def test_stop_does_not_wait_for_a_client_that_does_not_read(
    served: qcowlib.NbdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcowlib.nbd.server._GRACE_SECONDS", 0.0)
    client = Client(str(served.socket))
    client.socket.sendall(wire.request(READ, 0, 4 * MiB) * 8)
    served.stop()
    assert served.connections == 0


def test_more_clients_than_shared_wait_for_their_turn(disk: Path, events: Events) -> None:
    with qcowlib.serve(disk, shared=2, on_event=events) as server:
        one, two = Client(str(server.socket)), Client(str(server.socket))
        late = socket.socket(socket.AF_UNIX)
        late.connect(str(server.socket))
        events.wait("negotiated", 2)
        assert server.connections == 2 and len(events.of("connected")) == 2
        one.close()
        assert late.recv(8) == b"NBDMAGIC"
        assert two.read(0, 4) == bytes(4)
        late.close()


def test_who_does_not_negotiate_in_time_is_dropped(disk: Path, events: Events) -> None:
    with qcowlib.open(disk) as image:
        exports = [qcowlib.Export(image)]
        with qcowlib.NbdServer(exports, shared=1, handshake_timeout=0.05, on_event=events) as server:
            with socket.socket(socket.AF_UNIX) as idle:
                idle.connect(str(server.socket))
                assert "in time" in events.wait("disconnected")[0]["problem"]
            server.stop()


def test_who_takes_no_answer_makes_room_for_the_next_one(disk: Path, events: Events) -> None:
    with qcowlib.serve(disk, shared=1, timeout=0.05, on_event=events) as server:
        greedy = Client(str(server.socket))
        greedy.socket.sendall(wire.request(READ, 0, 4 * MiB) * 8)
        late = Client(str(server.socket))
        assert "took no answer" in events.wait("disconnected")[0]["problem"]
        assert late.read(0, 4) == bytes(4)
        greedy.close()


@pytest.mark.parametrize("part", [wire.request(READ, 0, 1)[:-1], wire.request(WRITE, 0, 8) + b"half"])
def test_who_leaves_a_request_half_sent_is_dropped(disk: Path, events: Events, part: bytes) -> None:
    with qcowlib.serve(disk, writable=True, timeout=0.05, on_event=events) as server:
        client = Client(str(server.socket))
        client.socket.sendall(part)
        assert "did not finish a request" in events.wait("disconnected")[0]["problem"]
    with qcowlib.open(disk) as image:
        assert image.pread(8, 0) == bytes(8)


def test_who_asks_nothing_stays(disk: Path, events: Events) -> None:
    with qcowlib.serve(disk, timeout=0.01, on_event=events) as server:
        quiet = Client(str(server.socket))
        for _ in range(2):
            # Time passes: another one is dropped meanwhile.
            half = Client(str(server.socket))
            half.socket.sendall(b"\x25")
            assert half.socket.recv(1) == b""
        assert quiet.read(0, 4) == bytes(4)
        assert len(events.of("disconnected")) <= 2


def test_who_closes_its_sending_side_is_answered_all_that_it_asked(served: qcowlib.NbdServer) -> None:
    client = Client(str(served.socket))
    client.socket.sendall(wire.request(WRITE, 0, 4) + b"half" + wire.request(READ, 0, 4) * 3)
    client.socket.shutdown(socket.SHUT_WR)
    client.take(16)
    assert [client.take(20)[16:] for _ in range(3)] == [b"half"] * 3
    assert client.socket.recv(1) == b""


def test_who_only_negotiates_and_never_listens_is_dropped(disk: Path, events: Events) -> None:
    with qcowlib.open(disk) as image:
        exports = [qcowlib.Export(image, f"{number}{'n' * 4000}") for number in range(20)]
        with (
            qcowlib.NbdServer(exports, handshake_timeout=0.2, on_event=events) as server,
            socket.socket(socket.AF_UNIX) as deaf,
        ):
            deaf.connect(str(server.socket))
            # 16 bytes ask for 80 KiB.
            deaf.sendall(b"\0\0\0\3" + wire.option(3) * 500)
            assert "in time" in events.wait("disconnected")[0]["problem"]


@pytest.mark.parametrize("timeout", [0, -1, 1e12])
def test_time_limits_that_make_no_sense_are_refused(disk: Path, timeout: float) -> None:
    with pytest.raises(qcowlib.UsageError, match="seconds"):
        qcowlib.serve(disk, timeout=timeout)


def test_once_ends_with_the_last_client(disk: Path, events: Events) -> None:
    with qcowlib.serve(disk, once=True, on_event=events) as server:
        one, two = Client(str(server.socket)), Client(str(server.socket))
        one.close()
        events.wait("disconnected")
        assert not server.wait(0)
        two.close()
        assert server.wait(30)


def test_nonsense_on_one_connection_is_told_and_harms_no_other(served: qcowlib.NbdServer, events: Events) -> None:
    good, bad = Client(str(served.socket)), Client(str(served.socket))
    bad.socket.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert "not a request" in events.wait("disconnected")[0]["problem"]
    assert good.read(0, 4) == bytes(4)
    good.close()
    assert events.wait("disconnected", 2)[1] == {
        "event": "disconnected",
        "client": 1,
        "requests": 1,
        "problem": None,
    }


def test_an_event_handler_that_fails_disturbs_nobody(disk: Path) -> None:
    def handler(event: object) -> None:
        raise RuntimeError

    with qcowlib.serve(disk, on_event=handler) as server:
        assert Client(str(server.socket)).read(0, 4) == bytes(4)


def test_an_open_image_stays_the_callers(disk: Path) -> None:
    with qcowlib.open(disk, "r+") as image:
        with qcowlib.serve(image, name="mine", writable=True) as server:
            client = Client(str(server.socket), "mine")
            assert client.call(WRITE, 0, data=b"x") == 0
            assert image.pread(1, 0) == b"x"
        assert not image.closed
        with pytest.raises(qcowlib.UsageError, match="nothing to export"):
            qcowlib.serve({})


def test_recorded_bitmaps_know_what_came_over_the_wire(disk: Path) -> None:
    with qcowlib.open(disk, "r+") as image:
        image.add_bitmap("b", 65536)
    with qcowlib.serve(disk, writable=True) as server:
        client = Client(str(server.socket))
        assert client.call(WRITE, MiB, data=b"x") == 0
        # No cluster is given back: recorded all the same, as by qemu.
        assert client.call(TRIM, 2 * MiB + 4096, 512) == 0
        assert client.call(ZEROES, 3 * MiB - 1, 2) == 0
    with qcowlib.open(disk) as image:
        unit = 65536
        assert list(image.bitmap_extents("b")) == [(MiB, unit), (2 * MiB, unit), (3 * MiB - unit, 2 * unit)]


def test_request_to_stop_that_comes_late_does_nothing(disk: Path) -> None:
    server = qcowlib.serve(disk)
    assert not server.wait(0)
    server.stop()
    server.request_stop()
    assert server.wait(0)


@pytest.mark.fuzz
def test_a_crowd_of_strangers_leaves_nothing_behind(disk: Path, events: Events) -> None:
    chance = random.Random(3)
    openings = (
        lambda: chance.randbytes(chance.randrange(1, 300)),
        lambda: b"\0\0\0\3" + wire.option(chance.randrange(12), chance.randbytes(chance.randrange(80))),
        lambda: b"\0\0\0\3" + wire.option(1) + wire.request(chance.randrange(9), 0, 512, flags=chance.randrange(32)),
        lambda: b"\0\0\0\3" + wire.option(1) + wire.request(READ, 0, 4 * MiB) * 20,
    )
    with qcowlib.serve(disk, writable=True, shared=8, on_event=events) as server:
        good = Client(str(server.socket))
        for number in range(200):
            with socket.socket(socket.AF_UNIX) as stranger:
                stranger.connect(str(server.socket))
                assert stranger.recv(18)[:8] == b"NBDMAGIC"
                stranger.sendall(openings[number % 4]())
        assert good.call(WRITE, 0, data=b"good") == 0
        gone = events.wait("disconnected", 200)
    assert not [event for event in gone if "internal" in (event["problem"] or "")]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("nbd-")]
    with qcowlib.open(disk) as image:
        assert image.pread(4, 0) == b"good" and not image.check().corruptions
