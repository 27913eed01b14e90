# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Golden data, written by the real thing, and domains of both kinds, as fixtures."""

import contextlib
import json
import subprocess
from pathlib import Path

import pytest

from storage_pool import block_group
from storage_pool.block_domain import BlockDomain
from storage_pool.embedded import FileToken
from storage_pool.file_domain import FileDomain
from storage_pool.ids import make_id
from storage_pool.process import SystemRunner
from storage_pool.testing.lvm import attached, local_lvm, loop_devices
from storage_pool.testing.process import RecordingRunner

GOLDEN = Path(__file__).parent / "golden"
GIB = 1 << 30
CTIME = 1617235200


@pytest.fixture(scope="session")
def golden():
    return GOLDEN


@pytest.fixture(scope="session")
def tables():
    return json.loads((GOLDEN / "tables/tables.json").read_text())


@pytest.fixture
def token(tmp_path):
    with FileToken(str(tmp_path / "pool.lock")) as made:
        yield made


@pytest.fixture
def runner():
    return RecordingRunner(SystemRunner())


@pytest.fixture(scope="session")
def block_masters(tmp_path_factory):
    """Make the devices of a fresh block domain of a version once, to be copied."""
    made = {}

    def master(version):
        if version not in made:
            folder = tmp_path_factory.mktemp(f"block{version}")
            with loop_devices(folder, 24 * GIB) as devices, FileToken(str(folder / "lock")) as token:
                lvm = local_lvm(folder / "host", devices)
                uuid = make_id()
                block_group.create_block_domain(token, lvm, SystemRunner(), uuid, devices, version=version, ctime=CTIME)
            made[version] = folder / "lun0", uuid
        return made[version]

    return master


@pytest.fixture
def file_domain(tmp_path, token):
    """Make a file domain of a version."""
    made = []

    def make(version=5, storage_type="NFS"):
        mount = tmp_path / f"mount{len(made)}"
        mount.mkdir()
        domain = FileDomain.create(
            token,
            str(mount),
            make_id(),
            version=version,
            storage_type=storage_type,
            remote_path="server:/export",
            ctime=CTIME,
        )
        made.append(domain)
        return domain

    yield make
    for domain in made:
        domain.close()


@pytest.fixture
def block_domain(tmp_path, block_masters, runner):
    """Open a fresh block domain of a version on a device of its own."""
    with contextlib.ExitStack() as stack:

        def make(version=5):
            master, uuid = block_masters(version)
            folder = tmp_path / make_id()
            folder.mkdir()
            subprocess.run(["cp", "--sparse=always", master, folder / "lun"], check=True)
            devices = stack.enter_context(attached([folder / "lun"]))
            return BlockDomain.open(local_lvm(folder / "host", devices, runner), uuid)

        yield make


@pytest.fixture(params=["file", pytest.param("block", marks=pytest.mark.real("lvm", "losetup", "mke2fs"))])
def make_domain(request):
    """Make a domain of a version, of one kind after the other."""
    return request.getfixturevalue(f"{request.param}_domain")
