# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Jobs on the data of one volume: level of the format, bitmaps, giving space back.

Invariant: what the guest reads does not change, so the volume stays as legal
as it was, and a job that was cut is run again.  A job that ended counts one
generation; one that expects another generation is refused before any change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import qcowlib
from qcowlib.errors import StorageError
from qcowlib.native import zero_runs
from qcowlib.qcow2.amend import AmendOptions
from qcowlib.qcow2.check import check

from . import metadata_volume as mv
from .domain import Domain
from .errors import Illegal, IllegalSpec, IllegalSpecKind, UnsupportedVersion
from .metadata_volume import COW, SHARED, SPARSE
from .sizes import optimal_cow_size
from .volume import open_image, operation

if TYPE_CHECKING:
    from .token import SpmToken

__all__ = ["add_bitmap", "amend", "clear_bitmap", "reduce_to_optimal", "remove_bitmap", "sparsify"]

_LEVELS: Final = {"0.10": 0, "1.1": 4}
_PIECE: Final = 2 << 20
#: Zeros of fewer bytes are not given back.
_ZEROS: Final = 65536


def _change(
    token: SpmToken, domain: Domain, volume: str, generation: int | None, work: Callable[[qcowlib.Image], object]
) -> None:
    record = domain.record(volume)
    if record.format != COW:
        raise Illegal(f"the volume {volume} is {record.format}", path=domain.name)
    with operation(token, domain, volume, generation=generation, illegal=False):
        token.check()
        with open_image(domain, volume, writable=True) as image:
            work(image)
            image.flush()


def amend(token: SpmToken, domain: Domain, volume: str, level: str, *, generation: int | None = None) -> None:
    """Bring a COW volume to *level* ("0.10" or "1.1") of its format.

    Raises: UnsupportedVersion for 1.1 below domain version 4, Illegal.
    """
    if level not in _LEVELS:
        raise IllegalSpec("a level of the format is 0.10 or 1.1", kind=IllegalSpecKind.FORMAT)
    if domain.metadata.version < _LEVELS[level]:
        raise UnsupportedVersion(f"images of level {level} need domain version 4", path=domain.name)
    _change(token, domain, volume, generation, lambda image: image.amend(AmendOptions(compat=level)))


def _check_bitmaps(domain: Domain) -> None:
    if domain.metadata.version < 4:
        raise IllegalSpec("bitmaps need domain version 4", kind=IllegalSpecKind.BITMAPS, path=domain.name)


def add_bitmap(
    token: SpmToken,
    domain: Domain,
    volume: str,
    name: str,
    *,
    granularity: int | None = None,
    enabled: bool = True,
    generation: int | None = None,
) -> None:
    """Make an empty bitmap in a COW volume.  Raises: IllegalSpec below version 4, Illegal, UsageError."""
    _check_bitmaps(domain)
    _change(token, domain, volume, generation, lambda image: image.add_bitmap(name, granularity, disabled=not enabled))


def remove_bitmap(token: SpmToken, domain: Domain, volume: str, name: str, *, generation: int | None = None) -> None:
    """Delete a bitmap.  Raises: as :func:`add_bitmap`."""
    _check_bitmaps(domain)
    _change(token, domain, volume, generation, lambda image: image.remove_bitmap(name))


def clear_bitmap(token: SpmToken, domain: Domain, volume: str, name: str, *, generation: int | None = None) -> None:
    """Forget what a bitmap has recorded.  Raises: as :func:`add_bitmap`."""
    _check_bitmaps(domain)
    _change(token, domain, volume, generation, lambda image: image.clear_bitmap(name))


def sparsify(token: SpmToken, domain: Domain, volume: str, *, generation: int | None = None) -> int:
    """Give back the space of zeros that a leaf stores; returns the bytes of zeros found.

    Raises: Illegal for a volume that is no leaf, ILLEGAL or preallocated.
    """
    record = domain.record(volume)
    if record.voltype != mv.LEAF or record.legality != mv.LEGAL or record.type != SPARSE:
        raise Illegal(f"the volume {volume} is {record.legality} {record.type} {record.voltype}", path=domain.name)
    found = 0
    with (
        operation(token, domain, volume, generation=generation, illegal=False),
        open_image(domain, volume, writable=True) as image,
    ):
        for extent in list(image.extents()):
            if extent.depth or extent.kind not in ("data", "compressed"):
                continue
            for start in range(extent.start, extent.start + extent.length, _PIECE):
                token.check()
                data = image.pread(min(_PIECE, extent.start + extent.length - start), start)
                for offset, length, zero in zero_runs(data, _ZEROS):
                    if zero:
                        image.zero(length, start + offset)
                        found += length
        image.flush()
    return found


def reduce_to_optimal(token: SpmToken, domain: Domain, volume: str, *, generation: int | None = None) -> int:
    """Reduce a sparse COW volume on block storage to what it needs; returns its size.

    A leaf keeps one chunk of free space.  Nothing happens to files.

    Raises: Illegal for other volumes, an ILLEGAL one and a template.
    """
    record = domain.record(volume)
    if record.format != COW or record.type != SPARSE or record.legality != mv.LEGAL or record.voltype == SHARED:
        raise Illegal(f"the volume {volume} cannot be reduced", path=domain.name)
    if not domain.block:
        return domain.size_of(volume)
    with operation(token, domain, volume, generation=generation, illegal=False):
        storage = domain.open_volume(volume)
        try:
            report = check(storage)
        finally:
            storage.close()
        if report.failure or not report.image_end_offset:
            raise StorageError(5, path=f"{domain.name}/{volume}", operation="check")
        leaf = record.voltype == mv.LEAF
        domain.reduce(token, volume, optimal_cow_size(report.image_end_offset, record.capacity, leaf=leaf))
    return domain.size_of(volume)
