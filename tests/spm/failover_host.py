# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""One host of the fail-over tests, a process: joins, manages a real pool when it can, writes a journal.

usage: failover_host.py RUN_DIR HOST_ID MASTER JOURNAL [DEVICE]

MASTER is the directory of a file domain, or the UUID of a volume group on DEVICE.

Each change of the pool appends "time epoch pid" to the journal once it is
made; the time is that of its begin.  Each term has a helper program, which
writes "time epoch" into JOURNAL.helper as long as it lives.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import NoReturn

from qcowlib.errors import Error
from spm.children import GuardedRunner
from spm.cli.place import Place, clock, guarded, pool_lease
from spm.errors import LeaseError, LeaseHeld, LeaseLost
from spm.lease_watch import LeaseToken
from spm.sanlock import LibraryClient, SanlockLeases
from spm.service import SpmHost, SpmService
from spm.terms import MasterTerms
from spm.timing import LeaseTiming
from storage_pool.block_domain import BlockDomain
from storage_pool.errors import NotAuthorized

TIMING = LeaseTiming(io_timeout_s=1.0)
HELPER = 'while read now rest < /proc/uptime; do echo "$now $1" >> "$2"; sleep 0.5; done'


def panic(reason: str) -> NoReturn:
    """End at once."""
    print("panic", reason, flush=True)
    os._exit(70)


def help_out(token: LeaseToken, runner: GuardedRunner, path: str) -> None:
    """Keep the helper program of a term running, which its deadline ends again and again."""
    while token.valid:
        try:
            runner.run(["sh", "-c", HELPER, "sh", str(token.epoch), path], timeout_s=1000.0)
        except LeaseLost:
            time.sleep(0.1)
        except Error:
            continue


def work(service: SpmService, place: Place, leases: SanlockLeases, journal_path: str) -> None:
    """Change the pool again and again while this host is its manager."""
    token = service.token
    if token is None:
        return
    runner = guarded(token, lambda: [leases.fileno()])
    service.killers[:] = [runner.kill]
    threading.Thread(target=help_out, args=(token, runner, f"{journal_path}.helper"), daemon=True).start()
    journal = os.open(journal_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    number = 0
    # What may be stored now; anything else is a late change of another term.
    expected: set[str] = set()
    while service.watch():
        began_s = clock()
        wanted = f"change {number} of {token.epoch}"
        try:
            domain = place.open_master()
            if isinstance(domain, BlockDomain):
                domain = BlockDomain.open(place.lvm(runner), domain.uuid)
            try:
                found = domain.metadata.description
                if expected and found not in expected:
                    print("overwritten", found, flush=True)
                expected.add(wanted)
                domain.change(token, {"DESCRIPTION": wanted})
                expected = {wanted}
            finally:
                domain.close()
            os.write(journal, f"{began_s:.6f} {token.epoch} {os.getpid()}\n".encode())
            number += 1
        except NotAuthorized:
            continue
        except Error as error:
            print("failed", error, flush=True)
            print("spm", token.epoch, flush=True)
        time.sleep(0.1)
    os.close(journal)


def main(run_dir: str, host_id: str, master: str, journal_path: str, device: str | None = None) -> None:
    """Run until killed."""
    place = Place(master, os.path.dirname(master), (device,) if device else None, activation=False)
    domain = place.open_master()
    ids, lease = pool_lease(domain)
    domain.close()
    leases = SanlockLeases(LibraryClient(), TIMING, run_dir, clock)
    leases.join(lease.lockspace, int(host_id), ids)
    print("joined", flush=True)
    service = SpmService(
        SpmHost(int(host_id), leases, TIMING, clock, time.sleep, panic), lease, MasterTerms(place.open_master)
    )
    while True:
        try:
            epoch = service.start().epoch
        except (LeaseHeld, LeaseError):
            time.sleep(1.0)
            continue
        except Error as error:
            print("failed", error, flush=True)
            time.sleep(1.0)
            continue
        print("spm", epoch, flush=True)
        work(service, place, leases, journal_path)
        print("lost", epoch, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
