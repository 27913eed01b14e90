# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Copy what can still be read of a damaged image, and tell what could not, by guest range.

Every kind of damage is read around: an L1 or L2 entry that leads nowhere, a
table or a cluster that cannot be read, compressed data that do not unpack, a
backing file that is missing.  What is lost becomes zeros in the copy.

Invariants: the source is opened for reading only, locked or not at all, and
nothing is written to it; each guest byte of the copy is either what the
source says or inside a range of the damage map; work is bounded by the size
of the disk in clusters.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from qcowlib.driver import COMPRESSED, DATA, HOLE, NO_OFFSET, SPARSE
from qcowlib.errors import Error, GateDenied, StorageError, UsageError
from qcowlib.gate import References, qemu_like
from qcowlib.image import Image
from qcowlib.image import open as open_image
from qcowlib.jobs.copy import Copier
from qcowlib.jobs.creation import Format, file_options, new_storage
from qcowlib.jobs.pipeline import DEFAULT_MEMORY, Control, run
from qcowlib.jobs.plan import COPY, ZEROS, Plan, Run, Source
from qcowlib.jobs.targets import Action, BuildTarget, Placed, RawTarget
from qcowlib.ondisk.constants import OFFSET_MASK
from qcowlib.qcow2.create import create_raw, new_header
from qcowlib.qcow2.image import Qcow2Image
from qcowlib.units import SECTOR, KiB, round_up

if TYPE_CHECKING:
    from qcowlib.chain import Layer
    from qcowlib.image import CacheMode
    from qcowlib.ondisk import Header
    from qcowlib.opening import Source as OpenSource

__all__ = ["Lost", "Salvaged", "salvage"]

_ZERO_UNIT: Final = 4 * KiB
#: Guest bytes asked for at once where an image has no clusters.
_STEP: Final = 64 * KiB
_MOST: Final = 1 << 20

LostKind = Literal["mapping", "data", "backing"]


class Lost(NamedTuple):
    """*length* guest bytes from *start* could not be had.

    ``mapping``: a table that says where they are is damaged; ``data``: they
    cannot be read there; ``backing``: they would be in a file that cannot be
    opened.  *reason* is the first error met.
    """

    start: int
    length: int
    kind: LostKind
    reason: str


class Salvaged(NamedTuple):
    """What :func:`salvage` did: the damage map in order, guest bytes of the disk, and of those that were lost."""

    lost: tuple[Lost, ...]
    size: int
    lost_bytes: int
    backing_error: str | None = None

    def __bool__(self) -> bool:
        return not self.lost


class _Map:
    """Collects what is lost, from any thread's turn; joined in the end."""

    def __init__(self) -> None:
        self._found: list[Lost] = []

    def add(self, start: int, length: int, kind: LostKind, reason: str) -> None:
        """Note a range; neighbours met one after the other are joined at once."""
        if self._found:
            last = self._found[-1]
            if last.kind == kind and last.start + last.length == start:
                self._found[-1] = last._replace(length=last.length + length)
                return
        if len(self._found) >= _MOST:
            raise StorageError(27, operation="salvage", message="the damage has too many pieces to be told")
        self._found.append(Lost(start, length, kind, reason))

    def joined(self) -> tuple[Lost, ...]:
        """Return all of it in order."""
        out: list[Lost] = []
        for one in sorted(self._found):
            last = out[-1] if out else None
            if last is not None and last.kind == one.kind and last.start + last.length == one.start:
                out[-1] = last._replace(length=last.length + one.length)
            else:
                out.append(one)
        return tuple(out)


def salvage(
    source: OpenSource | Image,
    target: str | os.PathLike[str] | None,
    *,
    format: Format = "qcow2",
    source_format: str | None = None,
    references: References = qemu_like,
    source_cache: CacheMode = "writeback",
    cache: CacheMode = "writeback",
    force_share: bool = False,
    secret: str | bytes | None = None,
    progress: Callable[[int, int], object] | None = None,
    cancel: Callable[[], bool] | None = None,
    rate: int | None = None,
    workers: int | None = None,
    memory: int = DEFAULT_MEMORY,
    **options: object,
) -> Salvaged:
    """Copy what can be read of *source* to a new image *target* without a backing file; returns what was lost.

    With *target* ``None`` everything is read and nothing is written.
    *options* are :class:`~qcowlib.jobs.creation.NewOptions` of the target.
    Raises: UsageError; an error of opening where the header itself is no
    header of an image; StorageError for the target; Cancelled.
    """
    control = Control(progress=progress, cancel=cancel, rate=rate, workers=workers, memory=memory)
    lost = _Map()
    with ExitStack() as stack:
        image, refused = _open(stack, source, source_format, references, source_cache, force_share, secret)
        described = file_options(options, image.size)
        if described.data_file is not None or described.preallocation != "off" or described.encrypt is not None:
            raise UsageError("a salvaged image is one plain file without preallocation")
        header = new_header(described) if format == "qcow2" and target is not None else None
        cluster = 0 if header is None else header.cluster_size
        with _sink(target, header, image.size, cache) as (sink, zeroed):
            plan = _SalvagePlan(image, cluster, lost, refused)
            copier = Copier(
                sink,
                unit=_ZERO_UNIT,
                keep_zeros=not zeroed,
                cluster=cluster,
                salvage=lambda offset, error: lost.add(offset, SECTOR, "data", str(error)),
            )
            control.begin(image.size)
            run(plan.units(), copier.work, control, buffer_size=plan.buffer, amount=image.size, ordered=sink.ordered)
            sink.finish()
        size = image.size
    control.end()
    found = tuple(_cut(lost.joined(), size))
    return Salvaged(found, size, sum(one.length for one in found), refused)


