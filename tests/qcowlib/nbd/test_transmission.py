# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The transmission phase over a channel in memory: against a model, with errors, with nonsense."""

from __future__ import annotations

import errno
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from struct import Struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qcowlib
from qcowlib.nbd.negotiation import Agreed
from qcowlib.nbd.transmission import Ended, Transmission
from qcowlib.storage.memory import MemoryStorage
from tests.qcowlib.nbd import wire
from tests.qcowlib.nbd.wire import CACHE, DF, DISC, FAST, FLUSH, FUA, NO_HOLE, ONE, READ, STATUS, TRIM, WRITE, ZEROES

MiB = 1 << 20
SIZE = 4 * MiB
EPERM, EIO, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP = 1, 5, 22, 28, 75, 95


class Failing(MemoryStorage):
    """Fails with *code* where it is set."""

    code: int | None = None

    def _fail(self) -> None:
        if self.code is not None:
            raise qcowlib.StorageError(self.code, path="failing")

    def read_into(self, offset: int, buffers: Sequence[Any]) -> None:
        self._fail()
        super().read_into(offset, buffers)

    def write(self, offset: int, buffers: Sequence[Any]) -> None:
        self._fail()
        super().write(offset, buffers)

    def flush(self) -> None:
        self._fail()
        super().flush()


@contextmanager
def export(size: int = SIZE, mode: Any = "r+", **given: Any) -> Iterator[tuple[qcowlib.Export, Failing]]:
    storage = Failing(b"", name="memory")
    storage.resize(size)
    image = qcowlib.open(storage, mode, format="raw")
    yield qcowlib.Export(image, **given), storage
    storage.code = None
    image.close()


def talk(
    to: qcowlib.Export, sent: bytes, *, structured: bool = False, names: Sequence[str] = (), portions: Any = ()
) -> bytes:
    channel = wire.Memory(sent, portions)
    chosen = tuple((to.info.contexts.index(name), name) for name in names)
    Transmission(channel, to, Agreed(to.info, structured, chosen)).run()
    return bytes(channel.received)


def simple(error: int, cookie: int = 1) -> bytes:
    return Struct(">IIQ").pack(wire.SIMPLE, error, cookie)


REQUESTS = st.lists(
    st.tuples(
        st.sampled_from([READ, WRITE, TRIM, ZEROES, FLUSH, CACHE]),
        st.integers(0, 9 * 512),
        st.integers(0, 3 * 512),
        st.booleans(),
        st.integers(0, 255),
    ),
    max_size=20,
)


@pytest.mark.fuzz
@given(REQUESTS, st.booleans(), st.lists(st.integers(1, 700), max_size=30))
def test_any_requests_are_answered_as_by_a_model(
    requests: list[tuple[int, int, int, bool, int]], structured: bool, portions: list[int]
) -> None:
    model, sent, expected = bytearray(8 * 512), bytearray(), []
    for cookie, (command, offset, length, fua, fill) in enumerate(requests):
        data = bytes([fill]) * length
        sent += wire.request(command, offset, length, flags=FUA * fua, cookie=cookie)
        sent += data if command == WRITE else b""
        error, answer = 0, b""
        if command != FLUSH and offset + length > len(model):
            error = ENOSPC if command in (WRITE, TRIM, ZEROES) else EINVAL
        elif command == READ:
            answer = bytes(model[offset : offset + length])
        elif command == WRITE:
            model[offset : offset + length] = data
        elif command in (TRIM, ZEROES):
            model[offset : offset + length] = bytes(length)
        expected.append((cookie, error, answer))
    with export(8 * 512) as (to, _):
        received = talk(to, bytes(sent) + wire.request(DISC), structured=structured, portions=portions)
    found, at = [], 0
    if structured:
        for chunk in wire.chunks(received):
            code = int.from_bytes(chunk.data[:4], "big") if chunk.kind & 1 << 15 else 0
            assert chunk.flags == 1
            found.append((chunk.cookie, code, chunk.data[8:] if chunk.kind == 1 else b""))
    while not structured and at < len(received):
        _, error, cookie = Struct(">IIQ").unpack_from(received, at)
        answer = received[at + 16 : at + 16 + len(expected[len(found)][2])]
        found.append((cookie, error, answer))
        at += 16 + len(answer)
    assert found == expected


