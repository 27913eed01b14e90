# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Processes killed at every step of what they do to a domain; then recovery, which is killed too.

Invariant: L6.  After recovery the domain is clean and in the old or in the
new state, and every disk reads what it read before or what it was to read.
"""

import contextlib
import functools
import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from qcowlib.storage.file import FileStorage
from storage_pool import check
from storage_pool import image_group as ig
from storage_pool import merge as mg
from storage_pool import merge_swap as ms
from storage_pool import snapshot as sn
from storage_pool import transfer as tr
from storage_pool import upgrade as up
from storage_pool import volume as vol
from storage_pool.block_domain import BlockDomain
from storage_pool.file_domain import FileDomain
from storage_pool.ids import make_id
from storage_pool.testing.killing import killed_child
from storage_pool.testing.lvm import attached, local_lvm

KIB = 1 << 10
MIB = 1 << 20
SIZE = MIB
CTIME = 1617235200
#: Of the longest cases each third kill; every one with ./run crash.
STRIDE = 3 if "QCOWLIB_LONG" not in os.environ else 1

pytestmark = [pytest.mark.crash, pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")]


def make_disk(domain, token, length, **options):
    """Make a disk of *length* volumes; returns its image and volumes, base first."""
    image, volume = make_id(), make_id()
    vol.create_volume(token, domain, vol.VolumeSpec(image, volume, **{"capacity": SIZE, **options}), CTIME)
    volumes = [volume]
    for number in range(length):
        if number:
            volumes.append(sn.create_snapshot(token, domain, image, ctime=CTIME))
        with vol.open_image(domain, volumes[-1], writable=True) as opened:
            opened.pwrite(bytes([number + 1]) * 70000, number * 50000 + 7)
            opened.zero(64 * KIB, (number + 4) * 64 * KIB)
            opened.pwrite(b"end %d" % number, SIZE - 512 * (number + 1))
    return image, volumes


def content(domain, volume):
    with vol.open_image(domain, volume) as opened:
        return opened.pread(SIZE, 0)


def disks(domain):
    """Return what each leaf of each image reads as, and each template."""
    domain.refresh()
    found = {}
    for image in {entry.images[0] for entry in domain.entries().values()}:
        group = ig.ImageGroup.load(domain, image)
        for leaf in group.leaves():
            found[leaf] = content(domain, leaf)
    return found


def chains(domain):
    """Return the chain of each leaf."""
    return sorted(
        tuple(group.chain(leaf))
        for image in {entry.images[0] for entry in domain.entries().values()}
        for group in [ig.ImageGroup.load(domain, image)]
        for leaf in group.leaves()
    )


def recover(domain, token, step):
    """Recover; first in processes that are killed at a few steps."""
    for at in (step % 3, step % 7 + 2):
        killed_child(at, lambda: check.mend(token, domain))
        domain.refresh()
    report = check.mend(token, domain)
    assert report.clean, (step, report)


@pytest.fixture(autouse=True)
def nothing_is_made_durable(monkeypatch):
    """The system keeps what a killed process wrote, so waiting for disks would prove nothing here."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(FileStorage, "flush", lambda self: None)


@pytest.fixture
def again(tmp_path, token):
    """Give copies of a prepared file domain, one for each kill."""
    numbers = itertools.count()

    def copies(domain):
        while True:
            place = tmp_path / f"copy{next(numbers)}"
            place.mkdir()
            os.system(f"cp -a --sparse=always '{domain.name}' '{place}'")
            with FileDomain.open(str(place)) as made:
                yield made
            os.system(f"rm -r '{place}'")

    return copies


def every_step(copies, act, judge, token):
    """Kill *act* before each of its steps, recover, and let *judge* look; returns the number of steps."""
    for step, domain in enumerate(copies):
        killed = killed_child(step, lambda domain=domain: act(domain))
        domain.refresh()
        if not killed:
            assert check.check_domain(domain).clean
            judge(domain, step, True)
            return step
        recover(domain, token, step)
        judge(domain, step, False)
    raise AssertionError


