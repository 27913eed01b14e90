# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What all tests share: the real programs they compare with, and how much they try.

Invariant: no test skips.  A test marked ``real("qemu-img")`` is not collected
where that program is missing, which the header of the run says; under
``CI=true`` a missing program ends the run.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import hypothesis
import pytest
import virtual_host

PROGRAMS = (
    "qemu-img",
    "qemu-io",
    "qemu-nbd",
    "qemu-system-x86_64",
    "nbdkit",
    "nbdinfo",
    "nbdcopy",
    "fio",
    "lvm",
    "sanlock",
    "mke2fs",
    "losetup",
    "bindfs",
    "chromium",
    "strace",
)

# Of programs that live where an ordinary user's PATH does not reach.
os.environ["PATH"] += ":/usr/sbin:/sbin"

LONG = int(os.environ.get("QCOWLIB_LONG", "1"))

_common = {"deadline": None, "print_blob": True, "suppress_health_check": list(hypothesis.HealthCheck)}
hypothesis.settings.register_profile("default", max_examples=100, **_common)
hypothesis.settings.register_profile("checked", max_examples=20, derandomize=True, database=None, **_common)
hypothesis.settings.register_profile("ci", max_examples=100, derandomize=True, database=None, **_common)
hypothesis.settings.register_profile("long", max_examples=100 * LONG, **_common)
hypothesis.settings.load_profile(
    os.environ.get("QCOWLIB_PROFILE") or ("ci" if os.environ.get("CI") == "true" else "default")
)


def _missing() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program) is None]


def _missing_hosts() -> list[str]:
    """Its kernel is fetched by ``./run setup``, which a machine without package archive cannot do."""
    return [] if virtual_host.available() else ["virtual-host"]


def pytest_configure(config: pytest.Config) -> None:
    missing = _missing() + _missing_hosts()
    if missing and os.environ.get("CI") == "true":
        raise pytest.UsageError(f"programs that the tests compare with are missing: {', '.join(missing)}")


def pytest_report_header(config: pytest.Config) -> list[str]:
    lines = [f"hypothesis profile: {hypothesis.settings.get_current_profile_name()}"]
    if missing := _missing() + _missing_hosts():
        lines.append(f"NOT INSTALLED: {', '.join(missing)}; tests that compare with them are left out")
    return lines


def _programs_of(item: pytest.Item) -> set[str]:
    return {program for marker in item.iter_markers("real") for program in marker.args}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what cannot run here, and keep each file on one worker."""
    missing = {*_missing(), *_missing_hosts()}
    left_out = [item for item in items if missing & _programs_of(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not missing & _programs_of(item)]
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.as_posix()))


_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


def pytest_make_parametrize_id(val: object) -> str | None:
    """Keep identifiers made at random out of the names of tests: all workers must see the same names."""
    return _UUID.sub("UUID", val) if isinstance(val, str) and _UUID.search(val) else None


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The root of the source tree."""
    return Path(__file__).resolve().parent.parent
