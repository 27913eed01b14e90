# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Real pools, and processes that manage them under local locks."""

import contextlib
import subprocess
import time

from spm.cli.place import clock, guarded, pool_lease
from spm.duties import PoolDuties
from spm.embedded import EmbeddedLeases
from spm.service import SpmHost, SpmService
from spm.terms import MasterTerms
from spm.timing import LeaseTiming
from storage_pool.block_domain import BlockDomain
from storage_pool.block_group import create_block_domain
from storage_pool.embedded import FileToken
from storage_pool.engine import connect
from storage_pool.file_domain import FileDomain
from storage_pool.ids import make_id
from storage_pool.lv_storage import volume_device
from storage_pool.pool import StoragePool
from storage_pool.process import SystemRunner
from storage_pool.testing.lvm import local_lvm, loop_devices

GIB = 1 << 30
CTIME = 1617235200
TIMING = LeaseTiming(io_timeout_s=1.0)


def panic(reason):
    raise AssertionError(reason)


class Pool:
    """A pool in *folder* and on *devices*; *open_master* takes how to run programs."""

    def __init__(self, folder, devices, open_master):
        self.folder = folder
        self.devices = devices
        self.told = []
        self.undone = []
        self._open = open_master

    def lvm(self, runner=None):
        return local_lvm(self.folder / "host", self.devices, runner)

    def open_master(self):
        return self._open(self.lvm())

    def token(self):
        """Return the right to change of somebody who prepares or looks; there is no manager meanwhile."""
        return FileToken(str(self.folder / "lock"))

    def engine(self, token, runner=None):
        runner = runner or SystemRunner()
        return connect(self.folder, token=token, lvm=self.lvm(runner), runner=runner)

    def manager(self, number=2):
        """Return the service of a host that is about to become the manager, and what gives its engine."""
        with contextlib.closing(self.open_master()) as master:
            area, lease = pool_lease(master)
        leases = EmbeddedLeases(str(self.folder), clock, time.sleep)
        leases.join(lease.lockspace, number, area)

        def open_engine(token):
            runner = guarded(token, leases.filenos)
            service.killers[:] = [runner.kill]
            return self.engine(token, runner)

        host = SpmHost(number, leases, TIMING, clock, time.sleep, panic)
        undo = {"note": lambda token, params: self.undone.append(params)}
        duties = PoolDuties(self.open_master, open_engine, self.told.append, undo=undo, hosts=4)
        service = SpmService(host, lease, MasterTerms(self.open_master), duties.steps())
        return service, open_engine

    def manage(self, number, work=None):
        """Be the manager for as long as *work* takes, which gets the engine."""
        service, open_engine = self.manager(number)
        token = service.start()
        if work is not None:
            with open_engine(token) as engine:
                work(engine)
        service.stop()


@contextlib.contextmanager
def file_pool(folder):
    """Give a pool whose master is a directory, where no volume group is seen."""
    with FileToken(str(folder / "lock")) as token:
        made = FileDomain.create(
            token, str(folder), make_id(), version=5, storage_type="LOCALFS", remote_path="/x", ctime=CTIME
        )
        StoragePool.create(token, make_id(), "pool", made)
        made.close()
    yield Pool(folder, [], lambda lvm: FileDomain.open(made.name))


@contextlib.contextmanager
def block_pool(folder):
    """Give a pool whose master is a volume group; it has a folder for tasks."""
    with loop_devices(folder, 24 * GIB) as devices:
        lvm = local_lvm(folder / "host", devices)
        uuid = make_id()
        with FileToken(str(folder / "lock")) as token:
            domain = create_block_domain(token, lvm, SystemRunner(), uuid, devices, version=5, ctime=CTIME)
            StoragePool.create(token, make_id(), "pool", domain)
        with volume_device(lvm, SystemRunner(), domain.state, "master") as device:
            subprocess.run(["debugfs", "-w", "-R", "mkdir tasks", device], check=True, capture_output=True)
        yield Pool(folder, devices, lambda lvm: BlockDomain.open(lvm, uuid))
