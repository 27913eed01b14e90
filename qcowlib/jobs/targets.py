# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Where a copy goes: a raw storage, a new QCOW2 file, or an open image.

A worker hands its actions to :meth:`Target.place` in its turn and what that
returned to :meth:`Target.store` afterwards, beside other workers.

Invariant: places are decided in guest order only, so the bytes of the target
do not depend on the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from qcowlib.driver import HOLE, ZERO
from qcowlib.qcow2.build import Builder
from qcowlib.qcow2.image import Qcow2Image
from qcowlib.units import SECTOR, MiB, round_down, round_up

if TYPE_CHECKING:
    from qcowlib.image import Image
    from qcowlib.ondisk import Header
    from qcowlib.storage.base import Storage

    Buffer = memoryview | bytes

__all__ = ["Action", "BuildTarget", "ImageTarget", "Placed", "RawTarget", "Target", "WriteBehind"]


_ZEROS = memoryview(bytes(2 * MiB))
_BEHIND = 16 * MiB


class Action(NamedTuple):
    """Write *data* at guest *offset*; ``None``: make *length* bytes zero; *packed*: data is one compressed cluster."""

    offset: int
    length: int
    data: Buffer | None
    packed: bool = False


class Placed(NamedTuple):
    """*buffers* belong at *offset* of the target's data storage."""

    offset: int
    buffers: list[Buffer]


class Target(Protocol):
    """What a copy writes to."""

    ordered: bool
    """Whether :meth:`place` must see the units in guest order."""

    def place(self, actions: Sequence[Action]) -> list[Placed]:
        """Decide where *actions* go (one caller at a time)."""

    def store(self, placed: Sequence[Placed]) -> None:
        """Write what was placed (any number of callers)."""

    def finish(self) -> None:
        """Complete the target; durable on return."""


def _written(offset: int, length: int) -> Iterator[Action]:
    """Zeros as data, in pieces."""
    end = offset + length
    for start in range(offset, end, len(_ZEROS)):
        count = min(len(_ZEROS), end - start)
        yield Action(start, count, _ZEROS[:count])


class RawTarget:
    """Guest offsets are file offsets."""

    ordered = False

    def __init__(self, storage: Storage) -> None:
        self.data = storage

    def place(self, actions: Sequence[Action]) -> list[Placed]:
        placed = []
        for offset, length, data, _ in actions:
            if data is None:
                self.data.zero(offset, length)
            else:
                placed.append(Placed(offset, [data]))
        return placed

    def store(self, placed: Sequence[Placed]) -> None:
        for offset, buffers in placed:
            self.data.write(offset, buffers)

    def finish(self) -> None:
        self.data.flush()


class BuildTarget:
    """A new QCOW2 image, written front to back; *data* is its external data file."""

    ordered = True

    def __init__(self, storage: Storage, header: Header, *, data: Storage | None, zeroed: bool) -> None:
        self.data = data if data is not None else storage
        self._external = data is not None
        self._builder = Builder(storage, header, zeroed=zeroed)
        self._cluster_bits = header.cluster_bits
        self._version = header.version

    def place(self, actions: Sequence[Action]) -> list[Placed]:
        placed: list[Placed] = []
        end = -1
        for offset, length, data, packed in self._whole(actions):
            if data is None:
                self._builder.place_zero(offset, length)
                continue
            if packed:
                places = [(self._builder.place_compressed(offset >> self._cluster_bits, len(data)), len(data))]
            else:
                places = self._builder.place_data(offset, length)
            start = 0
            for host, count in places:
                part = data if count == len(data) else memoryview(data)[start : start + count]
                if host == end:
                    placed[-1].buffers.append(part)
                else:
                    placed.append(Placed(host, [part]))
                end = host + count
                start += count
        return placed

    def _whole(self, actions: Sequence[Action]) -> Iterator[Action]:
        """Version 2 has no zero clusters: zeros over a backing file are data there."""
        for action in actions:
            if action.data is not None or self._version > 2:
                yield action
            else:
                yield from _written(action.offset, action.length)

    def store(self, placed: Sequence[Placed]) -> None:
        for offset, buffers in placed:
            self.data.write(offset, buffers)

    def finish(self) -> None:
        data = self.data
        if self._external:
            data.flush()
        elif data.size % SECTOR and not getattr(data, "is_block", False):
            # Source: qemu-img convert -c leaves whole sectors.
            data.resize(round_up(data.size, SECTOR))
        self._builder.finish()


class WriteBehind:
    """Has storage write what was copied while more is copied, so that the barrier at the end has little to wait for.

    The order of writes is the barriers' matter and stays what it is.
    """

    def __init__(self, image: Image) -> None:
        self._start = getattr(image.layers[0].data, "start_writeback", None)
        self._held = 0

    def add(self, count: int) -> None:
        """*count* bytes were handed to storage."""
        self._held += count

    def start(self) -> None:
        """Begin, if there is enough; to be called where nobody waits for the caller."""
        if self._held >= _BEHIND and self._start is not None:
            self._held = 0
            self._start()


class ImageTarget:
    """An image that exists and is open for writing."""

    ordered = True

    def __init__(self, image: Image) -> None:
        self.image = image
        self._behind = WriteBehind(image)

    def place(self, actions: Sequence[Action]) -> list[Placed]:
        image = self.image
        plain: list[tuple[int, Buffer]] = []
        for offset, length, data, packed in actions:
            if data is not None and not packed:
                plain.append((offset, data))
                continue
            image.pwrite_many(plain)
            plain.clear()
            if data is None:
                self._zero(offset, length)
            else:
                image.write_compressed(data, offset)
        image.pwrite_many(plain)
        self._behind.add(sum(len(data) for _, _, data, _ in actions if data is not None))
        return []

    def _zero(self, offset: int, length: int) -> None:
        image = self.image
        top = image.layers[0]
        if isinstance(top, Qcow2Image) and top.header.version == 2 and len(image.layers) > 1:
            # Source: without zero clusters qemu writes them, also over what reads as zeros already.
            for start, _, data, _ in _written(offset, length):
                image.pwrite(data or b"", start)
        else:
            image.zero(*self._widened(offset, length))

    def _widened(self, offset: int, length: int) -> tuple[int, int]:
        """Return length and offset of the range with its outer (sub)clusters whole, where they read as zeros already.

        Source: qemu makes zero clusters of them too.
        """
        image = self.image
        top = image.layers[0]
        size = top.header.subcluster_size if isinstance(top, Qcow2Image) else 1
        start, end = round_down(offset, size), min(round_up(offset + length, size), image.size)
        if start < offset and not self._is_zero(start, min(start + size, image.size)):
            start = offset
        if end > offset + length and not self._is_zero(round_down(end - 1, size), end):
            end = offset + length
        return end - start, start

    def _is_zero(self, start: int, end: int) -> bool:
        runs = self.image.map(start, end - start)
        return runs.end >= end and all(run[0] in (HOLE, ZERO) for run in runs)

    def store(self, placed: Sequence[Placed]) -> None:
        """Nothing is left to write after :meth:`place`."""
        self._behind.start()

    def finish(self) -> None:
        self.image.flush()
