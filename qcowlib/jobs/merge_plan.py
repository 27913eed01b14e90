# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What a merge will do: its layers, what comes from each, and what the result will measure.

The size is not estimated: the merge itself runs on a shadow of the result
(:mod:`qcowlib.storage.shadow`), with nothing in place of guest data, so that
the same clusters are taken, given back and counted as in earnest.

Invariant: planning changes nothing on storage.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from qcowlib.driver import COMPRESSED, DATA, HOLE
from qcowlib.errors import UsageError, printable
from qcowlib.image import Image
from qcowlib.jobs.plan import BACKING, COPY, ZEROS, Plan, Run, Source
from qcowlib.qcow2.bitmap import AUTO
from qcowlib.qcow2.directories import read_bitmaps
from qcowlib.qcow2.image import Qcow2Image
from qcowlib.units import GiB

if TYPE_CHECKING:
    from qcowlib.chain import Layer
    from qcowlib.ondisk import BitmapEntry

__all__ = [
    "CopyPlan",
    "MergePlan",
    "MergeSource",
    "Place",
    "find_part",
    "is_file",
    "layers_of",
    "pieces",
    "sources_of",
    "valid_bitmaps",
]

_STEP = 1 * GiB


class Place(NamedTuple):
    """A layer as the chain names it: *path* as it can be opened from here, and its format."""

    path: str
    format: str


class MergeSource(NamedTuple):
    """One layer that is merged, and what of it is copied.

    *extents* and *clusters* (of the layer's own size; 0 for raw) count what is
    read, *data* and *zeros* are guest bytes, *bitmaps* the names that are merged.
    """

    path: str
    format: str
    extents: int
    clusters: int
    data: int
    zeros: int
    bitmaps: tuple[str, ...]


class MergePlan(NamedTuple):
    """What :func:`.merge` does.  Sizes are in bytes.

    *sources* are the layers whose content moves, the upper first, into
    *target* (*new*: it is created).  *above* is the image that will stand on it, ``None`` for
    the top of the chain.  *bitmaps* are the target's afterwards, with their
    granularities; *lost_bitmaps* those for which its format has no room.
    *file_size* is the length of the target's file at the end, *required* what
    a logical volume must have at least; *peak* the most it has in between.
    *removed* would be deleted by ``delete=True``.
    """

    sources: tuple[MergeSource, ...]
    target: str
    format: str
    new: bool
    above: str | None
    virtual_size: int
    data: int
    zeros: int
    bitmaps: tuple[tuple[str, int], ...]
    lost_bitmaps: tuple[str, ...]
    file_size: int
    required: int
    peak: int
    removed: tuple[str, ...]


def is_file(path: str, wanted: str) -> bool:
    """Whether both name one file, or are the same text."""
    if path == wanted:
        return True
    try:
        return os.path.samefile(path, wanted)  # noqa: PTH121
    except (OSError, ValueError):
        return False


def layers_of(image: Image) -> list[Place]:
    """The layers of an open image, top first."""
    return [Place(layer.storage.name, layer.format) for layer in image.layers]


def find_part(layers: list[Place], lowest: str | None, highest: str | None) -> tuple[int, int]:
    """Return the numbers of the highest and the lowest layer of a part.  Raises UsageError."""
    numbers = []
    for wanted, default in ((highest, 0), (lowest, len(layers) - 1)):
        found = default
        if wanted is not None:
            found = next((number for number, place in enumerate(layers) if is_file(place.path, wanted)), -1)
            if found < 0:
                raise UsageError(f"'{printable(wanted)}' is not in the chain of '{printable(layers[0].path)}'")
        numbers.append(found)
    high, low = numbers
    if high >= low:
        raise UsageError("a merge needs at least two layers, the upper one above the lower one", path=layers[0].path)
    return high, low


class CopyPlan(Plan):
    """What layers above *depth* hold between *start* and *stop*.

    Holes from *end* on (the old end of the target, which reads as zeros there) need nothing.
    """

    def __init__(self, image: Image, depth: int, end: int, start: int = 0, stop: int | None = None) -> None:
        super().__init__([Source(image, 0)], unit=0, cluster=0, keep_zeros=True)
        self._depth = depth
        self._end = end
        self._start = start
        self._stop = image.size if stop is None else stop

    def _runs(self) -> Iterator[list[Run]]:
        source, offset = self.sources[0], self._start
        while offset < self._stop:
            found = []
            for kind, guest, length, host, layer in source.image.map(offset, self._stop - offset):
                status = BACKING
                if layer < self._depth:
                    status = COPY if kind in (DATA, COMPRESSED) else ZEROS
                    if kind == HOLE and guest >= self._end:
                        status = BACKING
                found.append(Run(status, guest, length, source, kind, guest, host, layer))
                offset = guest + length
            yield found

    def moved(self) -> Iterator[Run]:
        """The runs that are copied or made zero."""
        return (run for runs in self._runs() for run in runs if run.status != BACKING)


def pieces(start: int, size: int) -> Iterator[tuple[int, int]]:
    """The parts of a copy after each of which it could be taken up again."""
    while start < size:
        stop = min(start - start % _STEP + _STEP, size)
        yield start, stop
        start = stop


def sources_of(image: Image, depth: int, end: int) -> list[MergeSource]:
    """Count what each of the first *depth* layers of *image* gives."""
    extents, clusters, data, zeros = ([0] * depth for _ in range(4))
    last = [-1] * depth
    sizes = [layer.cluster_size if isinstance(layer, Qcow2Image) else 0 for layer in image.layers[:depth]]
    for run in CopyPlan(image, depth, end).moved():
        layer = run.layer
        if run.status != COPY:
            zeros[layer] += run.length
            continue
        extents[layer] += 1
        data[layer] += run.length
        if sizes[layer]:
            first, final = run.start // sizes[layer], (run.start + run.length - 1) // sizes[layer]
            clusters[layer] += final - max(first, last[layer] + 1) + 1
            last[layer] = final
    return [
        MergeSource(place.path, place.format, extents[n], clusters[n], data[n], zeros[n], names_of(image.layers[n]))
        for n, place in enumerate(layers_of(image)[:depth])
    ]


def valid_bitmaps(layer: Layer) -> list[BitmapEntry]:
    """The bitmaps of a layer that are enabled and were saved by their last writer."""
    if not isinstance(layer, Qcow2Image):
        return []
    return [one for one in read_bitmaps(layer.storage, layer.header) if one.flags & AUTO and not one.in_use]


def names_of(layer: Layer) -> tuple[str, ...]:
    """Their names."""
    return tuple(one.name.decode(errors="surrogateescape") for one in valid_bitmaps(layer))
