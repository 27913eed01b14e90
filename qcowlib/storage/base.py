# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The storage protocol: bytes at offsets, and nothing about formats.

Invariant: every transfer is whole or fails with
:class:`~qcowlib.errors.StorageError`; there is no cursor and no short
transfer, so any number of threads may use one storage at once.  Methods block
the calling thread; who runs them, and which lock is dropped around them, is
the runtime's business (:mod:`qcowlib.runtime`).

Implementations: :mod:`.file` (regular files and block devices),
:mod:`.linear` (concatenated segments, as of a logical volume),
:mod:`.memory`, :mod:`.view` (a window) and :mod:`.reader` (any readable
object); one that stands before another derives from :mod:`.wrapper`.  Each
passes :class:`qcowlib.testing.conformance.StorageContract`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NamedTuple, Protocol

    from _typeshed import ReadableBuffer, WriteableBuffer
else:
    from qcowlib.records import NamedTuple

    Protocol = object

__all__ = ["Alignment", "FdSegment", "Storage", "StorageExtent"]


class Alignment(NamedTuple):
    """What an operation must be a multiple of, in bytes.

    ``offset`` binds offsets and lengths of reads and writes, ``memory`` the
    address of buffers (both 1 unless direct I/O); a storage accepts any
    request and bounces what is not aligned.  ``zero`` and ``discard`` are the
    sizes below which those operations have no effect on allocation.
    """

    offset: int = 1
    memory: int = 1
    zero: int = 1
    discard: int = 1


class StorageExtent(NamedTuple):
    """A run of one kind: ``data``, ``zero`` (allocated, reads zero) or ``hole``."""

    kind: str
    start: int
    length: int


class FdSegment(NamedTuple):
    """Bytes ``start`` to ``start + length`` of the storage lie in *fd* at *position*."""

    start: int
    length: int
    fd: int
    position: int


class Storage(Protocol):
    """Positioned, whole transfers; offsets and lengths in bytes."""

    @property
    def name(self) -> str:
        """What messages call it; for a file, its path as given."""

    @property
    def size(self) -> int:
        """Current length; changes by :meth:`resize` and by growing writes only."""

    @property
    def writable(self) -> bool:
        """Whether :meth:`write` and friends are allowed."""

    @property
    def align(self) -> Alignment:
        """Natural alignments; requests need not obey them."""

    def read_into(self, offset: int, buffers: Sequence[WriteableBuffer]) -> None:
        """Fill all *buffers* in order; bytes past the end read as zero."""

    def write(self, offset: int, buffers: Sequence[ReadableBuffer]) -> None:
        """Write all *buffers* in order, growing a growable storage; all or an error."""

    def zero(self, offset: int, length: int, *, allocate: bool = False) -> None:
        """Make the range read as zero; with *allocate* without leaving holes. May grow."""

    def discard(self, offset: int, length: int) -> None:
        """Give the range back; a hint, its content is undefined afterwards."""

    def flush(self) -> None:
        """Return when everything completed before is durable."""

    def extents(self, offset: int, length: int) -> Iterator[StorageExtent]:
        """Cover the range exactly, in order; one ``data`` run is always a legal answer."""

    def resize(self, size: int) -> None:
        """Set the length; new bytes read as zero."""

    def close(self) -> None:
        """Release everything; a second call does nothing."""

    def fd_map(self) -> Sequence[FdSegment] | None:
        """Where the bytes lie in file descriptors, or ``None`` to forbid bypassing this object.

        A segment whose ``length`` is ``2**63 - 1`` is open-ended (a file that grows).
        """
