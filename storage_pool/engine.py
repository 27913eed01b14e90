# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""One object for all of it: :func:`connect` gives the domains and pools of a place.

A place is a directory in which each domain has a directory of its own (where
its storage is mounted, or just a directory), and the volume groups on some
devices.  Reading needs nothing; the first change takes the token.

Invariant: an engine holds one token for all its domains and gives it back
when it is closed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from qcowlib.errors import Error
from qcowlib.runtime import SyncRuntime

from . import block_group
from . import metadata_domain as md
from .block_domain import BlockDomain
from .check import DomainReport, unread
from .embedded import FileToken
from .errors import AlreadyExists, Illegal, InvalidName, NotAuthorized, NotFound, printable
from .file_domain import FileDomain, discover
from .handles import AnyDomain, Context, EngineDomain
from .ids import is_id, make_id
from .lvm import Lvm, LvmHost, has_device_mapper
from .monitor import DomainMonitor, DomainStatus, Event, Recovery, RecoveryPolicy
from .pool import StoragePool, find_master
from .process import ProcessRunner, SystemRunner
from .space import Space, SpacePolicy, total_space

if TYPE_CHECKING:
    from .token import SpmToken

__all__ = ["Engine", "EnginePool", "connect"]

_CLASSES = {"data": md.DATA, "iso": md.ISO, "export": md.BACKUP}
LOCK_NAME = "pool.lock"


def connect(
    place: str | os.PathLike[str],
    *,
    devices: Sequence[str] | None = None,
    token: SpmToken | None = None,
    lvm: Lvm | None = None,
    runner: ProcessRunner | None = None,
    clock: Callable[[], int] | None = None,
    space: SpacePolicy | None = None,
) -> Engine:
    """Return the engine of directory *place*, and of the volume groups on *devices*.

    *token* is the right to change (by default the lock of a file in *place*,
    for one host alone), *lvm* how to run LVM where *devices* do not say it
    all, *clock* gives seconds since 1970, *space* says when to warn and stop.

    Raises: NotFound when *place* is no directory.
    """
    path = os.fspath(place)
    if not os.path.isdir(path):  # noqa: PTH112
        raise NotFound("no such directory", path=path)
    runner = runner or SystemRunner()
    if lvm is None and devices is not None:
        seen = tuple(devices)
        lvm = Lvm(runner, LvmHost(lambda: seen, activation=has_device_mapper()))
    return Engine(path, lvm, runner, token, clock or _seconds, space or SpacePolicy())


def _seconds() -> int:
    return SyncRuntime().wall_ns() // 1_000_000_000


def _exact_seconds() -> float:
    return SyncRuntime().wall_ns() / 1e9


