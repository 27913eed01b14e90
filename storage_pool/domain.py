# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What both kinds of domain offer to volumes and images above them.

A domain knows ids, records and bytes of volumes; what a volume or a chain
means is said above (:mod:`.volume`, :mod:`.image_group`).

Invariant: a volume exists from :meth:`Domain.publish` to
:meth:`Domain.mark_removed`; before and after, readers do not see it, and
what a cut leaves is found by :meth:`Domain.leftovers`.  Everything that
changes a domain takes a token and checks it before each write; reading takes
none and no lock.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from .metadata_domain import DomainMetadata
from .metadata_volume import VolumeMetadata

if TYPE_CHECKING:
    from qcowlib.storage.base import Storage

    from .lease_records import Leader
    from .leases import Lease
    from .token import SpmToken

__all__ = ["Domain", "Leftover", "VolumeEntry"]


class VolumeEntry(NamedTuple):
    """A volume as the listing knows it, without its record.

    *images* are the images that use it, its own first, by UUID; *parent* is
    ``None`` where only the record tells it; *slot* is of block domains.
    """

    volume: str
    images: tuple[str, ...]
    parent: str | None
    removed: bool = False
    initializing: bool = False
    zeroing: bool = False
    slot: int | None = None


class Leftover(NamedTuple):
    """Something an interrupted operation left: *kind*, *name* and what it is, in words."""

    kind: str
    name: str
    why: str


class Domain(Protocol):
    """One storage domain, open."""

    @property
    def uuid(self) -> str:
        """Its UUID."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def block(self) -> bool:
        """Whether volumes are logical volumes."""

    @property
    def metadata(self) -> DomainMetadata:
        """Its keys as last read or written."""

    def refresh(self) -> None:
        """Forget everything read; other hosts may have changed it."""

    def change(self, token: SpmToken, changes: Mapping[str, str | None]) -> None:
        """Set and remove keys of the domain in one atomic write."""

    def entries(self) -> dict[str, VolumeEntry]:
        """Return all volumes, removed and unfinished ones too, by UUID."""

    def read_record(self, volume: str) -> bytes:
        """Return the bytes of a volume's record.  Raises: NotFound."""

    def record(self, volume: str) -> VolumeMetadata:
        """Return a volume's record.  Raises: NotFound, MetadataError."""

    def write_record(
        self, token: SpmToken, volume: str, record: VolumeMetadata, overrides: Mapping[str, str] | None = None
    ) -> None:
        """Replace a volume's record."""

    def allocate(self, token: SpmToken, image: str, volume: str, size: int, note: str | None = None) -> None:
        """Make room of *size* bytes for a new volume that readers do not see yet, with *note* from the start."""

    def publish(self, token: SpmToken, volume: str, record: VolumeMetadata) -> None:
        """Make an allocated volume visible with its record and lease."""

    def abandon(self, token: SpmToken, image: str, volume: str) -> None:
        """Take an allocated volume back; one that was published stays."""

    def size_of(self, volume: str) -> int:
        """Return the bytes of a volume's file or logical volume."""

    def usage_of(self, volume: str) -> int:
        """Return the bytes that a volume takes from the domain."""

    def extend(self, token: SpmToken, volume: str, size: int) -> None:
        """Give a volume at least *size* bytes; nothing where it has them."""

    def reduce(self, token: SpmToken, volume: str, size: int, *, zero: bool = False) -> None:
        """Take bytes beyond *size*; they are lost, with *zero* overwritten before others can have them."""

    def open_volume(self, volume: str, *, writable: bool = False) -> Storage:
        """Return the bytes of a volume, allocated or published."""

    def require_unused(self, volumes: Sequence[str]) -> None:
        """Raise Busy when a volume is known to be open on this host."""

    def share(self, token: SpmToken, volume: str, image: str) -> None:
        """Make a template usable in another image."""

    def set_parent_hint(self, token: SpmToken, volume: str, parent: str) -> None:
        """Repeat the parent of a record where listings look for it."""

    def set_writable(self, token: SpmToken, volumes: Sequence[str], writable: bool) -> None:
        """Set write permission as versions below 3 keep it."""

    def mark_removed(self, token: SpmToken, image: str, volumes: Sequence[str], *, zero: bool = False) -> None:
        """Take volumes out of sight in one step; a template used elsewhere only leaves *image*.

        With *zero* block storage remembers that they go only after they were overwritten.
        """

    def purge(self, token: SpmToken, image: str, *, wiped: Collection[str] = ()) -> None:
        """Remove what was marked removed of an image; what has to be overwritten before is, but for *wiped*."""

    def notes(self) -> dict[str, str]:
        """Return what is being done to live volumes, as it was noted before it began."""

    def set_note(self, token: SpmToken, volume: str, note: str | None) -> None:
        """Note what is about to be done to a volume, or that it is done.  Other hosts ignore it."""

    def set_notes(self, token: SpmToken, volumes: Sequence[str], note: str | None) -> None:
        """Note the same of several volumes, one after the other in no given order."""

    def make_lease(self, token: SpmToken, volume: str) -> None:
        """Write a volume's lease anew, free.  Nobody may hold it."""

    def lease_leader(self, volume: str) -> Leader | None:
        """Return the record in a volume's lease, ``None`` for none; only where the domain has leases.

        Raises: NotFound, MetadataError for a slot that has no lease area.
        """

    def make_lock(self, token: SpmToken, version: int) -> None:
        """Write the domain's lock as *version* has it, free."""

    def make_xleases(self, token: SpmToken, ctime: int) -> None:
        """Make the volume of external leases, without any; *ctime* is now, in seconds since 1970."""

    def lease(self, volume: str) -> Lease | None:
        """Return the lease of a volume, ``None`` where the domain has none."""

    def leftovers(self) -> list[Leftover]:
        """Return what interrupted operations left."""

    def sweep(self, token: SpmToken, leftovers: Sequence[Leftover]) -> None:
        """Remove leftovers."""

    def capacity(self) -> tuple[int, int]:
        """Return total and free bytes."""

    def close(self) -> None:
        """Release what is open."""