@pytest.mark.parametrize("version", [0, 5])
def test_op21_a_snapshot_killed_at_every_step(file_domain, again, token, version):
    domain = file_domain(version)
    image, volumes = make_disk(domain, token, 2)
    before, leaf = disks(domain)[volumes[1]], make_id()

    def judge(domain, step, ended):
        expected = [(volumes[1], volumes[0])], [(leaf, volumes[1], volumes[0])]
        assert chains(domain) == expected[1] or (chains(domain) == expected[0] and not ended), step
        assert set(disks(domain).values()) == {before}, step

    steps = every_step(
        again(domain), lambda d: sn.create_snapshot(token, d, image, volume=leaf, ctime=CTIME), judge, token
    )
    assert steps > 15


@pytest.mark.parametrize("position", [1, 2])
@pytest.mark.parametrize("version", [0, 5])
def test_op21_a_merge_killed_at_every_step(file_domain, again, token, version, position):
    domain = file_domain(version)
    image, volumes = make_disk(domain, token, 3)
    before = disks(domain)[volumes[2]]
    old, new = tuple(volumes[::-1]), tuple(name for name in volumes[::-1] if name != volumes[position])

    def judge(domain, step, ended):
        assert chains(domain) == [new] or (chains(domain) == [old] and not ended), step
        assert set(disks(domain).values()) == {before}, step

    assert every_step(again(domain), lambda d: mg.merge(token, d, image, volumes[position]), judge, token) > 40


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("fmt", ["RAW", "COW"])
@pytest.mark.parametrize("version", [0, 5])
def test_op21_a_merge_by_renames_killed_at_every_step(file_domain, again, token, version, position, fmt):
    domain = file_domain(version)
    image, volumes = make_disk(domain, token, 3, format=fmt)
    before = disks(domain)[volumes[2]]
    old, new = tuple(volumes[::-1]), tuple(name for name in volumes[::-1] if name != volumes[position])

    def judge(domain, step, ended):
        assert chains(domain) == [new] or (chains(domain) == [old] and not ended), step
        assert set(disks(domain).values()) == {before}, step
        if ended:
            merged = domain.record(volumes[position + 1])
            assert (merged.format, merged.generation) == (fmt if position == 0 else "COW", 1)

    assert every_step(again(domain), lambda d: ms.merge_by_swap(token, d, image, volumes[position]), judge, token) > 40


@pytest.mark.parametrize("collapsed", [False, True], ids=["chain", "template"])
def test_op10_op21_a_copy_killed_at_every_step_is_there_or_not(file_domain, again, token, collapsed):
    """A target that is not complete is ILLEGAL and noted, and mending removes it."""
    domain = file_domain()
    image, volumes = make_disk(domain, token, 2)
    before = disks(domain)
    made = make_id()

    def act(domain):
        if collapsed:
            tr.collapse(token, domain, image, domain, ctime=CTIME, target_image=made, role="SHARED")
        else:
            tr.copy_image(token, domain, image, domain, ctime=CTIME, target_image=made)

    def judge(domain, step, ended):
        after = disks(domain)
        assert after.pop(volumes[1]) == before[volumes[1]]
        assert len(after) == 1 if ended else len(after) < 2, step
        assert set(after.values()) <= set(before.values()), step
        for leaf in after:
            assert len(ig.ImageGroup.load(domain, made).chain()) == (1 if collapsed else 2)
            assert domain.record(leaf).voltype == ("SHARED" if collapsed else "LEAF")

    assert every_step(again(domain), act, judge, token) > 40


