# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Raw images: guest offset equals file offset.

Invariant: the bytes are never interpreted; a raw image stays raw whatever it
contains (N4).  The size is that of the storage, rounded up to a sector as qemu
does.
"""

from __future__ import annotations

from qcowlib.errors import UsageError
from qcowlib.storage.space import reserve_space
from qcowlib.storage.wrapper import guest_side
from qcowlib.units import SECTOR, round_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qcowlib.qcow2.create import Preallocation
    from qcowlib.runtime import Runtime
    from qcowlib.storage.base import Storage

__all__ = ["RawImage", "RawWriter"]


class RawImage:
    """A layer without any mapping."""

    format = "raw"

    def __init__(self, runtime: Runtime, storage: Storage, *, writable: bool = False) -> None:
        self.runtime = runtime
        self.storage = self.data = guest_side(storage)
        self.writable = writable
        #: Whether the bytes at an offset are the guest's: not so inside a LUKS file.
        self.plain: bool = getattr(storage, "plain", True)

    @property
    def size(self) -> int:
        """Guest bytes."""
        return round_up(self.storage.size, SECTOR)

    def read_run(self, kind: int, host: int, guest: int, length: int, view: memoryview) -> None:
        """Fill *view* from *host*; the rest of a last sector reads as zeros."""
        self.storage.read_into(host, [view])

    async def flush(self) -> None:
        """Make finished writes durable."""
        if self.writable:
            await self.runtime.io(self.storage.flush)

    async def finish(self) -> None:
        """Make everything durable at the end of a session."""
        await self.flush()


class RawWriter:
    """Writing a raw image; the same calls as the QCOW2 writer."""

    def __init__(self, image: RawImage) -> None:
        self.image = image

    async def write(self, offset: int, data: memoryview) -> None:
        """Write *data* at *offset*."""
        await self.image.runtime.io(self.image.storage.write, offset, [data])

    async def write_many(self, pieces: list[tuple[int, memoryview]]) -> None:
        """Write each ``(offset, data)``."""
        for offset, data in pieces:
            await self.write(offset, data)

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make the range read as zeros, as a hole where *unmap* allows."""
        storage = self.image.storage
        await self.image.runtime.io(lambda: storage.zero(offset, length, allocate=not unmap))

    async def discard(self, offset: int, length: int) -> None:
        """Give the range back to the storage."""
        await self.image.runtime.io(self.image.storage.discard, offset, length)

    async def resize(self, size: int, *, preallocation: Preallocation, shrink: bool) -> None:
        """Change the length; *preallocation* falloc or full gives new bytes space."""
        image = self.image
        old = image.storage.size
        if preallocation == "metadata":
            raise UsageError("Unsupported preallocation mode 'metadata'", path=image.storage.name)
        if size < old and preallocation != "off":
            raise UsageError("Preallocation can't be used for shrinking an image", path=image.storage.name)
        if size < old and not shrink:
            raise UsageError("Use the --shrink option to perform a shrink operation.", path=image.storage.name)
        await image.runtime.io(image.storage.resize, size)
        if preallocation != "off" and size > old:
            full = preallocation == "full"
            await image.runtime.io(lambda: reserve_space(image.storage, old, size - old, full=full))
