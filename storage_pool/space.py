# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""How full a domain or pool is, how much more was promised, and when to stop.

Thin disks promise more than they take: *committed* is what all volumes need
once every leaf is written full.  Below the warning share of free space people
are told; an action that would leave less than the blocker is refused, so that
running disks can still grow.

Invariant: but for :func:`account`, which reads, this is arithmetic on bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from qcowlib.units import GiB, human_size

from . import metadata_volume as mv
from .block_domain import BlockDomain
from .errors import MetadataError, NoSpace
from .metadata_volume import VolumeMetadata
from .sizes import max_size
from .volume import records_of

if TYPE_CHECKING:
    from .domain import Domain

__all__ = ["Space", "SpacePolicy", "SpaceState", "account", "committed_bytes", "total_space"]

SpaceState = Literal["ok", "low", "critical"]
WARNING_PERCENT: Final = 10
BLOCKER: Final = 5 * GiB


class Space(NamedTuple):
    """Bytes of a domain or pool.

    *used* is taken by volumes, *provisioned* the size of all disks as guests
    see them, *committed* what the volumes may come to take.
    """

    total: int
    free: int
    used: int
    provisioned: int
    committed: int

    @property
    def over_commit_percent(self) -> int:
        """Committed bytes as a share of the total; above 100 more was promised than there is."""
        return self.committed * 100 // self.total if self.total else 0

    @property
    def free_percent(self) -> int:
        """Free bytes as a share of the total, rounded down."""
        return self.free * 100 // self.total if self.total else 0


class SpacePolicy(NamedTuple):
    """Below *warning_percent* of free space people are told, below *blocker* bytes nothing new is made."""

    warning_percent: int = WARNING_PERCENT
    blocker: int = BLOCKER

    def state(self, space: Space) -> SpaceState:
        """Return how a domain is."""
        if space.free < self.blocker:
            return "critical"
        return "low" if space.free * 100 < space.total * self.warning_percent else "ok"

    def warnings(self, space: Space) -> list[str]:
        """Return what is worth telling people, each with its figure."""
        found = []
        state = self.state(space)
        if state == "critical":
            found.append(f"{human_size(space.free)} free, below the {human_size(self.blocker)} that block actions")
        elif state == "low":
            found.append(f"{space.free_percent} % free, below the warning at {self.warning_percent} %")
        if space.committed > space.total:
            found.append(
                f"over-committed: disks may grow to {human_size(space.committed)}, {space.over_commit_percent} % of the"
                f" {human_size(space.total)} there are"
            )
        return found

    def require(self, space: Space, needed: int, name: str) -> None:
        """Refuse an action that takes *needed* bytes of domain *name* and leaves less than the blocker.

        Raises: NoSpace.
        """
        if space.free - needed < self.blocker:
            raise NoSpace(
                f"{human_size(needed)} more would leave {human_size(max(0, space.free - needed))} free, below the"
                f" {human_size(self.blocker)} kept for running disks",
                path=name,
                hint="Remove disks, or make the domain larger.",
            )


def committed_bytes(record: VolumeMetadata, usage: int, *, block: bool) -> int:
    """Return what a volume that takes *usage* bytes now may come to take."""
    if record.voltype != mv.LEAF:
        return usage
    return max(usage, max_size(record.capacity, record.format, block=block))


def total_space(spaces: Iterable[Space]) -> Space:
    """Return the sum over the domains of a pool."""
    return (
        Space(*(sum(column) for column in zip(*spaces, strict=True))) if (spaces := list(spaces)) else Space(*[0] * 5)
    )


def _records(domain: Domain) -> Mapping[str, VolumeMetadata]:
    if not isinstance(domain, BlockDomain):
        return records_of(domain)
    entries, found = domain.entries(), {}
    for volume, data in domain.read_records().items():
        if not (entries[volume].removed or entries[volume].initializing):
            try:
                found[volume] = mv.parse(data)
            except MetadataError:
                continue
    return found


def account(domain: Domain) -> Space:
    """Read a domain and return its figures; volumes whose record is damaged count by what they take."""
    total, free = domain.capacity()
    records = _records(domain)
    used = committed = 0
    disks: dict[str, int] = {}
    for volume, entry in domain.entries().items():
        if entry.initializing or entry.removed:
            continue
        usage = domain.usage_of(volume)
        used += usage
        record = records.get(volume)
        committed += usage if record is None else committed_bytes(record, usage, block=domain.block)
        if record is not None:
            disks[record.image] = max(disks.get(record.image, 0), record.capacity)
    return Space(total, free, used, sum(disks.values()), committed)