@pytest.mark.parametrize("what", ["leaf", "all", "commit"])
def test_op21_a_removal_killed_at_every_step(file_domain, again, token, what):
    """One volume, a whole disk, or what a commit of a preview drops."""
    domain = file_domain()
    image, volumes = make_disk(domain, token, 3)
    _, others = make_disk(domain, token, 1)
    look = sn.preview(token, domain, image, volumes[0], ctime=CTIME) if what == "commit" else None
    before = disks(domain)
    old = chains(domain)
    new = {
        "leaf": [tuple(volumes[1::-1]), (others[0],)],
        "all": [(others[0],)],
        "commit": [(look, volumes[0]), (others[0],)],
    }[what]

    def act(domain):
        if what == "commit":
            sn.commit_preview(token, domain, image, look)
        else:
            vol.remove_volumes(token, domain, image, volumes[2:] if what == "leaf" else volumes)

    def judge(domain, step, ended):
        assert chains(domain) == sorted(new) or (chains(domain) == old and not ended), step
        for volume, data in disks(domain).items():
            assert data == before.get(volume, data)
        assert content(domain, others[0]) == before[others[0]]

    assert every_step(again(domain), act, judge, token) > 8


@pytest.mark.parametrize(("start", "end"), [(0, 3), (3, 4), (4, 5)])
def test_op21_an_upgrade_killed_at_every_step(file_domain, again, token, start, end):
    """Run again it ends; until then the domain is one of the old or of the new version."""
    domain = file_domain(start)
    _, volumes = make_disk(domain, token, 2)
    template = make_disk(domain, token, 1)[1][0]
    vol.update_volume(token, domain, template, role="SHARED")
    thin = vol.VolumeSpec(make_id(), make_id(), SIZE, parent=template)
    vol.create_volume(token, domain, thin, CTIME)
    before = disks(domain)

    def judge(domain, step, ended):
        assert domain.metadata.version == end if ended else domain.metadata.version in (start, end)
        assert disks(domain) == before
        up.upgrade(token, domain, end, ctime=CTIME)
        assert domain.metadata.version == end and disks(domain) == before
        assert check.check_domain(domain).clean
        for volume in (volumes[1], thin.volume):
            record = domain.record(volume)
            assert domain.read_record(volume) == record.to_bytes(end), step

    assert every_step(again(domain), lambda d: up.upgrade(token, d, end, ctime=CTIME), judge, token) > 5


# Volume groups: what differs is what LVM's commands do, each of which is one commit.


def merge_down(domain, token, image, volumes):
    mg.merge(token, domain, image, volumes[1])


def merge_renaming(domain, token, image, volumes):
    ms.merge_by_swap(token, domain, image, volumes[0])


def copy(domain, token, image, volumes):
    tr.copy_image(token, domain, image, domain, ctime=CTIME)


def template(domain, token, image, volumes):
    tr.make_template(token, domain, image, domain, ctime=CTIME)


def remove(domain, token, image, volumes):
    vol.remove_volumes(token, domain, image, volumes)


def snapshot(domain, token, image, volumes):
    sn.create_snapshot(token, domain, image, ctime=CTIME)


