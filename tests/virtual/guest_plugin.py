# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the block tests inside a virtual host, where the device mapper is real.

Instead of ``conftest.py``, whose imports alone take 15 seconds there: the
domains that the host outside made are on /dev/vda, /dev/vdb..., one of each
version in ``VIRTUAL_DOMAINS`` (``5=UUID 0=UUID``), and volumes are activated.
"""

import os

import pytest

from storage_pool.block_domain import BlockDomain
from storage_pool.embedded import FileToken
from storage_pool.lvm import Lvm, LvmHost
from storage_pool.process import SystemRunner
from storage_pool.testing.process import RecordingRunner

DOMAINS = dict(part.split("=") for part in os.environ["VIRTUAL_DOMAINS"].split())
DISKS = tuple(f"/dev/vd{letter}" for letter in os.environ["VIRTUAL_DISKS"])


def pytest_configure(config):
    for marker in ("real(*programs)", "crash", "fuzz", "bare"):
        config.addinivalue_line("markers", marker)


@pytest.fixture
def token(tmp_path):
    with FileToken(str(tmp_path / "pool.lock")) as made:
        yield made


@pytest.fixture
def runner():
    return RecordingRunner(SystemRunner())


@pytest.fixture
def lvm(runner):
    return Lvm(runner, LvmHost(lambda: DISKS, activation=True))


@pytest.fixture
def block_domain(lvm):
    """Open the domain of a version; its volumes are taken away afterwards, active ones too."""
    made = []

    def make(version=5):
        made.append(BlockDomain.open(lvm, DOMAINS[str(version)]))
        return made[-1]

    yield make
    for domain in made:
        domain.changed()
        special = ("metadata", "ids", "inbox", "outbox", "leases", "xleases", "master")
        lvm.remove_volumes(domain.uuid, [name for name in domain.state.lvs if name not in special])


@pytest.fixture
def make_domain(block_domain):
    return block_domain


@pytest.fixture
def spare():
    """Name a disk that holds nothing."""
    return DISKS[-1]
