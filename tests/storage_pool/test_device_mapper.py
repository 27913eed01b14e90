# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Block domains on a real device mapper: in a virtual host, with domains that were made out here by extents.

One boot serves all: the tests below that this file names run inside, by the
fixtures of ``tests/virtual/guest_plugin.py``, the very functions that run out
here through extents; so do those of ``device_mapper_cases.py``, which need a
device mapper.  Each shows up here as a test of its own.
"""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from virtual_host import VirtualHost

from storage_pool import volume as vol
from storage_pool.block_domain import BlockDomain
from storage_pool.check import check_domain
from storage_pool.dump import dump_block
from storage_pool.ids import make_id
from storage_pool.testing.lvm import attached, local_lvm

GIB, MIB = 1 << 30, 1 << 20
HERE = "tests/storage_pool"
ALL = os.environ.get("QCOWLIB_VIRTUAL") == "all"
#: Run here through extents and there through device nodes.
SHARED = (
    "test_snapshot_merge.py::test_a_snapshot_keeps_what_was_and_the_leaf_takes_what_comes",
    "test_snapshot_merge.py::test_op02_merge_raises_the_capacity_of_a_smaller_base",
    "test_snapshot_merge.py::test_a_raw_logical_volume_that_grows_by_merge_shows_no_old_data",
    "test_snapshot_merge.py::test_op06_an_internal_base_is_shrunk_and_a_leaf_is_not",
    "test_snapshot_merge.py::test_a_merged_volume_has_the_size_that_its_data_need",
)
#: A command of LVM takes 0.3 s there and a start of Python one: the others take minutes, for ``./run virtual``.
SHORT = (
    "test_the_node_and_the_extents_hold_the_same_bytes",
    "test_extending_leaves_a_node_in_use_as_it_is_until_it_is_asked_to_follow",
    "test_a_volume_deactivated_behind_our_back_is_activated_again",
)
CASES = "device_mapper_cases.py"
VERSIONS = (5,)

pytestmark = [
    pytest.mark.real("virtual-host", "lvm", "losetup", "mke2fs"),
    pytest.mark.timeout(1200),
]


def names():
    text = Path(__file__).with_name(CASES).read_text()
    found = [f"{CASES}::{name}" for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)] + list(SHARED)
    return [name for name in found if ALL or name.endswith(SHORT)]


@pytest.fixture(scope="module")
def guest(block_masters, tmp_path_factory, project_root):
    """A virtual host with a domain of each version and a spare disk; the disks, and what its programs need to know."""
    folder = tmp_path_factory.mktemp("virtual")
    disks, domains = [], []
    for version in VERSIONS:
        master, uuid = block_masters(version)
        disks.append(folder / f"lun{version}")
        subprocess.run(["cp", "--sparse=always", master, disks[-1]], check=True)
        domains.append(f"{version}={uuid}")
    spare = folder / "spare"
    with spare.open("xb") as file:
        file.truncate(12 * GIB)
    environment = {
        "VIRTUAL_DOMAINS": " ".join(domains),
        "VIRTUAL_DISKS": "abcdef"[: len(disks) + 1],
        "PYTHONPATH": f"{project_root}:{project_root}/tests/virtual",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    with VirtualHost([*disks, spare]) as host:
        yield host, disks, environment


@pytest.fixture(scope="module")
def inside(guest, project_root):
    """Run all of it in one guest; return the outcome of each test and what was printed."""
    host, _, environment = guest
    off = [f"no:{name}" for name in ("cacheprovider", "xdist", "benchmark", "hypothesispytest", "timeout")]
    argv = [sys.executable, "-m", "pytest", "-c", "/dev/null", "--noconftest", "--import-mode=importlib", "-rA"]
    argv += [
        "--durations=0",
        "-v",
        "--tb=short",
        "--rootdir",
        project_root,
        *(part for name in off for part in ("-p", name)),
    ]
    argv += ["-p", "guest_plugin", *(f"{HERE}/{name}" for name in names())]
    done = host.run(argv, cwd=project_root, env=environment, timeout=900)
    found = re.findall(r"^(PASSED|FAILED|ERROR) \S*?(\w+\.py::\w+)(?:\[|\s|$)", done.stdout, re.M)
    outcomes = {}
    for outcome, name in found:
        outcomes.setdefault(name, set()).add(outcome)
    return outcomes, f"boot {host.boot_seconds:.1f} s\n{done.stdout}{done.stderr}"


#: Of the second host, in a process that has the volume open: how large it is before and after it is told to follow.
FOLLOW = """
import sys
from storage_pool.block_domain import BlockDomain
from storage_pool.lvm import Lvm, LvmHost
from storage_pool.process import SystemRunner

