# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""How large a new image will be, before it is made.

Invariant: the numbers are those of ``qemu-img measure``, byte for byte; no
guest data is read, and the map is only walked where the result depends on it.

Source: the results of qemu-img 7.2.  *Fully allocated* is the size with every
cluster in use; *required* leaves out the clusters that hold no data, but not
their metadata.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, NamedTuple

from qcowlib.errors import UsageError, printable
from qcowlib.gate import References, qemu_like
from qcowlib.image import Image
from qcowlib.image import open as open_image
from qcowlib.jobs.creation import Format, file_options
from qcowlib.native import data_clusters
from qcowlib.ondisk import MAX_L1_BYTES, BitmapEntry, bitmap_table_entries, refcount_structures
from qcowlib.qcow2.create import CreateOptions
from qcowlib.qcow2.directories import read_bitmaps
from qcowlib.qcow2.image import Qcow2Image
from qcowlib.units import SECTOR, ceil_div, round_up

if TYPE_CHECKING:
    from qcowlib.image import CacheMode
    from qcowlib.opening import Secrets, Source

__all__ = ["Measurement", "measure"]

_PIECE: Final = 1 << 40


class Measurement(NamedTuple):
    """Bytes of the file: needed for the content, and at most.

    ``bitmaps`` is what persistent bitmaps take in addition; ``None`` where
    source or target cannot have any.
    """

    required: int
    fully_allocated: int
    bitmaps: int | None = None


def measure(
    source: int | Source | Image,
    *,
    format: Format = "qcow2",
    source_format: str | None = None,
    snapshot: str | None = None,
    backing: str | None = None,
    luks_header_size: int = 0,
    references: References = qemu_like,
    cache: CacheMode = "writeback",
    force_share: bool = False,
    secret: Secrets | None = None,
    **options: object,
) -> Measurement:
    """Measure a new image of *format* for *source*: a size in bytes, a name, a storage or an open image.

    *options* are :class:`~qcowlib.jobs.creation.NewOptions`;
    *luks_header_size* is the length of the encryption header, if there will be
    one.  With *backing* every cluster counts.
    Raises: UsageError; any error of opening.
    """
    if format not in ("qcow2", "raw"):
        raise UsageError(f"Unknown file format '{printable(format)}'")
    if isinstance(source, Image):
        return _measure(source, source.size, format, backing, luks_header_size, options)
    if isinstance(source, int):
        if source < 0:
            raise UsageError("the size must not be negative")
        return _measure(None, source, format, backing, luks_header_size, options)
    with open_image(
        source,
        format=source_format,
        snapshot=snapshot,
        references=references,
        cache=cache,
        force_share=force_share,
        secret=secret,
    ) as image:
        return _measure(image, image.size, format, backing, luks_header_size, options)


def _measure(
    image: Image | None, size: int, format: str, backing: str | None, luks: int, options: dict[str, object]
) -> Measurement:
    described = file_options(options, size, backing=backing)
    size = round_up(size, SECTOR)
    if format == "raw":
        return Measurement(size, size)
    _check(described, size)
    cluster = described.cluster_size
    virtual = round_up(size, cluster)
    full = round_up(luks, cluster) + _metadata(described, virtual) + virtual
    used = 0
    if described.preallocation in ("falloc", "full") or backing is not None:
        used = virtual
    elif image is not None:
        used = data_bytes(image, cluster)
    bitmaps = None
    if described.version > 2 and image is not None:
        bitmaps = _bitmaps(image, cluster)
    return Measurement(full - virtual + used, full, bitmaps)


def _check(options: CreateOptions, size: int) -> None:
    entry = 16 if options.extended_l2 else 8
    options._replace(size=0).check()
    tables = ceil_div(ceil_div(size, options.cluster_size), options.cluster_size // entry)
    if tables * 8 > MAX_L1_BYTES:
        raise UsageError("The image size is too large (try using a larger cluster size)")


def _metadata(options: CreateOptions, virtual: int) -> int:
    """Header, tables and refcounts of an image with *virtual* bytes (whole clusters), all allocated."""
    cluster = options.cluster_size
    entry = 16 if options.extended_l2 else 8
    entries = round_up(virtual // cluster, cluster // entry)
    l1_entries = round_up(entries * entry // cluster, cluster // 8)
    total = cluster + entries * entry + l1_entries * 8
    bits = cluster.bit_length() - 1
    order = options.refcount_bits.bit_length() - 1
    return total + sum(refcount_structures((total + virtual) // cluster, bits, order)) * cluster


def data_bytes(image: Image, cluster: int) -> int:
    """Return the bytes of the clusters of size *cluster* that hold data of *image*."""
    size, offset, end, total = image.size, 0, 0, 0
    while offset < size:
        runs = image.map(offset, min(size - offset, _PIECE))
        counted, end = data_clusters(runs, cluster, end)
        total += counted
        offset = runs.end
    return total


def _bitmaps(image: Image, cluster: int) -> int | None:
    top = image.layers[0]
    if not isinstance(top, Qcow2Image) or top.header.version < 3:
        return None
    return bitmap_bytes(read_bitmaps(top.storage, top.header), image.size, cluster)


def bitmap_bytes(bitmaps: Iterable[BitmapEntry], size: int, cluster: int) -> int:
    """Return what *bitmaps* over *size* guest bytes take in an image with clusters of *cluster* bytes."""
    total = directory = 0
    for bitmap in bitmaps:
        if bitmap.in_use:
            continue
        clusters = bitmap_table_entries(size, bitmap.granularity_bits, cluster.bit_length() - 1)
        total += clusters * cluster + round_up(clusters * 8, cluster)
        directory += len(bitmap.pack())
    return total + round_up(directory, cluster)