def test_raw_trim_reads_as_zeros_in_the_model_because_it_does_so_here() -> None:
    with export(512) as (to, _):
        to.image.pwrite(b"x" * 512, 0)
        assert talk(to, wire.request(TRIM, 0, 512) + wire.request(READ, 0, 4))[16:] == simple(0) + bytes(4)


@pytest.mark.fuzz
@given(st.binary(max_size=200), st.booleans(), st.booleans())
def test_nonsense_ends_the_connection_and_nothing_else(noise: bytes, structured: bool, after_one: bool) -> None:
    with export(512) as (to, _):
        sent = (wire.request(READ, 0, 16) if after_one else b"") + noise
        try:
            talk(to, sent, structured=structured)
        except Ended:
            assert noise
        assert to.image.pread(512, 0) == bytes(512)


@pytest.mark.fuzz
@given(st.integers(0, 65535), st.integers(0, 65535), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
def test_any_request_is_answered_or_ends_the_connection(flags: int, command: int, offset: int, length: int) -> None:
    with export(512) as (to, _):
        sent = wire.request(command, offset, length, flags=flags) + wire.request(READ, 0, 1, cookie=2)
        try:
            received = talk(to, sent)
        except Ended:
            assert command == WRITE and length
        else:
            assert received[:4] == wire.SIMPLE.to_bytes(4, "big") or command == DISC


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ((READ, SIZE - 1, 2, 0), EINVAL),
        ((READ, 0, 32 * MiB + 1, 0), EINVAL),
        ((READ, 0, 1, NO_HOLE), EINVAL),
        ((CACHE, SIZE, 1, 0), EINVAL),
        ((TRIM, SIZE, 1, 0), ENOSPC),
        ((ZEROES, 0, SIZE + 1, 0), ENOSPC),
        ((ZEROES, 0, 512, FAST), ENOTSUP),
        ((FLUSH, 0, 0, FAST), EINVAL),
        ((STATUS, 0, 512, 0), EINVAL),
        ((8, 0, 0, 0), EINVAL),
        ((77, 0, 0, 0), EINVAL),
    ],
)
def test_what_is_wrong_has_the_error_of_the_protocol(request_: tuple[int, int, int, int], error: int) -> None:
    command, offset, length, flags = request_
    with export() as (to, _):
        sent = wire.request(command, offset, length, flags=flags) + wire.request(READ, 0, 1)
        assert talk(to, sent) == simple(error) + simple(0) + b"\0"


def test_refused_write_leaves_the_stream_in_step() -> None:
    with export(mode="r") as (to, _):
        length = 3 * MiB
        sent = wire.request(WRITE, 0, length) + bytes(length) + wire.request(READ, 0, 1, cookie=2)
        assert talk(to, sent) == simple(EPERM) + simple(0, 2) + b"\0"


@pytest.mark.parametrize(
    ("code", "error"), [(errno.EIO, EIO), (errno.ENOSPC, ENOSPC), (errno.ESTALE, EIO), (errno.ENOMEM, 12)]
)
@pytest.mark.parametrize("structured", [False, True])
def test_failing_storage_is_an_error_of_its_request_alone(code: int, error: int, structured: bool) -> None:
    sent = wire.request(READ, 0, 8) + wire.request(WRITE, 0, 4) + b"data" + wire.request(FLUSH)
    with export() as (to, storage):
        storage.code = code
        received = talk(to, sent, structured=structured)
        if structured:
            answers = list(wire.chunks(received))
            assert [int.from_bytes(chunk.data[:4], "big") for chunk in answers] == [error] * 3
            assert all(b"failing" in chunk.data for chunk in answers)
        else:
            assert received == simple(error) * 3


