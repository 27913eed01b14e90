# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""One host of the fail-over tests, a process: joins, manages a real pool when it can, writes a journal.

usage: failover_host.py RUN_DIR HOST_ID DOMAIN_DIRECTORY JOURNAL

Each change of the pool appends "time epoch pid" to the journal, which is
opened for appending, so that the order of all hosts' changes is kept.
"""

from __future__ import annotations

import os
import sys
import time
from typing import NoReturn

from qcowlib.errors import Error
from spm.errors import LeaseError, LeaseHeld
from spm.sanlock import LibraryClient, SanlockLeases
from spm.service import SpmHost, SpmService
from spm.terms import MasterTerms
from spm.timing import LeaseTiming
from storage_pool.errors import NotAuthorized
from storage_pool.file_domain import FileDomain
from storage_pool.leases import Lease, LeaseArea

TIMING = LeaseTiming(io_timeout_s=1.0)


def clock() -> float:
    """Return seconds, also while the host sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def panic(reason: str) -> NoReturn:
    """End at once."""
    print("panic", reason, flush=True)
    os._exit(70)


def work(service: SpmService, path: str, journal: int) -> None:
    """Change the pool again and again while this host is its manager."""
    token = service.token
    number = 0
    while token is not None and service.watch():
        try:
            domain = FileDomain.open(path)
            try:
                domain.change(token, {"DESCRIPTION": f"change {number} of {token.epoch}"})
            finally:
                domain.close()
            os.write(journal, f"{clock():.6f} {token.epoch} {os.getpid()}\n".encode())
            number += 1
        except NotAuthorized:
            continue
        time.sleep(0.02)


def main(run_dir: str, host_id: str, path: str, journal_path: str) -> None:
    """Run until killed."""
    leases = SanlockLeases(LibraryClient(), TIMING, run_dir)
    uuid = os.path.basename(path)
    leases.join(uuid, int(host_id), LeaseArea(f"{path}/dom_md/ids", 0))
    print("joined", flush=True)
    lease = Lease(uuid, "SDM", LeaseArea(f"{path}/dom_md/leases", 1 << 20))
    service = SpmService(
        SpmHost(int(host_id), leases, TIMING, clock, time.sleep, panic),
        lease,
        MasterTerms(lambda: FileDomain.open(path)),
    )
    journal = os.open(journal_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    while True:
        try:
            epoch = service.start().epoch
        except (LeaseHeld, LeaseError):
            time.sleep(0.2)
            continue
        except Error as error:
            print("failed", error, flush=True)
            time.sleep(0.2)
            continue
        print("spm", epoch, flush=True)
        work(service, path, journal)
        print("lost", epoch, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
