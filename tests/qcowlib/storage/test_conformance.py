# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Every storage passes the contract, in each cache mode and on each sector size."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from qcowlib.storage.base import Storage
from qcowlib.storage.file import FileStorage
from qcowlib.storage.linear import LinearStorage, Segment
from qcowlib.storage.memory import MemoryStorage
from qcowlib.storage.view import StorageView
from qcowlib.testing.conformance import SIZE, StorageContract
from qcowlib.testing.faults import FaultPlan, FaultStorage
from qcowlib.testing.recorder import OpLog


class TestMemory(StorageContract):
    def make(self, size: int) -> Storage:
        return MemoryStorage(size)

    def make_readonly(self) -> Storage:
        return MemoryStorage(SIZE, writable=False)


class TestFixedMemory(StorageContract):
    growable = False

    def make(self, size: int) -> Storage:
        return MemoryStorage(size, growable=False)


class FileContract(StorageContract):
    cache = "writeback"

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        self.count = 0

    def make(self, size: int) -> Storage:
        self.count += 1
        storage = FileStorage.create(self.folder / f"image{self.count}", cache=self.cache)
        storage.resize(size)
        return storage

    def make_readonly(self) -> Storage:
        self.make(SIZE).close()
        return FileStorage.open(self.folder / f"image{self.count}", cache=self.cache)


class TestFile(FileContract):
    pass


class TestFileThrough(FileContract):
    cache = "writethrough"


class TestFileUnsafe(FileContract):
    cache = "unsafe"


class TestFileDirect(FileContract):
    cache = "none"


class TestFileDirectSync(FileContract):
    cache = "directsync"


class DeviceContract(StorageContract):
    growable = False
    cache = "writeback"
    sector = 512

    @pytest.fixture(autouse=True)
    def _devices(self, loop_device: Callable[[int, int], str]) -> None:
        self.attach = loop_device

    def make(self, size: int) -> Storage:
        return FileStorage.open(self.attach(size, self.sector), writable=True, cache=self.cache)

    def make_readonly(self) -> Storage:
        return FileStorage.open(self.attach(SIZE, self.sector), cache=self.cache)


@pytest.mark.real("losetup")
class TestDevice512(DeviceContract):
    pass


@pytest.mark.real("losetup")
class TestDevice4096(DeviceContract):
    sector = 4096


@pytest.mark.real("losetup")
class TestDevice512Direct(DeviceContract):
    cache = "none"


@pytest.mark.real("losetup")
class TestDevice4096Direct(DeviceContract):
    cache = "none"
    sector = 4096


class TestView(StorageContract):
    growable = False

    def make(self, size: int) -> Storage:
        return StorageView(MemoryStorage(bytes(777) + bytes(size) + b"x" * 100), 777, size)

    def make_readonly(self) -> Storage:
        return StorageView(MemoryStorage(SIZE + 5), 5, SIZE, writable=False)


class TestViewOfFile(FileContract):
    growable = False

    def make(self, size: int) -> Storage:
        return StorageView(super().make(size + 8192), 4096, size, owned=True)

    def make_readonly(self) -> Storage:
        self.make(SIZE).close()
        return StorageView(FileStorage.open(self.folder / f"image{self.count}"), 0, SIZE, owned=True)


class TestLinear(StorageContract):
    growable = False

    def make(self, size: int) -> Storage:
        below = MemoryStorage(size * 2)
        other = MemoryStorage(bytes(100) + bytes(size) + b"y" * 10)
        cuts = [0, 1, 3000, 3000, 4097, size // 2, size]
        parts = list(pairwise(cuts))
        segments = [
            Segment(below, size + start, end - start) if index % 2 else Segment(other, 100 + start, end - start)
            for index, (start, end) in enumerate(parts)
        ]
        storage = LinearStorage(segments[:3])
        storage.append(segments[3:])
        return storage

    def make_readonly(self) -> Storage:
        return LinearStorage([Segment(MemoryStorage(SIZE, writable=False), 0, SIZE)])


class TestLinearOfFiles(FileContract):
    growable = False

    def make(self, size: int) -> Storage:
        first, second = super().make(size), super().make(size)
        half = size // 2
        return LinearStorage([Segment(second, half, half), Segment(first, 0, half)], owned=True)

    def make_readonly(self) -> Storage:
        self.make(SIZE).close()
        below = FileStorage.open(self.folder / f"image{self.count}")
        return LinearStorage([Segment(below, 0, SIZE)], owned=True)


class TestRecorded(StorageContract):
    def make(self, size: int) -> Storage:
        return OpLog().record(MemoryStorage(size))

    def make_readonly(self) -> Storage:
        return OpLog().record(MemoryStorage(SIZE, writable=False))


class TestFaultless(StorageContract):
    def make(self, size: int) -> Storage:
        return FaultStorage(MemoryStorage(size), FaultPlan())

    def make_readonly(self) -> Storage:
        return FaultStorage(MemoryStorage(SIZE, writable=False), FaultPlan())