@pytest.mark.real("lvm", "losetup", "mke2fs")
@pytest.mark.parametrize(
    ("act", "least", "change", "version"),
    [
        (act, least, change, version)
        for act, least, change, versions in [
            (snapshot, 2, 1, (2, 5)),
            (merge_down, 4, -1, (2, 5)),
            # In V1 the slot of a volume is its place, which the merged one does not inherit.
            (merge_renaming, 8, -1, (0, 2, 5)),
            (copy, 5, 2, (2, 5)),
            (template, 3, 1, (2, 5)),
            (remove, 3, -2, (2, 5)),
        ]
        for version in versions
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_op21_killed_before_every_command_of_lvm(block_domain, token, act, least, change, version):
    domain = block_domain(version)
    for step in itertools.count():
        image, volumes = make_disk(domain, token, 3 if act in (merge_down, merge_renaming) else 2)
        before, old = content(domain, volumes[-1]), set(domain.entries())
        slot = domain.slot_of(volumes[1])
        doing = functools.partial(act, domain, token, image, volumes)
        killed = killed_child(step, doing, programs=True)
        domain.refresh()
        # Of a merge by renames the child, which may have no name now; its record must not be given away.
        assert act is not merge_renaming or not version or slot in domain.occupied_slots(), step
        if killed:
            killed_child(step % 3, lambda: check.mend(token, domain), programs=True)
            domain.refresh()
            report = check.mend(token, domain)
            assert report.clean, (step, report)
        new = set(domain.entries())
        # Whatever there is reads as the disk, and there is the old or the new.
        assert set(disks(domain).values()) <= {before}, step
        assert len(new) == change + len(old) or (killed and new == old), step
        for kept in {domain.record(volume).image for volume in new}:
            group = ig.ImageGroup.load(domain, kept)
            vol.remove_volumes(token, domain, kept, group.own(), force=True)
        if not killed:
            break
    assert step >= least


# What has to be overwritten before it goes.


def freed(domain):
    """Return what is not zero in the extents of no volume: whoever gets them next may read it."""
    state = domain.state
    (pv,) = state.pvs.values()
    extent = state.vg.extent_size
    places = [place for name in state.lvs for place in state.placements(name)]
    taken = {place.offset + at for place in places for at in range(0, place.size, extent)}
    found = b""
    with open(Path(f"/sys/block/{pv.guid}/loop/backing_file").read_text().strip(), "rb") as below:
        for start in set(range(pv.pe_start, pv.pe_start + pv.pe_count * extent, extent)) - taken:
            at, end = start, start + extent
            while (at := next_data(below, at, end)) < end:
                hole = min(os.lseek(below.fileno(), at, os.SEEK_HOLE), end)
                found += os.pread(below.fileno(), hole - at, at).strip(bytes(1))
                at = hole
    return found


def next_data(file, at, end):
    try:
        return os.lseek(file.fileno(), at, os.SEEK_DATA)
    except OSError:
        return end


def wiping_merge(domain, token, image, volumes):
    mg.merge(token, domain, image, volumes[1], zero=True)


def wiping_merge_renaming(domain, token, image, volumes):
    ms.merge_by_swap(token, domain, image, volumes[0], zero=True)


def wiping_commit(domain, token, image, volumes):
    (look,) = set(ig.ImageGroup.load(domain, image).leaves()) - {volumes[-1]}
    sn.commit_preview(token, domain, image, look, zero=True)


def wiping_undo(domain, token, image, volumes):
    (look,) = set(ig.ImageGroup.load(domain, image).leaves()) - {volumes[-1]}
    sn.undo_preview(token, domain, image, look, zero=True)


@pytest.mark.real("lvm", "losetup", "mke2fs")
@pytest.mark.parametrize(
    ("act", "least", "version"),
    [(wiping_merge, 6, 5), (wiping_merge_renaming, 11, 0), (wiping_commit, 6, 2), (wiping_undo, 3, 5)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_op21_nobody_reads_what_was_wiped_whenever_the_wiping_was_killed(block_domain, token, act, least, version):
    """Before each command of LVM and each part of the wiping, and in recovery too."""
    domain = block_domain(version)
    for step in itertools.count(0, STRIDE):
        image, volumes = make_disk(domain, token, 3)
        if act in (wiping_commit, wiping_undo):
            look = sn.preview(token, domain, image, volumes[0], ctime=CTIME)
            with vol.open_image(domain, look, writable=True) as opened:
                opened.pwrite(b"looked" * 1000, 300000)
        before = set(disks(domain).values())
        killed = killed_child(step, functools.partial(act, domain, token, image, volumes), programs=True)
        domain.refresh()
        assert freed(domain) == b"", step
        if killed:
            killed_child(step % 4, lambda: check.mend(token, domain), programs=True)
            domain.refresh()
            assert freed(domain) == b"", step
            report = check.mend(token, domain)
            assert report.clean and freed(domain) == b"", (step, report)
        assert set(disks(domain).values()) <= before, step
        group = ig.ImageGroup.load(domain, image)
        vol.remove_volumes(token, domain, image, group.own(), zero=True, force=True)
        assert freed(domain) == b"", step
        if not killed:
            break
    assert step >= least


@pytest.mark.real("lvm", "losetup", "mke2fs")
def test_another_removal_of_the_same_disk_does_not_free_what_is_still_to_be_wiped(block_domain, token):
    domain = block_domain()
    image, volumes = make_disk(domain, token, 4)
    # Cut after the mark, before the wiping.
    domain.mark_removed(token, image, [volumes[3]], zero=True)
    domain.refresh()
    mg.merge(token, domain, image, volumes[1], zero=True)
    assert volumes[3] not in domain.entries() and freed(domain) == b""


@pytest.mark.real("lvm", "losetup", "mke2fs")
@pytest.mark.parametrize("version", [2, 5])
def test_what_a_base_gives_back_after_a_merge_is_wiped(block_domain, token, version):
    domain = block_domain(version)
    image, volumes = make_disk(domain, token, 3, capacity=300 * MIB)
    with contextlib.closing(domain.open_volume(volumes[0], writable=True)) as storage:
        assert storage.size == 384 * MIB
        storage.write(200 * MIB, [b"old data" * 512])
    mg.merge(token, domain, image, volumes[1], zero=True)
    assert domain.size_of(volumes[0]) == 128 * MIB and freed(domain) == b""
    assert domain.state.lv(volumes[0]).writable is (version == 5)
    mg.merge(token, domain, image, volumes[2])
    assert freed(domain) != b""


# The upgrade of a volume group: every write and every command of LVM.


@pytest.fixture
def copied_group(tmp_path, block_domain):
    """Give fresh copies of a prepared block domain, each on a device of its own."""
    numbers = itertools.count()

    @contextlib.contextmanager
    def copy(domain):
        (pv,) = domain.state.pvs.values()
        folder = tmp_path / f"copy{next(numbers)}"
        folder.mkdir()
        below = Path(f"/sys/block/{pv.guid}/loop/backing_file").read_text().strip()
        subprocess.run(["cp", "--sparse=always", below, folder / "lun"], check=True)
        with attached([folder / "lun"]) as devices:
            yield BlockDomain.open(local_lvm(folder / "host", devices), domain.uuid)
        shutil.rmtree(folder)

    return copy


@pytest.mark.real("lvm", "losetup", "mke2fs")
@pytest.mark.parametrize(("start", "end", "least"), [(0, 2, 5), (2, 3, 11), (3, 4, 7), (4, 5, 7)])
def test_op21_an_upgrade_of_a_volume_group_killed_at_every_write_and_command(
    block_domain, copied_group, token, start, end, least
):
    """The domain reads at each point, as the old version or the new one; run again, the upgrade ends."""
    domain = block_domain(start)
    _, volumes = make_disk(domain, token, 2)
    before, keys = disks(domain), domain.metadata.raw
    for step in itertools.count(0, STRIDE):
        with copied_group(domain) as copy:
            act = functools.partial(up.upgrade, token, copy, end, ctime=CTIME)
            killed = killed_child(step, act)
            copy.refresh()
            assert copy.metadata.version == end if not killed else copy.metadata.version in (start, end), step
            assert disks(copy) == before, step
            if killed:
                killed_child(step % 5, act)
                copy.refresh()
                assert disks(copy) == before, step
                assert act() == []
            assert copy.metadata.version == end and disks(copy) == before, step
            assert check.check_domain(copy).clean, step
            assert copy.metadata.raw.keys() >= keys.keys() - {"LOGBLKSIZE", "PHYBLKSIZE"}
            for volume in volumes:
                record = copy.record(volume)
                assert copy.read_record(volume) == record.to_slot(end), step
                assert record.generation == domain.record(volume).generation
        if not killed:
            break
    assert step >= least
