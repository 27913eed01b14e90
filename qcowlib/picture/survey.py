# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Looks an image over: where the guest's bytes are, and what the file is full of.

Invariant: reads metadata only, each table once; memory is bounded by the
number of cells and, for the file, by one byte for each of at most 2^24 units,
whatever the image claims to be.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from qcowlib.errors import FormatError
from qcowlib.gate import References, qemu_like
from qcowlib.image import Image, open
from qcowlib.info import allocated_bytes
from qcowlib.native import (
    MARK_ACTIVE,
    MARK_OTHER,
    MARK_REFCOUNT,
    MARK_SNAPSHOT,
    MARK_TABLE,
    Owners,
    Tally,
)
from qcowlib.ondisk.constants import OFFSET_MASK, REFCOUNT_TABLE_OFFSET_MASK
from qcowlib.ondisk.snapshots import snapshot_table_size
from qcowlib.picture.panels import KINDS, OWNERS, PIECES, Category, Panel, Picture, depths
from qcowlib.qcow2.directories import check_snapshot_l1, read_bitmaps, read_snapshots
from qcowlib.qcow2.image import Qcow2Image
from qcowlib.units import KiB, MiB, ceil_div, human_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from qcowlib.ondisk import Header
    from qcowlib.opening import Secrets, Source
    from qcowlib.storage.base import Storage

__all__ = ["DEFAULT_CELLS", "survey"]

DEFAULT_CELLS: Final = 8192
_MAX_CELLS: Final = 1 << 19
_MAX_UNITS: Final = 1 << 24
_CELL: Final = 512


def survey(
    source: Source | Image,
    *,
    cells: int = DEFAULT_CELLS,
    format: str | None = None,
    snapshot: str | None = None,
    references: References = qemu_like,
    force_share: bool = False,
    secret: Secrets | None = None,
) -> Picture:
    """Look *source* over, a name, a storage or an open image, in at most *cells* cells a panel.

    The panels: the guest's bytes by kind, by layer (with a backing file) and
    by length of the stored pieces; for qcow2 the file by what refers to it.
    Raises: UsageError, any error of opening, StorageError, CorruptImage.
    """
    cells = min(max(cells, 1), _MAX_CELLS)
    if isinstance(source, Image):
        return _survey(source, cells)
    with open(
        source,
        format=format,
        snapshot=snapshot,
        references=references,
        force_share=force_share,
        secret=secret,
    ) as image:
        return _survey(image, cells)


def _survey(image: Image, cells: int) -> Picture:
    top = image.layers[0]
    panels = list(_guest_panels(image, cells))
    if isinstance(top, Qcow2Image):
        panels.append(_file_panel(top.storage, top.header, cells))
    return Picture(image.path, image.format, image.size, tuple(_facts(image)), tuple(panels))


def _facts(image: Image) -> Iterator[tuple[str, str]]:
    top = image.layers[0]
    yield "virtual size", human_size(image.size)
    stored = allocated_bytes(top.storage)
    yield "file", human_size(top.storage.size) + ("" if stored is None else f", {human_size(stored)} on disk")
    if isinstance(top, Qcow2Image):
        header = top.header
        yield "clusters", f"{human_size(header.cluster_size)}{' in 32 subclusters' if header.extended_l2 else ''}"
        if header.nb_snapshots:
            yield "internal snapshots", str(header.nb_snapshots)
    if len(image.layers) > 1:
        yield "chain", " over ".join(_base_name(layer.storage.name) for layer in image.layers[:8])


def _base_name(path: str) -> str:
    return path.rpartition("/")[2]


def _cell_size(total: int, cells: int) -> int:
    """Return a power of two of bytes a cell, so that edges are where clusters end."""
    size = _CELL
    while ceil_div(total, size) > cells:
        size *= 2
    return size


def _panel(title: str, note: str, tally: Tally, categories: tuple[Category, ...]) -> Panel:
    return Panel(
        title, note, tally.total, tally.cell_bytes, categories, tuple(tally[cell] for cell in range(len(tally)))
    )


def _guest_panels(image: Image, cells: int) -> Iterator[Panel]:
    size = _cell_size(image.size, cells)
    layers = depths([_base_name(layer.storage.name) for layer in image.layers])
    kinds, depth, pieces = (Tally(image.size, size, count) for count in (len(KINDS), len(layers), len(PIECES)))
    position = 0
    while position < image.size:
        runs = image.map(position, image.size - position)
        kinds.add_kinds(runs)
        depth.add_depths(runs)
        pieces.add_pieces(runs, 64 * KiB, MiB)
        position = runs.end
    yield _panel("The guest's disk", "by kind of cluster", kinds, KINDS)
    if len(image.layers) > 1:
        yield _panel("The guest's disk", "by the layer that answers", depth, layers)
    yield _panel(
        "The guest's disk", "by fragmentation: bytes that lie one behind the other in the file", pieces, PIECES
    )


