# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Is a domain readable from here, how fast, since when; and when a lost domain counts as back.

:class:`DomainMonitor` is one host's view of one domain; a check may hang as
long as the storage does, so whoever runs many gives each its own thread.
:class:`Recovery` is the manager's view of all domains from what hosts report:
a domain is inactive when every host that can judge has found it bad for the
grace period, and active again by itself when one of them reads it, which is
tried again and again.  A domain that only some hosts cannot read is those
hosts' trouble, not the domain's.

Invariant: nothing on storage is changed; a domain that fails is closed and
opened anew by the next check, so that no stale descriptor hides its return.

Source: RHV Technical Reference 2.7; VDSM's monitor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal, NamedTuple

from qcowlib.errors import Error, StorageError
from qcowlib.storage.file import FileStorage

from .block_domain import BlockDomain
from .errors import MetadataError

if TYPE_CHECKING:
    from .domain import Domain

__all__ = ["DomainMonitor", "DomainStatus", "Event", "Recovery", "RecoveryPolicy", "read_block"]

_BLOCK = 4096
#: Seconds after which a monitor reads the domain's keys again, not only a block.
REFRESH_S = 300.0


class DomainStatus(NamedTuple):
    """What a host knows of a domain; times in seconds of the monitor's clock.

    *valid* is ``None`` before the first check; *since* is when it last changed.
    """

    uuid: str
    valid: bool | None = None
    last_check: float | None = None
    delay_s: float | None = None
    version: int | None = None
    since: float | None = None
    error: str = ""

    def age(self, now: float) -> float | None:
        """Return the seconds since the last check: a large age means that a check hangs."""
        return None if self.last_check is None else now - self.last_check


def read_block(domain: Domain) -> None:
    """Read the first block of a domain's metadata from storage itself, past any cache."""
    buffer = bytearray(_BLOCK)
    if isinstance(domain, BlockDomain):
        with domain.special("metadata") as storage:
            storage.read_into(0, [buffer])
        return
    path = f"{domain.name}/dom_md/metadata"
    for cache in ("none", "writeback"):
        try:
            file = FileStorage.open(path, cache=cache)
        except StorageError:
            if cache == "none":
                # Some file systems have no direct I/O.
                continue
            raise
        try:
            file.read_into(0, [buffer])
        finally:
            file.close()
        return


class DomainMonitor:
    """Watches domain *uuid*, which *open_domain* opens; *changed* hears of each change of validity.

    *clock* gives seconds, *read* is what is timed.
    """

    __slots__ = ("_changed", "_clock", "_domain", "_open", "_read", "_refreshed", "status")

    def __init__(
        self,
        uuid: str,
        open_domain: Callable[[], Domain],
        clock: Callable[[], float],
        *,
        read: Callable[[Domain], None] = read_block,
        changed: Callable[[DomainStatus], None] | None = None,
    ) -> None:
        self._open = open_domain
        self._clock = clock
        self._read = read
        self._changed = changed
        self._domain: Domain | None = None
        self._refreshed = 0.0
        self.status = DomainStatus(uuid)

    def check(self) -> DomainStatus:
        """Check once and return the status.  Errors of the domain are in it, not raised."""
        before = self.status
        delay, version, error = before.delay_s, before.version, ""
        try:
            domain, start = self._opened(), self._clock()
            self._read(domain)
            delay = self._clock() - start
            version = self._keys(domain)
        except (Error, OSError) as failure:
            error = str(failure)
            self.close()
        now = self._clock()
        valid = not error
        since = before.since if before.valid == valid else now
        self.status = DomainStatus(before.uuid, valid, now, delay, version, since, error)
        if before.valid != valid and self._changed is not None:
            self._changed(self.status)
        return self.status

    def _opened(self) -> Domain:
        if self._domain is None:
            self._domain = self._open()
            self._refreshed = self._clock()
            uuid = self._domain.metadata.uuid
            if uuid != self.status.uuid:
                raise MetadataError(f"another domain, {uuid}, is there", path=self._domain.name)
        return self._domain

    def _keys(self, domain: Domain) -> int:
        now = self._clock()
        if now - self._refreshed >= REFRESH_S:
            domain.refresh()
            self._refreshed = now
        return domain.metadata.version

    def close(self) -> None:
        """Close the domain; the next check opens it again."""
        domain, self._domain = self._domain, None
        if domain is not None:
            domain.close()


class RecoveryPolicy(NamedTuple):
    """Seconds: a domain that all find bad for *grace_s* is inactive and tried again each *retry_s*."""

    grace_s: float = 300.0
    retry_s: float = 300.0


class Event(NamedTuple):
    """What to do now: *lost* tells people, *try* asks hosts to check the domain, *back* to use it again."""

    kind: Literal["lost", "try", "back"]
    uuid: str


class _Seen(NamedTuple):
    valid: bool
    since: float


class Recovery:
    """Judges domains by what hosts report; pure, the time is an argument."""

    def __init__(self, policy: RecoveryPolicy | None = None) -> None:
        self.policy = policy or RecoveryPolicy()
        self._seen: dict[str, dict[int, _Seen]] = {}
        self._tried: dict[str, float] = {}

    @property
    def lost(self) -> frozenset[str]:
        """The domains that are inactive because nobody could read them."""
        return frozenset(self._tried)

    def report(self, host: int, uuid: str, valid: bool, now: float) -> None:
        """Take what *host* found."""
        hosts = self._seen.setdefault(uuid, {})
        before = hosts.get(host)
        if before is None or before.valid != valid:
            hosts[host] = _Seen(valid, now)

    def forget_host(self, host: int) -> None:
        """A host that is gone judges nothing."""
        for hosts in self._seen.values():
            hosts.pop(host, None)

    def forget_domain(self, uuid: str) -> None:
        """A domain that was deactivated or detached on purpose does not come back by itself."""
        self._seen.pop(uuid, None)
        self._tried.pop(uuid, None)

    def events(self, now: float) -> list[Event]:
        """Return what is due at *now*, each once."""
        due = []
        for uuid, hosts in sorted(self._seen.items()):
            if any(seen.valid for seen in hosts.values()):
                if self._tried.pop(uuid, None) is not None:
                    due.append(Event("back", uuid))
            elif uuid in self._tried:
                if now - self._tried[uuid] >= self.policy.retry_s:
                    self._tried[uuid] = now
                    due.append(Event("try", uuid))
            elif hosts and all(now - seen.since >= self.policy.grace_s for seen in hosts.values()):
                self._tried[uuid] = now
                due.append(Event("lost", uuid))
        return due

    def hosts_in_trouble(self, now: float) -> dict[int, list[str]]:
        """Return the domains that a host has not read for the grace period while others do, by host."""
        found: dict[int, list[str]] = {}
        for uuid, hosts in sorted(self._seen.items()):
            if not any(seen.valid for seen in hosts.values()):
                continue
            for host, seen in hosts.items():
                if not seen.valid and now - seen.since >= self.policy.grace_s:
                    found.setdefault(host, []).append(uuid)
        return found

    def watch(self, uuids: Iterable[str]) -> None:
        """Judge these domains and forget all others."""
        for uuid in set(self._seen) - set(uuids):
            self.forget_domain(uuid)
