# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The locks of a domain: its lockspace, its own lock, the index of external leases against their areas.

Invariant: checking reads only.  A lockspace is written anew only when no
host is in it, for that would throw the others out; who mends holds the right
to change, so nobody else holds the lock that is written anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from qcowlib.errors import Error

from . import layout
from .block_domain import BlockDomain
from .file_domain import FileDomain
from .image_group import Finding
from .lease_records import (
    SAFELEASE_SIZE,
    Leader,
    SafeleaseTag,
    leader_trouble,
    lockspace_area,
    parse_leader,
    read_leader,
    resource_area,
    write_area,
)
from .xlease import MAX_RECORDS, XleaseVolume, rebuild_plan

if TYPE_CHECKING:
    from qcowlib.storage.base import Storage

    from .token import SpmToken

__all__ = ["lock_findings", "repair_locks"]

AnyDomain = FileDomain | BlockDomain
#: What findings of this module are about, in the place of a volume.
LOCKSPACE: Final = "ids"
LOCK: Final = "leases"
EXTERNAL: Final = "xleases"
_SDM: Final = "SDM"


def lock_findings(domain: AnyDomain) -> list[Finding]:
    """Return what is wrong with the locks of a domain, with what mends it."""
    view = domain.metadata
    found: list[Finding] = []
    checks = []
    if view.version < 3:
        checks.append((LOCK, _against_block))
    elif view.type != "LOCALFS":
        checks += [(LOCKSPACE, _against_lockspace), (LOCK, _against_lock)]
    if layout.has_xleases(view.version, view.type):
        checks.append((EXTERNAL, _against_index))
    for name, check in checks:
        try:
            with domain.special(name) as storage:
                found += check(domain, storage)
        except Error as error:
            found.append(Finding(name, f"unreadable: {error.message}"))
    return found


def _against_block(domain: AnyDomain, storage: Storage) -> list[Finding]:
    """Versions below 3 have one block, free or held."""
    data = bytearray(SAFELEASE_SIZE)
    if storage.size:
        storage.read_into(0, [data])
    try:
        SafeleaseTag.parse(bytes(data))
    except Error as error:
        return [Finding(LOCK, error.message, "write lock")]
    return []


def _trouble(domain: AnyDomain, leader: Leader | None, resource: str = "", *, lockspace: bool = False) -> str | None:
    view = domain.metadata
    geometry = {"block_size": view.block_size, "alignment": view.alignment}
    return leader_trouble(leader, domain.uuid, resource, lockspace=lockspace, **geometry)


def _against_lockspace(domain: AnyDomain, storage: Storage) -> list[Finding]:
    trouble = _trouble(domain, _leader_at(storage, 0), lockspace=True)
    if trouble is None:
        return []
    hosts = _hosts_in(domain, storage)
    if hosts:
        told = f"the lockspace {trouble}; hosts are in it: {', '.join(map(str, hosts[:10]))}"
        return [Finding(LOCKSPACE, told)]
    return [Finding(LOCKSPACE, f"the lockspace {trouble}", "write lockspace")]


def _leader_at(storage: Storage, offset: int) -> Leader | None:
    return read_leader(storage, offset) if storage.size >= offset + 512 else None


def _hosts_in(domain: AnyDomain, storage: Storage) -> list[int]:
    """Return the host ids whose records have been renewed since they were made."""
    view = domain.metadata
    data = bytearray(min(view.alignment, storage.size))
    storage.read_into(0, [data])
    found = []
    for start in range(0, len(data), view.block_size):
        leader = parse_leader(bytes(data[start : start + 512]))
        if leader is not None and leader.lockspace and leader.timestamp:
            found.append(start // view.block_size + 1)
    return found


def _against_lock(domain: AnyDomain, storage: Storage) -> list[Finding]:
    leader = _leader_at(storage, domain.metadata.alignment)
    trouble = _trouble(domain, leader, _SDM)
    return [] if trouble is None else [Finding(LOCK, f"the domain's lock {trouble}", "write lock")]


def _volume(domain: AnyDomain, storage: Storage) -> XleaseVolume:
    view = domain.metadata
    return XleaseVolume(storage, path=storage.name, block_size=view.block_size, alignment=view.alignment)


def _against_index(domain: AnyDomain, storage: Storage) -> list[Finding]:
    volume = _volume(domain, storage)
    try:
        index = volume.load()
    except Error as error:
        return [Finding(EXTERNAL, f"{error.message}; its leases are lost, the index can only be made anew")]
    found = []
    if index.lockspace != domain.uuid:
        found.append(Finding(EXTERNAL, f"the index is of lockspace {index.lockspace}"))
    # A file grows with its leases.
    capacity = volume.capacity if domain.block else MAX_RECORDS
    for step in rebuild_plan(index, volume.resources(), capacity):
        text = f"record {step.number}: {step.why}"
        found.append(Finding(EXTERNAL, text, "rebuild leases", f"{step.action} {step.name}".strip()))
    return found


def repair_locks(token: SpmToken, domain: AnyDomain, plan: Sequence[Finding]) -> None:
    """Do what *plan* has for the locks of a domain."""
    view = domain.metadata
    geometry = {"block_size": view.block_size, "alignment": view.alignment}
    wanted = {finding.repair for finding in plan}
    if "write lockspace" in wanted:
        with domain.special(LOCKSPACE, writable=True) as storage:
            token.check()
            write_area(storage, 0, lockspace_area(domain.uuid, **geometry))
    if "write lock" in wanted:
        with domain.special(LOCK, writable=True) as storage:
            token.check()
            if view.version < 3:
                write_area(storage, 0, SafeleaseTag(None).pack())
            else:
                write_area(storage, view.alignment, resource_area(domain.uuid, _SDM, **geometry))
    if "rebuild leases" in wanted:
        with domain.special(EXTERNAL, writable=True) as storage:
            token.check()
            _volume(domain, storage).rebuild(growable=not domain.block)
