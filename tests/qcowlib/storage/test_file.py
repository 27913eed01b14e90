# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What files have beyond the contract: what is refused, failed barriers, direct I/O, names."""

from __future__ import annotations

import errno
import os
import resource
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from qcowlib.errors import GateDenied, StorageError, UsageError
from qcowlib.storage.file import FileStorage, open_beneath, sync_directory
from qcowlib.testing.conformance import pattern, read


def test_a_directory_is_refused_with_the_text_of_qemu(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        FileStorage.open(tmp_path)
    assert str(caught.value) == f"'file' driver requires '{tmp_path}' to be a regular file"


def test_special_files_are_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    (tmp_path / "link").symlink_to("fifo")
    for name in ("/dev/zero", "/dev/tty", tmp_path / "fifo", tmp_path / "socket", tmp_path / "link"):
        for call in (FileStorage.open, FileStorage.create):
            with pytest.raises(StorageError) as caught:
                call(name)
            assert caught.value.errno in (errno.EINVAL, errno.ENXIO)
    server.close()


def test_errors_of_open_read_as_qemu_writes_them(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        FileStorage.open(tmp_path / "none")
    assert str(caught.value) == f"Could not open '{tmp_path}/none': No such file or directory"
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(StorageError, match="Could not create"):
        FileStorage.create(tmp_path / "no" / "folder")
    with pytest.raises(StorageError, match="No such file"):
        FileStorage.open("a\0b")
    with pytest.raises(StorageError):
        FileStorage.open("a\nb")


def test_descriptors_keep_their_access_and_stay_the_callers(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abcd")
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    storage = FileStorage.open(fd)
    assert not storage.writable
    assert read(storage, 1, 2) == b"bc"
    storage.close()
    assert os.pread(fd, 4, 0) == b"abcd"
    os.close(fd)
    with pytest.raises(StorageError):
        FileStorage.open(fd)
    for flags in (os.O_WRONLY, os.O_RDWR | os.O_APPEND):
        fd = os.open(tmp_path / "f", flags)
        with pytest.raises(UsageError):
            FileStorage.open(fd)
        os.close(fd)


def test_nothing_leaks_a_descriptor(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abcd")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with pytest.raises(UsageError):
            FileStorage.open(tmp_path / "f", cache="fast")
        FileStorage.open(tmp_path / "f").close()
        with pytest.raises(StorageError):
            FileStorage.open(tmp_path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_l5_after_a_failed_barrier_every_later_one_fails_and_reads_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = FileStorage.create(tmp_path / "f")
    storage.write(0, [b"data"])
    with monkeypatch.context() as patch:

        def fail(fd: int) -> None:
            raise OSError(errno.EIO, "injected")

        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(StorageError) as first:
            storage.flush()
    for _ in range(2):
        with pytest.raises(StorageError) as later:
            storage.flush()
        assert (later.value.errno, str(later.value)) == (errno.EIO, str(first.value))
    assert read(storage, 0, 4) == b"data"
    storage.close()


def test_l5_a_failed_write_through_fails_every_later_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = FileStorage.create(tmp_path / "f", cache="writethrough")
    storage.write(0, [b"data"])
    with monkeypatch.context() as patch:

        def fail(*args: object) -> int:
            raise OSError(errno.EIO, "injected")

        patch.setattr(os, "pwritev", fail)
        with pytest.raises(StorageError):
            storage.write(0, [b"more"])
    for call in (lambda: storage.write(0, [b"x"]), lambda: storage.zero(0, 1), storage.flush):
        with pytest.raises(StorageError, match="write failed"):
            call()
    assert read(storage, 0, 4) == b"data"
    storage.close()


def test_write_through_uses_the_kernel_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags: list[int] = []
    real = os.pwritev

    def spy(fd: int, buffers: list[memoryview], offset: int, flag: int = 0) -> int:
        flags.append(flag)
        return real(fd, buffers, offset, flag)

    monkeypatch.setattr(os, "pwritev", spy)
    for cache in ("writeback", "writethrough", "directsync"):
        storage = FileStorage.create(tmp_path / cache, cache=cache)
        storage.write(0, [bytes(4096)])
        assert (storage.fd_map() is None) == (cache != "writeback")
        storage.close()
    assert flags[0] == 0
    assert set(flags[1:]) == {os.RWF_DSYNC}


def test_short_transfers_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = FileStorage.create(tmp_path / "f")
    write, load = os.pwritev, os.preadv

    def short_write(fd: int, buffers: list[memoryview], offset: int, flag: int = 0) -> int:
        return write(fd, [buffers[0][:3]], offset, flag)

    def short_read(fd: int, buffers: list[memoryview], offset: int) -> int:
        return load(fd, [buffers[0][:3]], offset)

    monkeypatch.setattr(os, "pwritev", short_write)
    monkeypatch.setattr(os, "preadv", short_read)
    data = pattern(100)
    storage.write(5, [data[:50], data[50:]])
    parts = [bytearray(31), bytearray(69)]
    storage.read_into(5, parts)
    assert b"".join(parts) == data
    storage.close()


def test_a_full_disk_keeps_its_errno(tmp_path: Path) -> None:
    storage = FileStorage.create(tmp_path / "f")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(StorageError) as caught:
            storage.write(8000, [bytes(10000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.path == str(tmp_path / "f")
    storage.close()


def test_zero_frees_blocks_and_allocate_keeps_them(tmp_path: Path) -> None:
    storage = FileStorage.create(tmp_path / "f")
    storage.write(0, [pattern(1 << 20)])
    storage.flush()
    full = (tmp_path / "f").stat().st_blocks
    storage.zero(0, 1 << 20, allocate=True)
    assert (tmp_path / "f").stat().st_blocks >= full
    storage.zero(0, 1 << 20)
    assert (tmp_path / "f").stat().st_blocks < full // 4
    storage.write(0, [pattern(1 << 20)])
    storage.flush()
    storage.discard(0, 1 << 20)
    assert (tmp_path / "f").stat().st_blocks < full // 4
    storage.close()


def test_growing_by_zeros_allocates_nothing(tmp_path: Path) -> None:
    storage = FileStorage.create(tmp_path / "f")
    storage.zero(0, 1 << 30)
    assert (storage.size, (tmp_path / "f").stat().st_blocks) == (1 << 30, 0)
    assert [tuple(extent) for extent in storage.extents(0, 1 << 30)] == [("hole", 0, 1 << 30)]
    storage.close()


def test_zero_falls_back_to_writing_where_the_filesystem_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qcowlib.storage import syscalls

    def refuse(fd: int, mode: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "injected")

    monkeypatch.setattr(syscalls, "fallocate", refuse)
    storage = FileStorage.create(tmp_path / "f")
    data = pattern(3 << 20)
    storage.write(0, [data])
    storage.zero(100, 2 << 20)
    storage.discard(0, 100)
    assert read(storage, 0, 3 << 20) == data[:100] + bytes(2 << 20) + data[100 + (2 << 20) :]
    storage.zero(0, 4 << 20, allocate=True)
    assert read(storage, 0, 4 << 20) == bytes(4 << 20)
    storage.close()


@pytest.mark.parametrize("cache", ["none", "directsync"])
def test_direct_writers_of_one_block_lose_nothing(tmp_path: Path, cache: str) -> None:
    storage = FileStorage.create(tmp_path / "f", cache=cache)
    storage.resize(1 << 16)
    assert storage.align.offset in (512, 4096)

    def work(part: int) -> None:
        for index in range(part, 640, 4):
            storage.write(index * 100, [bytes([index % 255 + 1]) * 100])

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read(storage, 0, 64000) == b"".join(bytes([index % 255 + 1]) * 100 for index in range(640))
    storage.close()


@pytest.mark.real("losetup")
@pytest.mark.parametrize("sector", [512, 4096])
def test_devices_tell_their_size_and_sector_and_are_not_resized(
    loop_device: Callable[[int, int], str], sector: int
) -> None:
    path = loop_device(1 << 20, sector)
    storage = FileStorage.open(path, writable=True, cache="none")
    assert (storage.size, storage.align.offset, storage.is_block) == (1 << 20, sector, True)
    with pytest.raises(StorageError) as caught:
        storage.resize(2 << 20)
    assert str(caught.value) == f"{path}: Cannot grow device files"
    with pytest.raises(StorageError) as caught:
        storage.write((1 << 20) - 1, [b"xy"])
    assert caught.value.errno == errno.ENOSPC
    again = FileStorage.open(path)
    assert again.identity == storage.identity
    again.close()
    storage.close()


def test_big_direct_transfers_are_cut_into_pieces(tmp_path: Path) -> None:
    storage = FileStorage.create(tmp_path / "f", cache="none")
    data = pattern((3 << 20) + 77)
    storage.write(12345, [data])
    assert storage.size == 12345 + len(data)
    assert read(storage, 12345, len(data)) == data
    assert (tmp_path / "f").read_bytes() == bytes(12345) + data
    storage.close()


class TestBeneath:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "secret").write_bytes(b"secret")
        inner = tmp_path / "images"
        (inner / "sub").mkdir(parents=True)
        (inner / "plain").write_bytes(b"plain")
        (inner / "sub" / "deep").write_bytes(b"deep")
        (inner / "out").symlink_to("../secret")
        (inner / "inside").symlink_to("plain")
        (inner / "up").symlink_to("..")
        os.mkfifo(inner / "fifo")
        return inner

    def _open(self, folder: Path, name: str) -> bytes:
        root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fd = open_beneath(root, name)
            try:
                return os.pread(fd, 100, 0)
            finally:
                os.close(fd)
        finally:
            os.close(root)

    def test_names_inside_open(self, folder: Path) -> None:
        assert self._open(folder, "plain") == b"plain"
        assert self._open(folder, "./sub//deep") == b"deep"

    @pytest.mark.parametrize(
        "name",
        [
            "",
            ".",
            "/etc/passwd",
            "../secret",
            "sub/../plain",
            "out",
            "inside",
            "up/secret",
            "plain/x",
            "fifo",
            "sub",
            "a\x00b",
            "/proc/self/fd/0",
        ],
    )
    def test_anything_else_is_denied(self, folder: Path, name: str) -> None:
        before = len(list(Path("/proc/self/fd").iterdir()))
        with pytest.raises(GateDenied) as caught:
            self._open(folder, name)
        assert "\n" not in str(caught.value)
        assert len(list(Path("/proc/self/fd").iterdir())) == before

    def test_a_missing_file_is_an_error_of_the_system(self, folder: Path) -> None:
        with pytest.raises(StorageError, match="No such file"):
            self._open(folder, "sub/none")


def test_sync_directory_accepts_a_bare_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sync_directory("name")
    with pytest.raises(StorageError):
        sync_directory(str(tmp_path / "none" / "name"))