domain = BlockDomain.open(Lvm(SystemRunner(), LvmHost(lambda: ["/dev/vda"])), sys.argv[1])
storage = domain.open_volume(sys.argv[2], writable=True)
before = storage.size
domain.catch_up(sys.argv[2], storage)
storage.write(200 << 20, [b"guest" * 1024])
storage.flush()
print(before >> 20, storage.size >> 20)
storage.close()
"""


def test_a_volume_that_another_host_has_active_is_left_as_it_is_there(guest, inside, token, tmp_path, project_root):
    """Two hosts on one device: this one, by extents, and the virtual one, which runs a guest on the volume."""
    host, disks, environment = guest

    def there(*argv):
        done = host.run(argv, cwd=project_root, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    with attached(disks[:1]) as devices:
        uuid = environment["VIRTUAL_DOMAINS"].split("=")[1]
        domain = BlockDomain.open(local_lvm(tmp_path / "here", devices), uuid)
        spec = vol.VolumeSpec(make_id(), make_id(), 128 * MIB, "RAW", "PREALLOCATED")
        vol.create_volume(token, domain, spec, 1617235200)
        name = spec.volume
        node = f"/dev/{uuid}/{name}"
        there("lvm", "lvchange", "--available", "y", f"{uuid}/{name}")
        there(
            "sh", "-c", f"sleep 1000 3<>{node} >/dev/null 2>&1 & echo guest-data | dd of={node} conv=fsync 2>/dev/null"
        )
        state = there("dmsetup", "table"), there("dmsetup", "info", "-c", "--noheadings", "-o", "name,open,segments")
        # Extended, described, looked through and written beside: the other host's device stays what it was.
        domain.extend(token, name, 256 * MIB)
        vol.update_volume(token, domain, name, description="larger")
        dump_block(domain)
        assert not check_domain(domain).leftovers
        with contextlib.closing(domain.open_volume(name, writable=True)) as storage:
            data = bytearray(512)
            storage.read_into(0, [data])
            assert data.startswith(b"guest-data") and storage.size == 256 * MIB
            storage.write(4096, [b"from the first host".ljust(4096, b".")])
            storage.flush()
        assert state == (
            there("dmsetup", "table"),
            there("dmsetup", "info", "-c", "--noheadings", "-o", "name,open,segments"),
        )
        assert there("blockdev", "--getsize64", node) == str(128 * MIB)
        assert there("dd", f"if={node}", "bs=4096", "skip=1", "count=1", "iflag=direct").startswith(
            "from the first host"
        )
        # Only who asks on that host lets the device follow.
        assert there(sys.executable, "-c", FOLLOW, uuid, name) == "128 256"
        assert there("blockdev", "--getsize64", node) == str(256 * MIB)
        with contextlib.closing(domain.open_volume(name)) as storage:
            storage.read_into(200 * MIB, [data])
            assert data.startswith(b"guestguest")


@pytest.mark.parametrize("name", names())
def test_with_a_device_mapper(inside, name):
    outcomes, text = inside
    assert outcomes.get(name) == {"PASSED"}, text[-20000:]
