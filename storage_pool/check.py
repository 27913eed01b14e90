# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Checking a whole domain, of any writer; reads only.

Invariant: nothing is changed, no lock is taken; what is found comes with the
rule that mends it, and :func:`mend` does only what has one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from .block_domain import BlockDomain
from .block_group import repair_mapping
from .domain import Domain, Leftover, VolumeEntry
from .errors import MetadataError
from .exchange import recover_moves
from .file_domain import FileDomain
from .image_group import Finding, ImageGroup, findings, repair
from .lock_check import lock_findings, repair_locks
from .merge import recover_merges
from .merge_swap import recover_swaps
from .metadata_domain import DATA
from .metadata_volume import LEAF
from .transfer import recover_copies
from .volume import recover_removals

if TYPE_CHECKING:
    from .token import SpmToken

__all__ = ["DomainReport", "check_domain", "mend", "recover", "unread"]


class DomainReport(NamedTuple):
    """What a check of a domain found; *error* says why nothing could be looked at."""

    images: int
    volumes: int
    findings: tuple[Finding, ...]
    leftovers: tuple[Leftover, ...]
    unfinished: dict[str, str]
    unmapped: tuple[str, ...] = ()
    error: str = ""

    @property
    def clean(self) -> bool:
        """Whether nothing was found."""
        return not (self.findings or self.leftovers or self.unfinished or self.unmapped or self.error)

    def to_dict(self) -> dict[str, object]:
        """Return it as a JSON document."""
        return {
            **self._asdict(),
            "findings": [finding._asdict() for finding in self.findings],
            "leftovers": [leftover._asdict() for leftover in self.leftovers],
        }

    def lines(self) -> Iterator[str]:
        """Say it for people; what has a rule with that rule."""
        if self.error:
            yield self.error
            return
        yield f"{self.images} images, {self.volumes} volumes"
        for finding in self.findings:
            yield finding.line()
        for leftover in self.leftovers:
            yield f"{leftover.name}: {leftover.kind}, {leftover.why}"
        for name, note in self.unfinished.items():
            yield f"{name}: {note} was cut"
        for name in self.unmapped:
            yield f"{name}: a device that the keys of the domain do not name"


def unread(error: Exception) -> DomainReport:
    """Return the report of a domain that *error* kept from being looked at."""
    return DomainReport(0, 0, (), (), {}, error=str(error))


def check_domain(domain: Domain) -> DomainReport:
    """Compare all that a domain says about its volumes.

    *unfinished* of the answer are merges, copies and removals that were cut,
    by the volume that has the note; *unmapped* are devices of a volume group that its keys do not name.
    """
    domain.refresh()
    entries = [entry for entry in domain.entries().values() if not entry.removed and not entry.initializing]
    images = sorted({entry.images[0] for entry in entries})
    found: list[Finding] = []
    for image in images:
        found += findings(ImageGroup.load(domain, image))
    unmapped: list[str] = []
    if isinstance(domain, FileDomain | BlockDomain):
        found += lock_findings(domain)
    if isinstance(domain, BlockDomain):
        found = _believed(domain, found)
        found += _shared_slots(entries)
        try:
            known = {entry.uuid for entry in domain.metadata.pv_mapping.values()}
            unmapped = [pv.name for pv in domain.state.pvs.values() if pv.uuid not in known]
        except MetadataError as error:
            found.append(Finding(domain.uuid, error.message))
    return DomainReport(
        len(images), len(entries), tuple(found), tuple(domain.leftovers()), domain.notes(), tuple(unmapped)
    )


def _believed(domain: BlockDomain, found: Sequence[Finding]) -> list[Finding]:
    """Take the rule from findings that rest on a record of another, or on not seeing who stands on a volume."""
    users: dict[int, list[str]] = {}
    for volume, entry in domain.entries().items():
        if entry.slot is not None:
            users.setdefault(entry.slot, []).append(volume)
    doubtful = {volume for volumes in users.values() if len(volumes) > 1 for volume in volumes}
    strays = bool(domain.strays())
    return [
        finding._replace(repair="none", value="")
        if finding.volume in doubtful or (strays and finding.repair == "set role" and finding.value == LEAF)
        else finding
        for finding in found
    ]


def _shared_slots(entries: Sequence[VolumeEntry]) -> list[Finding]:
    """Two volumes of one slot have one record and one lease; nothing says whose they are."""
    users: dict[int, list[str]] = {}
    for entry in entries:
        if entry.slot is not None:
            users.setdefault(entry.slot, []).append(entry.volume)
    return [
        Finding(volume, f"it has metadata slot {slot} together with {len(volumes) - 1} other volumes")
        for slot, volumes in sorted(users.items())
        for volume in sorted(volumes)
        if len(volumes) > 1
    ]


def recover(token: SpmToken, domain: Domain) -> list[str]:
    """End what was cut and noted, or take it back; returns the volumes that it was noted of."""
    domain.refresh()
    noted = sorted(domain.notes())
    recover_merges(token, domain)
    recover_swaps(token, domain)
    recover_copies(token, domain)
    recover_removals(token, domain)
    return noted


def mend(token: SpmToken, domain: Domain, *, find: Callable[[str], Domain] | None = None) -> DomainReport:
    """End operations that were cut, sweep leftovers, mend what has a rule; returns what is left.

    *find* opens the domain of a UUID, to which a disk was being moved; a move
    to one that is away stays unfinished.  Parents are mended before the tags
    and roles that follow from them.
    """
    if find is not None and domain.metadata.domain_class == DATA:
        recover_moves(token, domain, find)
    recover(token, domain)
    domain.sweep(token, domain.leftovers())
    if isinstance(domain, BlockDomain):
        repair_mapping(token, domain)
    report = check_domain(domain)
    if isinstance(domain, FileDomain | BlockDomain):
        repair_locks(token, domain, report.findings)
    for _ in range(2):
        done = repair(token, domain, report.findings)
        report = check_domain(domain)
        if not done:
            break
    return report
