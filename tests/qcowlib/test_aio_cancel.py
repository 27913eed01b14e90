# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Cancelled tasks of the asyncio engine: their threads never write where somebody else writes by then (I4)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest

from qcowlib import aio
from qcowlib.errors import StorageError
from qcowlib.qcow2.create import CreateOptions, create
from qcowlib.storage.memory import MemoryStorage
from qcowlib.testing.reference import RefImage, reference_check

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class HeldStorage(MemoryStorage):
    """A write that has *marker* in it, or a flush when *hold_flush* is set, waits in its thread until released."""

    __slots__ = ("entered", "fail", "hold_flush", "marker", "released")

    def __init__(self) -> None:
        super().__init__()
        self.marker = b""
        self.hold_flush = False
        self.fail = False
        self.entered = threading.Event()
        self.released = threading.Event()

    def _hold(self) -> None:
        self.entered.set()
        assert self.released.wait(60)

    def write(self, offset: int, buffers: Sequence[ReadableBuffer]) -> None:
        if self.marker and any(self.marker in bytes(buffer) for buffer in buffers):
            self._hold()
        super().write(offset, buffers)

    def flush(self) -> None:
        if self.hold_flush:
            self._hold()
            if self.fail:
                raise StorageError(5, path=self.name, operation="flush")
        super().flush()


async def opened() -> tuple[HeldStorage, aio.Image]:
    storage = HeldStorage()
    create(storage, CreateOptions(size=1 << 20, cluster_size=4096))
    return storage, await aio.open(storage, "r+", format="qcow2")


async def entered(storage: HeldStorage) -> None:
    assert await asyncio.get_running_loop().run_in_executor(None, storage.entered.wait, 60)


def test_space_of_a_cancelled_write_is_not_given_away_while_its_thread_writes() -> None:
    async def work() -> None:
        storage, image = await opened()
        await image.pwrite(b"a" * 4096, 0)
        storage.marker = b"late"
        cancelled = asyncio.create_task(image.pwrite(b"late" * 1024, 8192))
        await entered(storage)
        cancelled.cancel()
        other = asyncio.create_task(image.pwrite(b"c" * 4096, 65536))
        await other
        storage.released.set()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert await image.pread(4096, 65536) == b"c" * 4096
        assert await image.pread(4096, 8192) == bytes(4096)
        await image.close()
        result = reference_check(RefImage(storage.getvalue()))
        assert (result.corruptions, result.leaks) == (0, 0)

    asyncio.run(work())


@pytest.mark.parametrize("fail", [False, True])
def test_a_cancelled_flush_loses_neither_changes_nor_its_failure(fail: bool) -> None:
    async def work() -> None:
        storage, image = await opened()
        await image.pwrite(b"a" * 4096, 0)
        storage.hold_flush, storage.fail = True, fail
        flush = asyncio.create_task(image.flush())
        await entered(storage)
        flush.cancel()
        storage.released.set()
        with pytest.raises(StorageError if fail else asyncio.CancelledError):
            await flush
        storage.hold_flush = False
        if fail:
            # What the device holds is unknown: nothing is published any more.
            with pytest.raises(StorageError):
                await image.flush()
            with pytest.raises(StorageError):
                await image.close()
            return
        await image.flush()
        assert await image.pread(4096, 0) == b"a" * 4096
        await image.close()
        result = reference_check(RefImage(storage.getvalue()))
        assert (result.corruptions, result.leaks) == (0, 0)

    asyncio.run(work())