class Engine:
    """Domains and pools of a place; see :func:`connect`."""

    __slots__ = ("_context", "_lvm", "_open", "_own", "_pools", "_runner", "place")

    def __init__(
        self,
        place: str,
        lvm: Lvm | None,
        runner: ProcessRunner,
        token: SpmToken | None,
        clock: Callable[[], int],
        space: SpacePolicy,
    ) -> None:
        self.place = place
        self._lvm = lvm
        self._runner = runner
        self._own: FileToken | None = None
        self._open: dict[str, EngineDomain] = {}
        self._pools: list[EnginePool] = []
        self._context = Context(lambda: self._begin(token), clock, space, lambda uuid: self.domain(uuid).domain)

    def _begin(self, token: SpmToken | None) -> SpmToken:
        """Take the right to change; what was read without it may be of before another's changes."""
        if token is None:
            token = self._own = FileToken(f"{self.place}/{LOCK_NAME}")
        for domain in self._open.values():
            domain.refresh()
        return token

    # Domains

    def _keep(self, domain: AnyDomain) -> EngineDomain:
        made = EngineDomain(self._context, domain)
        self._open[domain.uuid] = made
        return made

    def create_domain(
        self,
        name: str,
        *,
        devices: Sequence[str] | None = None,
        version: int | None = None,
        storage_type: str | None = None,
        domain_class: Literal["data", "iso", "export"] = "data",
        remote_path: str | None = None,
        block_size: int = 512,
        force: bool = False,
    ) -> EngineDomain:
        """Make a domain called *name*: in the directory of that name, or a volume group of *devices*.

        Raises: AlreadyExists, InvalidName, UnsupportedVersion, Illegal, LvmError.
        """
        if domain_class not in _CLASSES:
            raise Illegal(f"there is no class of domains '{printable(str(domain_class)[:40])}'")
        if version is None:
            version = md.LATEST_VERSION if domain_class == "data" else 0
        if devices is not None:
            made: AnyDomain = self._context.change(
                block_group.create_block_domain,
                self._require_lvm(),
                self._runner,
                make_id(),
                devices,
                version=version,
                storage_type=storage_type or "ISCSI",
                description=name,
                ctime=self._context.now(),
                force=force,
            )
            return self._keep(made)
        if not name or "/" in name or name.startswith(".") or not name.isprintable():
            raise InvalidName(f"not the name of a directory: '{printable(name[:80])}'")
        path = f"{self.place}/{name}"
        os.makedirs(path, exist_ok=True)  # noqa: PTH103
        made = self._context.change(
            FileDomain.create,
            path,
            make_id(),
            version=version,
            storage_type=storage_type or "LOCALFS",
            domain_class=_CLASSES[domain_class],
            description=name,
            remote_path=remote_path or os.path.abspath(path),  # noqa: PTH100
            block_size=block_size,
            ctime=self._context.now(),
        )
        return self._keep(made)

    def _require_lvm(self) -> Lvm:
        if self._lvm is None:
            raise Illegal("the engine was connected without devices", path=self.place)
        return self._lvm

    def _places(self) -> dict[str, str]:
        """Return by UUID the directories of domains: directly in the place, or in a directory of it."""
        found = {}
        below = sorted(entry.path for entry in os.scandir(self.place) if entry.is_dir() and not is_id(entry.name))
        for mount in (self.place, *below):
            for path in discover(mount):
                found[os.path.basename(path)] = path
        return found

    def domains(self) -> list[EngineDomain]:
        """Return all domains that can be opened, by UUID; :meth:`domain` says why another cannot."""
        uuids = set(self._places()) | set(BlockDomain.discover(self._lvm) if self._lvm is not None else ())
        found = []
        for uuid in sorted(uuids):
            try:
                found.append(self.domain(uuid))
            except Error:
                continue
        return found

    def domain(self, name: str) -> EngineDomain:
        """Return a domain by UUID or name.  Raises: NotFound, MetadataError."""
        if not is_id(name):
            named = [domain for domain in self.domains() if domain.name == name]
            if len(named) != 1:
                raise NotFound(f"{len(named)} domains are called '{printable(name[:80])}'", path=self.place)
            return named[0]
        if name not in self._open:
            self._keep(self.open_anew(name))
        return self._open[name]

    def open_anew(self, uuid: str) -> AnyDomain:
        """Open a domain once more, for the caller alone to close.  Raises: NotFound, MetadataError."""
        path = self._places().get(uuid)
        if path is not None:
            return FileDomain.open(path)
        if self._lvm is not None:
            return BlockDomain.open(self._lvm, uuid)
        raise NotFound(f"there is no domain {uuid}", path=self.place)

    def destroy_domain(self, domain: EngineDomain) -> None:
        """Remove a domain with everything in it.  Raises: Illegal while it is attached."""
        uuid = domain.uuid
        domain.destroy()
        self._open.pop(uuid, None)
        domain.close()

    # Pools

    def _keep_pool(self, pool: StoragePool) -> EnginePool:
        made = EnginePool(self, self._context, pool)
        self._pools.append(made)
        return made

    def create_pool(self, name: str, master: EngineDomain, *others: EngineDomain) -> EnginePool:
        """Make a pool of unattached domains."""
        members = [other.domain for other in others]
        made = self._context.change(StoragePool.create, make_id(), name, master.domain, members)
        return self._keep_pool(made)

    def pools(self) -> list[EnginePool]:
        """Return the pools whose master is here."""
        domains = [domain.domain for domain in self.domains()]
        uuids = {uuid for domain in domains if domain.metadata.role == md.MASTER for uuid in domain.metadata.pools}
        return [self.pool(uuid) for uuid in sorted(uuids)]

    def pool(self, uuid: str | None = None) -> EnginePool:
        """Return a pool, the only one by default.  Raises: NotFound."""
        if uuid is None:
            found = self.pools()
            if len(found) != 1:
                raise NotFound(f"{len(found)} pools are here", path=self.place)
            return found[0]
        master = find_master(uuid, [domain.domain for domain in self.domains()])
        if master is None:
            raise NotFound(f"the master of pool {printable(uuid[:64])} is not here", path=self.place)
        return self._keep_pool(StoragePool.open(uuid, master))

    def reconstruct(self, uuid: str, name: str, master: EngineDomain, *, master_version: int) -> EnginePool:
        """Make *master* the master of a pool whose master is lost; *master_version* is above the lost one's.

        Members are the domains here that name the pool.  Raises: Illegal, AlreadyExists when its master is here.
        """
        domains = [domain.domain for domain in self.domains() if uuid in domain.domain.metadata.pools]
        present = find_master(uuid, domains)
        if present is not None and present.metadata.master_version >= master_version:
            raise AlreadyExists(f"a master with version {present.metadata.master_version} is here", path=present.name)
        members = {domain.uuid: md.ACTIVE for domain in domains}
        made = self._context.change(
            StoragePool.reconstruct, uuid, name, master.domain, members, master_version=master_version
        )
        return self._keep_pool(made)

    def recover(self, only: Collection[str] | None = None) -> dict[str, DomainReport]:
        """End or take back everything that was cut, in all domains; returns by UUID what is left.

        *only* are the domains that the caller may change: what looks cut in a
        domain of another pool may be what its own manager is doing.
        One domain after the other: the report of one that cannot be opened or
        mended has the ``error``, as has that of ``lvm`` where no volume group
        could be looked for.  Raises: NotAuthorized.
        """
        reports: dict[str, DomainReport] = {}
        uuids = set(self._places())
        try:
            uuids.update(BlockDomain.discover(self._lvm) if self._lvm is not None else ())
        except (Error, OSError) as error:
            reports["lvm"] = unread(error)
        for uuid in sorted(uuids if only is None else uuids.intersection(only)):
            try:
                domain = self.domain(uuid)
                if domain.domain.metadata.domain_class != md.ISO:
                    reports[uuid] = domain.mend()
            except NotAuthorized:
                raise
            except (Error, OSError) as error:
                reports[uuid] = unread(error)
        self._repair_roles(uuid for uuid, report in reports.items() if not report.error)
        return reports

    def _repair_roles(self, uuids: Iterable[str]) -> None:
        """Of two masters of a pool, as a cut leaves them when the role moves, keep the one with the higher version."""
        domains = [self.domain(uuid).domain for uuid in uuids]
        for domain in domains:
            for uuid in domain.metadata.pools if domain.metadata.role == md.MASTER else ():
                master = find_master(uuid, domains)
                if master is not None and master.metadata.master_version > domain.metadata.master_version:
                    self._context.change(StoragePool.open(uuid, master).repair_role, domain)

    def close(self) -> None:
        """Close all domains and give the token back."""
        while self._pools:
            self._pools.pop().close()
        while self._open:
            self._open.popitem()[1].close()
        own, self._own = self._own, None
        if own is not None:
            own.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class EnginePool:
    """A pool: members, master, space, and the watch over its domains.  ``pool`` is what it is made of."""

    __slots__ = ("_context", "_engine", "_monitors", "pool", "recovery")

    def __init__(self, engine: Engine, context: Context, pool: StoragePool) -> None:
        self._engine = engine
        self._context = context
        self._monitors: dict[str, DomainMonitor] = {}
        self.pool = pool
        self.recovery = Recovery()

    @property
    def uuid(self) -> str:
        """Its UUID."""
        return self.pool.uuid

    @property
    def name(self) -> str:
        """What people call it."""
        return self.pool.name

    @property
    def members(self) -> dict[str, str]:
        """``Active`` or ``Attached`` by domain UUID."""
        return self.pool.members

    def info(self) -> dict[str, object]:
        """Return what reports show of it."""
        return self.pool.info()

    def attach(self, domain: EngineDomain) -> None:
        """Make a domain a member; it is active after :meth:`activate`."""
        self._context.change(self.pool.attach, domain.domain)

    def detach(self, domain: EngineDomain) -> None:
        """Take a domain that is not active out."""
        self._context.change(self.pool.detach, domain.domain)

    def activate(self, domain: EngineDomain) -> None:
        """Let hosts use a member; an older data domain gets the pool's version, a former master its place."""
        version = self.pool.master.metadata.version
        self._context.change(self.pool.activate, domain.domain)
        if domain.domain.metadata.domain_class == md.DATA and domain.version < version:
            domain.upgrade(version)

    def deactivate(self, domain: EngineDomain | str) -> None:
        """Let no host use a member; one that is lost is named by its UUID."""
        uuid = domain if isinstance(domain, str) else domain.uuid
        self._context.change(self.pool.deactivate, uuid)
        self.recovery.forget_domain(uuid)

    def migrate_master(self, domain: EngineDomain) -> None:
        """Make another active data domain the master."""
        self._context.change(self.pool.migrate_master, domain.domain)

    def destroy(self) -> None:
        """End a pool whose only member is its master."""
        self._context.change(self.pool.destroy)

    def active(self) -> list[EngineDomain]:
        """Return the active members that can be opened."""
        found = {domain.uuid: domain for domain in self._engine.domains()}
        return [found[uuid] for uuid, state in self.members.items() if state == md.ACTIVE and uuid in found]

    def space(self) -> Space:
        """Return the sum over its active data domains."""
        return total_space(domain.space() for domain in self.active() if domain.domain.metadata.domain_class == md.DATA)

    def watch(
        self, seconds: float | None = None, policy: RecoveryPolicy | None = None
    ) -> tuple[dict[str, DomainStatus], list[Event]]:
        """Check all active members once from this host; returns their status and what is to be done.

        A former master that is back gets its place as an ordinary member.
        *seconds* is the time now.
        """
        if policy is not None and self.recovery.policy != policy:
            self.recovery = Recovery(policy)
        now = float(self._context.now()) if seconds is None else seconds
        wanted = [uuid for uuid, state in self.members.items() if state == md.ACTIVE]
        self.recovery.watch(wanted)
        for uuid in set(self._monitors) - set(wanted):
            self._monitors.pop(uuid).close()
        found = {}
        for uuid in wanted:
            if uuid not in self._monitors:
                self._monitors[uuid] = DomainMonitor(uuid, partial(self._engine.open_anew, uuid), _exact_seconds)
            found[uuid] = self._monitors[uuid].check()
            self.recovery.report(0, uuid, bool(found[uuid].valid), now)
        events = self.recovery.events(now)
        for event in events:
            if event.kind == "back":
                back = self._engine.domain(event.uuid)
                back.reopen()
                if back.uuid == self.pool.master.uuid:
                    self.pool.master = back.domain
                self._context.change(self.pool.repair_role, back.domain)
        return found, events

    def close(self) -> None:
        """End the watch; the domains stay open."""
        while self._monitors:
            self._monitors.popitem()[1].close()
