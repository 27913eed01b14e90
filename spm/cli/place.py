# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A real pool as a host needs it: its master, the places of its leases, the lease manager of this host.

Invariant: sanlock and local locks are never mixed on one domain; V1 and V2
domains, whose leases are of an older form, are for one host alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from qcowlib.errors import UsageError
from spm.children import GuardedRunner
from spm.cli.endpoint import answers
from spm.embedded import EmbeddedLeases
from spm.errors import LeaseError
from spm.lease_watch import LeaseToken
from spm.proof import ProvingLeases
from spm.sanlock import RUN_DIR_VARIABLE, SanlockLeases, make_client
from spm.timing import LeaseTiming
from storage_pool import metadata_domain as md
from storage_pool.block_domain import BlockDomain
from storage_pool.engine import Engine, connect
from storage_pool.errors import Illegal
from storage_pool.file_domain import FileDomain
from storage_pool.handles import AnyDomain
from storage_pool.ids import is_id
from storage_pool.leases import Lease, LeaseArea
from storage_pool.lvm import Lvm, LvmHost
from storage_pool.monitor import DomainMonitor
from storage_pool.process import ProcessRunner, SystemRunner

__all__ = ["Place", "clock", "lease_manager", "pool_lease"]

#: Versions from here on have leases of sanlock.
_SANLOCK_VERSION = 3
_DEFAULT_RUN_DIR = "/run/sanlock"


def clock() -> float:
    """Return seconds, also while the host sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Place(NamedTuple):
    """Where a pool is: its *master* (a directory or the UUID of a group), the folder of its domains, LVM's devices."""

    master: str
    folder: str
    devices: tuple[str, ...] | None
    activation: bool

    def lvm(self, runner: ProcessRunner) -> Lvm:
        """Return LVM limited to the devices."""
        devices = self.devices
        host = LvmHost(
            None if devices is None else lambda: devices,
            activation=self.activation,
            system_dir=os.environ.get("LVM_SYSTEM_DIR"),
            locking_dir=os.environ.get("QPOOL_LVM_LOCKING_DIR"),
        )
        return Lvm(runner, host)

    def open_master(self) -> AnyDomain:
        """Open the master, for each call anew.  Raises: Illegal for a domain that is no master."""
        block = is_id(self.master) and not Path(self.master).exists()
        master: AnyDomain = (
            BlockDomain.open(self.lvm(SystemRunner()), self.master) if block else FileDomain.open(self.master)
        )
        if master.metadata.role != md.MASTER or len(master.metadata.pools) != 1:
            master.close()
            raise Illegal("the domain is the master of no pool", path=master.name)
        return master

    def engine(self, token: LeaseToken | None, runner: ProcessRunner) -> Engine:
        """Return the engine of all domains here."""
        return connect(self.folder, lvm=self.lvm(runner), token=token, runner=runner)

    def monitor(self, uuid: str) -> DomainMonitor:
        """Return what watches the domain *uuid*."""
        return DomainMonitor(uuid, lambda: self.engine(None, SystemRunner()).domain(uuid).domain, clock)

    def members(self) -> list[str]:
        """Return the UUIDs of the pool's active domains."""
        with closing(self.open_master()) as master:
            members = master.metadata.pool_domains
            return sorted(uuid for uuid, status in members.items() if status == md.ACTIVE)


def pool_lease(master: AnyDomain) -> tuple[LeaseArea, Lease]:
    """Return where host ids are renewed, and the pool's lease, of the domain *master*.

    On a volume group without device mapper both are named by the physical
    volume that they lie on, which is the same place for every host.
    """
    view = master.metadata
    if isinstance(master, BlockDomain):
        ids, leases = _special(master, "ids", 0), _special(master, "leases", view.alignment)
    else:
        ids = LeaseArea(f"{master.name}/dom_md/ids", 0)
        leases = LeaseArea(f"{master.name}/dom_md/leases", view.alignment)
    return ids, Lease(view.uuid, "SDM", leases)


def _special(domain: BlockDomain, name: str, offset: int) -> LeaseArea:
    if domain.lvm.activation:
        if not domain.state.lv(name).active:
            domain.lvm.activate(domain.uuid, [name])
        return LeaseArea(f"/dev/{domain.uuid}/{name}", offset)
    for place in domain.state.placements(name):
        if place.start <= offset < place.start + place.size:
            return LeaseArea(place.device, place.offset + offset - place.start)
    raise Illegal(f"the volume {name} has no byte {offset}", path=domain.name)


def lease_manager(
    kind: str, timing: LeaseTiming, run_dir: str | None, folder: str, master: AnyDomain
) -> tuple[ProvingLeases, Callable[[], Sequence[int]]]:
    """Return the lease manager, and what gives the descriptors that keep its leases.

    *kind* ``auto`` takes sanlock where its daemon answers.
    Raises: LeaseError, UsageError.
    """
    version, local = master.metadata.version, master.metadata.type == "LOCALFS"
    daemon = Path(run_dir or os.environ.get(RUN_DIR_VARIABLE) or _DEFAULT_RUN_DIR) / "sanlock.sock"
    if kind == "auto":
        possible = version >= _SANLOCK_VERSION and not local
        kind = "sanlock" if possible and (run_dir is not None or daemon.exists()) else "embedded"
    if kind == "sanlock":
        if version < _SANLOCK_VERSION or local:
            what = "of one host (LOCALFS)" if local else f"of version {version}"
            raise UsageError(
                f"a domain {what} has no leases of sanlock, only local ones are possible", path=master.name
            )
        if not answers(str(daemon)):
            raise LeaseError(
                "no sanlock daemon listens here",
                path=str(daemon),
                hint="Start it, or name its folder with --sanlock-run-dir.",
            )
        sanlock = SanlockLeases(make_client(), timing, run_dir, clock)
        return sanlock, lambda: [sanlock.fileno()]
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)  # noqa: PTH103
    except OSError as error:
        raise LeaseError(f"no folder for locks: {error.strerror}", path=folder) from error
    embedded = EmbeddedLeases(folder, clock, time.sleep)
    return embedded, embedded.filenos


def guarded(token: LeaseToken, inherit: Callable[[], Sequence[int]]) -> GuardedRunner:
    """Return what runs helper programs of a term."""
    return GuardedRunner(token, clock, inherit)
