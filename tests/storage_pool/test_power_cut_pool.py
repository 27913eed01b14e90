# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A power cut at any system call of an operation over several domains, or on a pool; then recovery.

Invariant: L6 across domains.  Each disk is where it was or where it was to go, whole, and never
in two places or none; a pool has the members that it had or was to have, and one master.
"""

import os
import sys

import pytest

import storage_pool
from qcowlib.storage.file import FileStorage
from tests.storage_pool import power_cut

KIB = 1 << 10
SIZE = 512 * KIB
CTIME = 1617235200
#: States a case; all of them with ./run crash.
AT_MOST = 8 if "QCOWLIB_LONG" not in os.environ else 1 << 30

pytestmark = [pytest.mark.crash, pytest.mark.real("strace")]


def engine_at(place):
    return storage_pool.connect(place, clock=lambda: CTIME)


def named(engine, name):
    return next(domain for domain in engine.domains() if domain.name == name)


def disk_of(domain):
    """The one that is no template."""
    return next(disk for disk in domain.disks() if not disk.is_template)


def upload(engine, place):
    with open(f"{place}.source", "rb") as source:
        named(engine, "two").upload(source, size=SIZE)


ACTS = {
    "create-domain": lambda engine, place: engine.create_domain("three"),
    "create-pool": lambda engine, place: engine.create_pool("other", named(engine, "spare")),
    "attach": lambda engine, place: engine.pool().attach(named(engine, "spare")),
    "activate": lambda engine, place: engine.pool().activate(named(engine, "idle")),
    "deactivate": lambda engine, place: engine.pool().deactivate(named(engine, "two")),
    "detach": lambda engine, place: engine.pool().detach(named(engine, "idle")),
    "migrate-master": lambda engine, place: engine.pool().migrate_master(named(engine, "two")),
    "destroy": lambda engine, place: named(engine, "spare").destroy(),
    "move": lambda engine, place: disk_of(named(engine, "one")).move(named(engine, "two")),
    "export": lambda engine, place: disk_of(named(engine, "one")).export(named(engine, "export")),
    "upload": upload,
}


def prepare(place):
    with open(f"{place}.source", "wb") as source:
        source.write(os.urandom(SIZE))
    with engine_at(place) as engine:
        one, two, idle = (engine.create_domain(name) for name in ("one", "two", "idle"))
        engine.create_domain("spare")
        export = engine.create_domain("export", domain_class="export")
        pool = engine.create_pool("pool", one, two, idle, export)
        pool.deactivate(idle)
        disk = one.create_disk(SIZE)
        for number in range(2):
            if number:
                disk.snapshot()
            with disk.open("r+") as image:
                image.pwrite(bytes([number + 1]) * 70000, number * 50000 + 7)


def run(act, place):
    """What the traced process does."""
    with engine_at(place) as engine:
        ACTS[act](engine, place)


def look(engine):
    """Return what disks there are, where, and what they read as; and the members of each pool with its master."""
    disks = {}
    for domain in engine.domains():
        for disk in domain.disks():
            with disk.open() as image:
                disks[domain.uuid, disk.image] = len(disk.chain), image.pread(image.size, 0)
    masters = [domain.uuid for domain in engine.domains() if domain.info()["role"] == "Master"]
    pools = {pool.uuid: pool.members for pool in engine.pools()}, masters
    return disks, pools


@pytest.mark.parametrize("act", ACTS)
def test_op21_a_power_cut_at_any_call_over_domains(tmp_path, monkeypatch, act):
    place = tmp_path / "place"
    place.mkdir()
    prepare(place)
    with engine_at(place) as engine:
        before = look(engine)
    code = f"from tests.storage_pool.test_power_cut_pool import run; run({act!r}, {str(place)!r})"
    log = power_cut.record([sys.executable, "-c", code], place)
    with engine_at(place) as engine:
        after = look(engine)
    # From here on nothing is cut: waiting for storage would prove nothing.
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(FileStorage, "flush", lambda self: None)
    for what in power_cut.states(log, tmp_path / "cut", most=AT_MOST):
        with engine_at(tmp_path / "cut") as engine:
            reports = engine.recover()
            assert all(report.clean for report in reports.values()), (what, reports)
            disks, pools = look(engine)
            assert disks in (before[0], after[0]), what
            assert pools in (before[1], after[1]), (what, pools, before[1], after[1])