class _NoTarget:
    """Takes everything and keeps nothing."""

    ordered = False

    def place(self, actions: Sequence[Action]) -> list[Placed]:
        """See :class:`~qcowlib.jobs.targets.Target`."""
        return []

    def store(self, placed: Sequence[Placed]) -> None:
        """See :class:`~qcowlib.jobs.targets.Target`."""

    def finish(self) -> None:
        """See :class:`~qcowlib.jobs.targets.Target`."""


@contextmanager
def _sink(
    target: str | os.PathLike[str] | None, header: Header | None, size: int, cache: CacheMode
) -> Iterator[tuple[BuildTarget | RawTarget | _NoTarget, bool]]:
    """Give where the copy goes, and whether it reads as zeros by itself."""
    if target is None:
        yield _NoTarget(), True
        return
    with new_storage(target, cache) as storage:
        zeroed = not getattr(storage, "is_block", False)
        if header is not None:
            yield BuildTarget(storage, header, data=None, zeroed=zeroed), zeroed
        else:
            create_raw(storage, size)
            yield RawTarget(storage), zeroed


def _cut(found: tuple[Lost, ...], size: int) -> Iterator[Lost]:
    for one in found:
        if one.start < size:
            yield one._replace(length=min(one.length, size - one.start))


def _open(
    stack: ExitStack,
    source: OpenSource | Image,
    format: str | None,
    references: References,
    cache: CacheMode,
    force_share: bool,
    secret: str | bytes | None,
) -> tuple[Image, str | None]:
    """Open the source, without what it stands on where that cannot be opened; then also why."""
    if isinstance(source, Image):
        return source, None

    def attempt(backing: bool) -> Image:
        return open_image(
            source,
            format=format,
            references=references,
            cache=cache,
            force_share=force_share,
            secret=secret,
            backing=backing,
        )

    try:
        return stack.enter_context(attempt(True)), None
    except GateDenied:
        raise
    except Error as error:
        if not isinstance(source, str | os.PathLike):
            raise
        alone = stack.enter_context(attempt(False))
        return alone, str(error)


def _short_tables(layer: Layer) -> list[tuple[int, int]]:
    """Return the guest ranges (start, end) of L2 tables that the file of a layer does not hold whole."""
    if not isinstance(layer, Qcow2Image):
        return []
    header, storage = layer.header, layer.storage
    table = bytearray(header.l1_size * 8)
    storage.read_into(header.l1_table_offset, [table])
    entries = array("Q", bytes(table))
    entries.byteswap()
    reach = header.l2_entries * header.cluster_size
    found = []
    for number, entry in enumerate(entries):
        place = entry & OFFSET_MASK
        if place and place + header.cluster_size > storage.size:
            found.append((number * reach, (number + 1) * reach))
    return found


def _end_of_data(layer: Layer) -> int:
    """Return where clusters of a layer cannot hold data any more.

    Source: qemu; its check takes a cluster that the file ends in, and reads zeros from there, but none behind that.
    """
    if not isinstance(layer, Qcow2Image):
        return NO_OFFSET
    return round_up(layer.data.size, layer.cluster_size)


class _SalvagePlan(Plan):
    """All that the map tells, and zeros where it tells nothing."""

    def __init__(self, image: Image, cluster: int, lost: _Map, refused: str | None) -> None:
        super().__init__([Source(image, 0)], unit=_ZERO_UNIT, cluster=cluster, keep_zeros=False)
        self._lost = lost
        self._refused = refused
        self._short = [_short_tables(layer) for layer in image.layers]
        self._ends = [_end_of_data(layer) for layer in image.layers]

    def _runs(self) -> Iterator[list[Run]]:
        """Ask for more and more while the map answers, for one cluster where it does not."""
        source = self.sources[0]
        image, position = source.image, 0
        most = image.size
        while position < image.size:
            least = self._unit_at(position)
            length = max(least, min(most, image.size - position))
            try:
                runs = list(image.map(position, length))
            except Error as error:
                if length > least:
                    most = least
                    continue
                self._lost.add(position, length, "mapping", str(error))
                yield [Run(ZEROS, position, length, source, HOLE, position, NO_OFFSET, 0)]
                position += length
                continue
            most = max(most * 2, least)
            found = []
            for kind, guest, count, host, layer in runs:
                status = COPY if kind in (DATA, COMPRESSED) else ZEROS
                if kind == HOLE and self._refused is not None:
                    self._lost.add(guest, count, "backing", self._refused)
                self._tell_short(guest, count, len(self._short) if kind == HOLE else layer + 1)
                position = guest + count
                # What is behind the end of a file with holes looks like one of them.
                ends = kind in (DATA, SPARSE)
                there = min(max(self._ends[layer] - host, 0), count) if ends else count
                if there:
                    found.append(Run(status, guest, there, source, kind, guest, host, layer))
                if there < count:
                    at, rest = guest + there, count - there
                    self._lost.add(at, rest, "data", "the data would lie behind the end of the file")
                    found.append(Run(ZEROS, at, rest, source, HOLE, at, NO_OFFSET, 0))
            yield found

    def _tell_short(self, start: int, length: int, layers: int) -> None:
        """What a table that the file does not hold whole says nothing of was asked of one of the first *layers*."""
        for ranges in self._short[:layers]:
            for low, high in ranges:
                first, last = max(low, start), min(high, start + length)
                if first < last:
                    self._lost.add(first, last - first, "mapping", "a table ends behind the end of the file")
                    return

    def _unit_at(self, position: int) -> int:
        """Return how far the cluster at *position* reaches, at most to the end of the disk."""
        image = self.sources[0].image
        size = image.cluster_size or _STEP
        return min(round_up(position + 1, size), image.size) - position
