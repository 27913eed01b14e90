# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A pool: one master domain that keeps the list of members, and the rules for membership.

Invariant: the list on the master is the truth; a domain names its pool before
it is in the list and until it is out of it, so that no other pool takes it
meanwhile, and each change may be run again after a cut.  S2: a term of the
pool manager that is not newer than the stored one is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from . import metadata_domain as md
from .block_domain import BlockDomain
from .errors import AlreadyExists, Illegal, NotAuthorized, NotFound, UnsupportedVersion
from .file_domain import FileDomain
from .ids import check_id

if TYPE_CHECKING:
    from .token import SpmToken

__all__ = ["StoragePool", "find_master"]

AnyDomain = FileDomain | BlockDomain


class StoragePool:
    """A pool by its master domain; other members are handed in where they are needed."""

    __slots__ = ("master", "uuid")

    def __init__(self, uuid: str, master: AnyDomain) -> None:
        """Use :meth:`open` or :meth:`create`."""
        self.uuid = uuid
        self.master = master

    @classmethod
    def create(
        cls,
        token: SpmToken,
        uuid: str,
        name: str,
        master: AnyDomain,
        others: Sequence[AnyDomain] = (),
        *,
        master_version: int = 1,
    ) -> StoragePool:
        """Make a pool of unattached domains; the master's keys are the commit.

        Raises: Illegal for a domain of another pool or a master that is no
        data domain, UnsupportedVersion for data domains of several versions.
        """
        check_id(uuid, "pool UUID")
        if master.metadata.domain_class != md.DATA:
            raise Illegal("the master of a pool is a data domain", path=master.name)
        for domain in (master, *others):
            _check_free(domain, uuid)
            if domain.metadata.domain_class == md.DATA and domain.metadata.version != master.metadata.version:
                raise UnsupportedVersion("all data domains of a new pool have one version", path=domain.name)
        values = md.new_pool_values(master.uuid, name, master_version, master.metadata.version)
        members = {domain.uuid: md.ACTIVE for domain in (master, *others)}
        values["POOL_DOMAINS"] = md.encode_pool_domains(members)
        for domain in others:
            _join(token, domain, uuid)
        if isinstance(master, FileDomain):
            master.become_master(token)
        master.change(token, {**values, "ROLE": md.MASTER, "POOL_UUID": uuid})
        return cls(uuid, master)

    @classmethod
    def open(cls, uuid: str, master: AnyDomain, *, master_version: int | None = None) -> StoragePool:
        """Open a pool by its master.

        Raises: Illegal when the domain is not, or no longer, the master of this pool.
        """
        view = master.metadata
        if view.role != md.MASTER or uuid not in view.pools:
            raise Illegal(f"the domain is not the master of pool {check_id(uuid, 'pool UUID')}", path=master.name)
        if master_version is not None and view.master_version != master_version:
            raise Illegal(f"the master has version {view.master_version}, not {master_version}", path=master.name)
        return cls(uuid, master)

    @classmethod
    def reconstruct(
        cls,
        token: SpmToken,
        uuid: str,
        name: str,
        domain: AnyDomain,
        members: Mapping[str, str],
        *,
        master_version: int,
    ) -> StoragePool:
        """Make *domain* the master of a pool whose master is lost.

        *members* is what the caller knows of the pool (status by UUID),
        *master_version* a number above that of the lost master, which is
        refused from then on wherever it comes back (:meth:`repair_role`).
        The keys of *domain* are the commit; its pool keys, if any, give way.

        Raises: Illegal for no data domain, one of another pool, or a version
        that is not newer than its own; NotFound when it is no member.
        """
        check_id(uuid, "pool UUID")
        view = domain.metadata
        if view.domain_class != md.DATA:
            raise Illegal("the master of a pool is a data domain", path=domain.name)
        if domain.uuid not in members:
            raise NotFound(f"the domain {domain.uuid} is no member of the pool", path=uuid)
        _check_free(domain, uuid)
        if master_version <= max(view.master_version, 0):
            raise Illegal(f"master version {master_version} is not above {view.master_version}", path=domain.name)
        values = md.new_pool_values(domain.uuid, name, master_version, view.version)
        values["POOL_DOMAINS"] = md.encode_pool_domains({**members, domain.uuid: md.ACTIVE})
        if isinstance(domain, FileDomain):
            domain.become_master(token)
        domain.change(token, {**values, "ROLE": md.MASTER, "POOL_UUID": uuid})
        return cls(uuid, domain)

    @property
    def members(self) -> dict[str, str]:
        """``Active`` or ``Attached`` by domain UUID."""
        return self.master.metadata.pool_domains

    @property
    def name(self) -> str:
        """What people call it."""
        return self.master.metadata.raw.get("POOL_DESCRIPTION", "")

    def info(self) -> dict[str, object]:
        """Return what reports show of a pool."""
        view = self.master.metadata
        return {
            "domains": self.members,
            "lver": view.spm_lver,
            "master_uuid": self.master.uuid,
            "master_ver": view.master_version,
            "name": self.name,
            "spm_id": view.spm_id,
            "uuid": self.uuid,
            "version": str(view.version),
        }

    def _write(self, token: SpmToken, members: dict[str, str]) -> None:
        self.master.change(token, {"POOL_DOMAINS": md.encode_pool_domains(members)})

    def _require(self, uuid: str) -> None:
        if uuid not in self.members:
            raise NotFound(f"the domain {check_id(uuid, 'domain UUID')} is no member of the pool", path=self.uuid)

    def attach(self, token: SpmToken, domain: AnyDomain) -> None:
        """Make a domain a member, not yet active.

        Raises: AlreadyExists, Illegal for a domain of another pool (ISO
        domains may be shared),
        UnsupportedVersion for one newer than the master, MetadataError when a
        V1 master has no room for it, which is found before anything changes.
        """
        members = self.members
        if domain.uuid in members:
            raise AlreadyExists(f"the domain {domain.uuid} is a member already", path=self.uuid)
        _check_free(domain, self.uuid)
        view = domain.metadata
        if view.domain_class == md.DATA and view.version > self.master.metadata.version:
            raise UnsupportedVersion(
                f"the domain has version {view.version}, the pool {self.master.metadata.version}", path=domain.name
            )
        members[domain.uuid] = md.ATTACHED
        self._check_room(members)
        _join(token, domain, self.uuid)
        self._write(token, members)

    def _check_room(self, members: dict[str, str]) -> None:
        value = md.encode_pool_domains(members)
        if self.master.block and self.master.metadata.version == 0:
            md.pack_v1({**self.master.metadata.raw, "POOL_DOMAINS": value})

    def detach(self, token: SpmToken, domain: AnyDomain) -> None:
        """Take a domain that is not active out of the pool.  Raises: NotFound, Illegal."""
        members = self.members
        if domain.uuid == self.master.uuid:
            raise Illegal("the master leaves a pool last, by destroying the pool", path=self.uuid)
        if members.get(domain.uuid) == md.ACTIVE:
            raise Illegal(f"the domain {domain.uuid} is active", path=self.uuid, hint="Deactivate it first.")
        if domain.uuid not in members and self.uuid not in domain.metadata.pools:
            self._require(domain.uuid)
        if members.pop(domain.uuid, None) is not None:
            self._write(token, members)
        pools = [pool for pool in domain.metadata.pools if pool != self.uuid]
        domain.change(token, {"POOL_UUID": ",".join(pools)})

    def activate(self, token: SpmToken, domain: AnyDomain) -> None:
        """Let hosts use a member.  Raises: NotFound, Illegal when the domain names another pool."""
        self._require(domain.uuid)
        if self.uuid not in domain.metadata.pools:
            raise Illegal("the domain does not name this pool", path=domain.name, hint="Attach it again.")
        self.repair_role(token, domain)
        self._write(token, {**self.members, domain.uuid: md.ACTIVE})

    def deactivate(self, token: SpmToken, uuid: str) -> None:
        """Let no host use a member; a lost domain may be deactivated too.

        Raises: NotFound, Illegal for the master.
        """
        self._require(uuid)
        if uuid == self.master.uuid:
            raise Illegal("the master is active as long as the pool", path=self.uuid, hint="Move the master first.")
        self._write(token, {**self.members, uuid: md.ATTACHED})

    def repair_role(self, token: SpmToken, domain: AnyDomain) -> bool:
        """Make a former master that came back an ordinary member; returns whether it was one.

        Raises: Illegal when its master version is above this pool's: then this master is the former one.
        """
        view = domain.metadata
        if domain.uuid == self.master.uuid or view.role != md.MASTER or self.uuid not in view.pools:
            return False
        if view.master_version > self.master.metadata.master_version:
            raise Illegal(
                f"the domain is master with version {view.master_version}, this pool's is"
                f" {self.master.metadata.master_version}",
                path=domain.name,
                hint="Open the pool by this domain.",
            )
        domain.change(token, {"ROLE": md.REGULAR, "MASTER_VERSION": "0"})
        return True

    def set_owner(self, token: SpmToken, host_id: int, lver: int) -> None:
        """Store who manages the pool (-1: nobody) and the number of the term.

        Raises: NotAuthorized when a newer term, or another owner of this one, is stored.
        """
        view = self.master.metadata
        if lver < view.spm_lver or (lver == view.spm_lver and host_id != -1 and view.spm_id not in (-1, host_id)):
            raise NotAuthorized(f"term {lver} is over; the pool is at {view.spm_lver}", path=self.uuid)
        self.master.change(token, {"POOL_SPM_ID": str(host_id), "POOL_SPM_LVER": str(lver)})

    def migrate_master(self, token: SpmToken, domain: AnyDomain) -> None:
        """Make another active data domain the master, one version on.

        The new master's keys are the commit; a former master that was cut
        from its role keeps a lower version, which :meth:`open` refuses.
        What tasks left on the old master is not moved here.

        Raises: NotFound, Illegal.
        """
        self._require(domain.uuid)
        if self.members[domain.uuid] != md.ACTIVE or domain.metadata.domain_class != md.DATA:
            raise Illegal("the master of a pool is an active data domain", path=domain.name)
        if domain.metadata.version != self.master.metadata.version:
            raise Illegal("the new master has another version than the pool", path=domain.name)
        old = self.master
        keys = {key: old.metadata.raw.get(key) for key in md.POOL_KEYS}
        keys["MASTER_VERSION"] = str(old.metadata.master_version + 1)
        if isinstance(domain, FileDomain):
            domain.become_master(token)
        domain.change(token, {**keys, "ROLE": md.MASTER})
        self.master = domain
        old.change(token, {"ROLE": md.REGULAR, "MASTER_VERSION": "0"})

    def destroy(self, token: SpmToken) -> None:
        """End a pool whose only member is its master.  Raises: Illegal."""
        if others := set(self.members) - {self.master.uuid}:
            raise Illegal(f"the pool has {len(others)} other members", path=self.uuid, hint="Detach them first.")
        changes: dict[str, str | None] = dict.fromkeys(md.POOL_KEYS)
        self.master.change(token, {**changes, "POOL_UUID": "", "ROLE": md.REGULAR})


def find_master(uuid: str, domains: Iterable[AnyDomain]) -> AnyDomain | None:
    """Return the master of a pool among *domains*: of several, after a cut, the one with the highest version."""
    masters = [domain for domain in domains if domain.metadata.role == md.MASTER and uuid in domain.metadata.pools]
    return max(masters, key=lambda domain: domain.metadata.master_version, default=None)


def _check_free(domain: AnyDomain, pool: str) -> None:
    others = [other for other in domain.metadata.pools if other != pool]
    if others and domain.metadata.domain_class != md.ISO:
        raise Illegal(f"the domain belongs to pool {others[0]}", path=domain.name, hint="Detach it there first.")


def _join(token: SpmToken, domain: AnyDomain, pool: str) -> None:
    pools = domain.metadata.pools
    if pool not in pools:
        domain.change(token, {"POOL_UUID": ",".join([*pools, pool])})