def test_long_structured_read_comes_in_chunks_that_cover_it() -> None:
    with export() as (to, _):
        to.image.pwrite(bytes(range(256)) * (SIZE // 256), 0)
        answers = list(wire.chunks(talk(to, wire.request(READ, 5, SIZE - 9), structured=True)))
        assert [chunk.flags for chunk in answers] == [0, 0, 0, 1]
        data = b"".join(chunk.data[8:] for chunk in answers)
        assert data == to.image.pread(SIZE - 9, 5)
        assert [int.from_bytes(chunk.data[:8], "big") for chunk in answers] == [5 + n * MiB for n in range(4)]
        whole = talk(to, wire.request(READ, 5, SIZE - 9))
        assert whole == simple(0) + data


def test_do_not_fragment_is_kept_or_refused() -> None:
    with export() as (to, _):
        sent = wire.request(READ, 0, MiB, flags=DF) + wire.request(READ, 0, MiB + 1, flags=DF)
        first, second = wire.chunks(talk(to, sent, structured=True))
        assert (first.flags, first.kind, len(first.data)) == (1, 1, MiB + 8)
        assert (second.flags, second.data[:4]) == (1, EOVERFLOW.to_bytes(4, "big"))


def test_simple_read_that_fails_behind_its_head_ends_the_connection() -> None:
    class Later(Failing):
        def read_into(self, offset: int, buffers: Sequence[Any]) -> None:
            if offset >= MiB:
                raise qcowlib.StorageError(errno.EIO, path="later")
            super().read_into(offset, buffers)

    storage = Later(b"", name="later")
    storage.resize(SIZE)
    with qcowlib.open(storage, format="raw") as image, pytest.raises(Ended, match="later"):
        talk(qcowlib.Export(image), wire.request(READ, 0, SIZE))


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", wire.request(WRITE, 0, 2**32 - 1)])
def test_who_breaks_the_rules_is_disconnected(sent: bytes) -> None:
    with export() as (to, _), pytest.raises(Ended):
        talk(to, sent)


@pytest.mark.bare
def test_memory_of_a_connection_is_bounded_whatever_it_asks() -> None:
    with export(40 * MiB) as (to, _):
        length = 32 * MiB
        sent = (wire.request(WRITE, 0, length) + bytes(length)) + wire.request(CACHE, 0, length)

        class Sink(wire.Memory):
            def sendmsg(self, buffers: Any) -> int:
                return sum(len(memoryview(buffer)) for buffer in buffers)

        channel = Sink(sent + wire.request(READ, 0, length) * 4)
        tracemalloc.start()
        Transmission(channel, to, Agreed(to.info, True, ())).run()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * MiB


@pytest.mark.parametrize("flags", [0, FUA])
def test_flush_and_fua_reach_the_storage(flags: int) -> None:
    with export() as (to, storage):
        flushed: list[bytes] = []
        storage.flush = lambda: flushed.append(bytes(to.image.pread(4, 0)))  # type: ignore[method-assign]
        talk(to, wire.request(WRITE, 0, 4, flags=flags) + b"data")
        assert flushed == [b"data"] * bool(flags)
        talk(to, wire.request(FLUSH))
        assert flushed == [b"data"] * (1 + bool(flags))
        del storage.flush


def statuses(received: bytes) -> dict[int, list[tuple[int, int]]]:
    found = {}
    for chunk in wire.chunks(received):
        pairs = list(Struct(">II").iter_unpack(chunk.data[4:]))
        found[int.from_bytes(chunk.data[:4], "big")] = pairs
    return found


def test_block_status_answers_all_contexts_and_one_extent_where_asked() -> None:
    storage = MemoryStorage(b"", name="memory")
    qcowlib.create(storage, SIZE)
    with qcowlib.open(storage, "r+") as image:
        image.add_bitmap("b0", 65536)
        image.pwrite(b"x" * MiB, MiB)
        to = qcowlib.Export(image, bitmaps=["b0"])
        names = to.info.contexts
        found = statuses(talk(to, wire.request(STATUS, 0, SIZE), structured=True, names=names))
        assert found == {
            0: [(MiB, 3), (MiB, 0), (2 * MiB, 3)],
            1: [(MiB, 0), (MiB, 1), (2 * MiB, 0)],
            2: [(MiB, 0), (MiB, 1), (2 * MiB, 0)],
        }
        sent = wire.request(STATUS, MiB + 512, MiB, flags=ONE)
        assert statuses(talk(to, sent, structured=True, names=names[::2])) == {
            0: [(MiB - 512, 0)],
            2: [(MiB - 512, 1)],
        }


def test_names_and_bitmaps_that_cannot_be_exported_are_refused() -> None:
    storage = MemoryStorage(b"", name="memory")
    qcowlib.create(storage, SIZE)
    with qcowlib.open(storage) as image:
        for wrong in ({"name": "n" * 4097}, {"name": "two\nlines"}, {"bitmaps": ["no"]}, {"read_only": False}):
            with pytest.raises(qcowlib.UsageError):
                qcowlib.Export(image, **wrong)  # type: ignore[arg-type]
