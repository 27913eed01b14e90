# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A power cut at any system call of an operation on a file domain; then recovery.

Invariant: L6, for what storage had and not only for what the process did: the domain is mended
to the old or the new state, and every disk reads what it read before or what it was to read.
"""

import os
import sys
from pathlib import Path

import pytest

from qcowlib.errors import Error
from qcowlib.storage.file import FileStorage
from storage_pool import check
from storage_pool import image_group as ig
from storage_pool import merge as mg
from storage_pool import merge_swap as ms
from storage_pool import snapshot as sn
from storage_pool import transfer as tr
from storage_pool import upgrade as up
from storage_pool import volume as vol
from storage_pool.embedded import FileToken
from storage_pool.file_domain import FileDomain
from storage_pool.ids import make_id
from tests.storage_pool import power_cut

KIB = 1 << 10
SIZE = 512 * KIB
CTIME = 1617235200
#: States a case; all of them with ./run crash.
AT_MOST = 8 if "QCOWLIB_LONG" not in os.environ else 1 << 30

pytestmark = [pytest.mark.crash, pytest.mark.real("strace")]

ACTS = {
    "snapshot": lambda token, domain, image, volumes: sn.create_snapshot(token, domain, image, ctime=CTIME),
    "merge-middle": lambda token, domain, image, volumes: mg.merge(token, domain, image, volumes[1]),
    "merge-leaf": lambda token, domain, image, volumes: mg.merge(token, domain, image, volumes[2]),
    "merge-renaming": lambda token, domain, image, volumes: ms.merge_by_swap(token, domain, image, volumes[0]),
    "preview": lambda token, domain, image, volumes: sn.preview(token, domain, image, volumes[0], ctime=CTIME),
    "commit": lambda token, domain, image, volumes: sn.commit_preview(token, domain, image, volumes[3]),
    "copy": lambda token, domain, image, volumes: tr.copy_image(token, domain, image, domain, ctime=CTIME),
    "template": lambda token, domain, image, volumes: tr.make_template(token, domain, image, domain, ctime=CTIME),
    "remove": lambda token, domain, image, volumes: vol.remove_volumes(token, domain, image, volumes),
    "upgrade": lambda token, domain, image, volumes: up.upgrade(
        token, domain, min(domain.metadata.version + 3, 5), ctime=CTIME
    ),
}


def make_disk(domain, token, length):
    image, volume = make_id(), make_id()
    vol.create_volume(token, domain, vol.VolumeSpec(image, volume, capacity=SIZE), CTIME)
    volumes = [volume]
    for number in range(length):
        if number:
            volumes.append(sn.create_snapshot(token, domain, image, ctime=CTIME))
        with vol.open_image(domain, volumes[-1], writable=True) as opened:
            opened.pwrite(bytes([number + 1]) * 70000, number * 50000 + 7)
            opened.zero(64 * KIB, (number + 4) * 64 * KIB)
    return image, volumes


def look(domain):
    """Return the chains of all disks, and what each leaf reads as."""
    chains, contents = set(), {}
    for image in {entry.images[0] for entry in domain.entries().values()}:
        group = ig.ImageGroup.load(domain, image)
        for leaf in group.leaves():
            chains.add(tuple(group.chain(leaf)))
            with vol.open_image(domain, leaf) as opened:
                contents[leaf] = opened.pread(SIZE, 0)
    return chains, contents


def run(act, mount, image, volumes):
    """What the traced process does."""
    with FileToken(f"{mount}.lock") as token, FileDomain.open(mount) as domain:
        ACTS[act](token, domain, image, volumes)


def recorded(domain, token, act):
    """Run *act* in a process of its own; returns its log, and what the domain showed before and after."""
    image, volumes = make_disk(domain, token, 3)
    if act == "commit":
        volumes.append(sn.preview(token, domain, image, volumes[0], ctime=CTIME))
    before = look(domain)
    mount = os.path.dirname(domain.name)
    code = f"from tests.storage_pool.test_power_cut import run; run({act!r}, {mount!r}, {image!r}, {volumes!r})"
    log = power_cut.record([sys.executable, "-c", code], Path(mount))
    domain.refresh()
    return log, before, look(domain)


def wrong(place, token, before, after):
    """Mend the domain and return what is wrong with it then."""
    with FileDomain.open(str(place)) as cut:
        if not check.mend(token, cut).clean:
            return "not clean"
        chains, contents = look(cut)
    if chains not in (before[0], after[0]):
        return f"chains {chains}"
    lost = [leaf for leaf, data in contents.items() if data not in (before[1].get(leaf), after[1].get(leaf))]
    return f"lost: {lost}" if lost else None


@pytest.fixture
def no_waiting(monkeypatch):
    """After the recording nothing is cut: waiting for storage would prove nothing."""

    def begin():
        monkeypatch.setattr(os, "fsync", lambda fd: None)
        monkeypatch.setattr(FileStorage, "flush", lambda self: None)

    return begin


@pytest.mark.parametrize("version", [0, 5])
@pytest.mark.parametrize("act", ACTS)
def test_op21_a_power_cut_at_any_call_of_an_operation(file_domain, token, tmp_path, no_waiting, act, version):
    domain = file_domain(min(version, 3) if act == "upgrade" else version)
    log, before, after = recorded(domain, token, act)
    no_waiting()
    for what in power_cut.states(log, tmp_path / "cut", most=AT_MOST):
        assert wrong(tmp_path / "cut", token, before, after) is None, what


@pytest.mark.parametrize("act", ["merge-middle", "snapshot"])
def test_without_barriers_a_power_cut_is_found_out(file_domain, token, tmp_path, no_waiting, act):
    log, before, after = recorded(file_domain(5), token, act)
    no_waiting()
    weak = log._replace(steps=[step for step in log.steps if not isinstance(step, power_cut.Synced)])

    def bad(_):
        try:
            return wrong(tmp_path / "cut", token, before, after)
        except Error as error:
            return str(error)

    assert any(map(bad, power_cut.states(weak, tmp_path / "cut", most=4 * AT_MOST)))