# -- the file ----------------------------------------------------------------


def _file_panel(storage: Storage, header: Header, cells: int) -> Panel:
    unit_bits = header.cluster_bits
    while storage.size >> unit_bits >= _MAX_UNITS:
        unit_bits += 1
    owners = Owners(storage.size, header.cluster_bits, unit_bits)
    _mark_own(storage, header, owners)
    _mark_refcounts(storage, header, owners)
    _mark_tables(storage, header, owners)
    tally = Tally(storage.size, _cell_size(storage.size, cells), len(OWNERS))
    owners.tally(tally)
    return _panel("The file", "by what refers to each place", tally, OWNERS)


def _words(storage: Storage, offset: int, count: int) -> array[int]:
    """Return *count* words of a table, as much of it as the file has; empty where it cannot be."""
    if offset <= 0 or offset >= storage.size:
        return array("Q")
    data = bytearray(min(count * 8, (storage.size - offset) // 8 * 8))
    storage.read_into(offset, [data])
    words = array("Q", bytes(data))
    words.byteswap()
    return words


def _mark_own(storage: Storage, header: Header, owners: Owners) -> None:
    owners.mark(0, header.cluster_size, MARK_OTHER)
    owners.mark(header.l1_table_offset, header.l1_size * 8, MARK_OTHER)
    if header.crypto is not None:
        owners.mark(header.crypto.offset, header.crypto.length, MARK_OTHER)
    if header.bitmaps is None or not header.bitmaps_valid:
        return
    owners.mark(header.bitmaps.directory_offset, header.bitmaps.directory_size, MARK_OTHER)
    for entry in read_bitmaps(storage, header):
        owners.mark(entry.table_offset, entry.table_size * 8, MARK_OTHER)
        for word in _words(storage, entry.table_offset, entry.table_size):
            if word & OFFSET_MASK:
                owners.mark(word & OFFSET_MASK, header.cluster_size, MARK_OTHER)


def _mark_refcounts(storage: Storage, header: Header, owners: Owners) -> None:
    size = header.cluster_size
    length = header.refcount_table_clusters * size
    owners.mark(header.refcount_table_offset, length, MARK_REFCOUNT)
    per_block = size * 8 >> header.refcount_order
    block = bytearray(size)
    seen: set[int] = set()
    for index, word in enumerate(_words(storage, header.refcount_table_offset, length // 8)):
        offset = word & REFCOUNT_TABLE_OFFSET_MASK
        if not offset or offset % size or offset >= storage.size or offset in seen:
            continue
        seen.add(offset)
        owners.mark(offset, size, MARK_REFCOUNT)
        if index * per_block * size < storage.size:
            storage.read_into(offset, [block])
            owners.mark_counted(block, index * per_block, header.refcount_order)


def _mark_tables(storage: Storage, header: Header, owners: Owners) -> None:
    size = header.cluster_size
    tables: dict[int, int] = {}

    def name(offset: int, entries: int, mark: int) -> None:
        for word in _words(storage, offset, entries):
            table = word & OFFSET_MASK
            if table and table % size == 0 and table < storage.size:
                tables[table] = tables.get(table, 0) | mark

    name(header.l1_table_offset, header.l1_size, MARK_ACTIVE)
    snapshots = read_snapshots(storage, header)
    owners.mark(header.snapshots_offset, snapshot_table_size(snapshots), MARK_OTHER)
    seen: set[tuple[int, int]] = set()
    for snapshot in snapshots:
        place = snapshot.l1_table_offset, snapshot.l1_size
        if place in seen:
            continue
        seen.add(place)
        try:
            check_snapshot_l1(snapshot, size, storage)
        except FormatError:
            continue
        owners.mark(snapshot.l1_table_offset, snapshot.l1_size * 8, MARK_OTHER)
        name(*place, MARK_SNAPSHOT)
    table = bytearray(size)
    stride = 16 if header.extended_l2 else 8
    for offset in sorted(tables):
        owners.mark(offset, size, MARK_TABLE)
        if not header.has_data_file:
            storage.read_into(offset, [table])
            owners.mark_entries(table, stride, tables[offset])
