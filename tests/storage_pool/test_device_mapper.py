# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Block domains on a real device mapper: in a virtual host, with domains that were made out here by extents.

One boot serves all: the tests below that this file names run inside, by the
fixtures of ``tests/virtual/guest_plugin.py``, the very functions that run out
here through extents; so do those of ``device_mapper_cases.py``, which need a
device mapper.  Each shows up here as a test of its own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from virtual_host import VirtualHost

GIB = 1 << 30
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
def inside(block_masters, tmp_path_factory, project_root):
    """Run all of it in one guest; return the outcome of each test and what was printed."""
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
    with VirtualHost([*disks, spare]) as host:
        done = host.run(argv, cwd=project_root, env=environment, timeout=900)
    found = re.findall(r"^(PASSED|FAILED|ERROR) \S*?(\w+\.py::\w+)(?:\[|\s|$)", done.stdout, re.M)
    outcomes = {}
    for outcome, name in found:
        outcomes.setdefault(name, set()).add(outcome)
    return outcomes, f"boot {host.boot_seconds:.1f} s\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("name", names())
def test_with_a_device_mapper(inside, name):
    outcomes, text = inside
    assert outcomes.get(name) == {"PASSED"}, text[-20000:]
