# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The engine: one object for domains, disks, templates, snapshots and pools."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

import storage_pool
from qcowlib.errors import Busy, StorageError
from storage_pool.errors import AlreadyExists, Illegal, InvalidName, NoSpace, NotAuthorized, NotFound
from storage_pool.ids import make_id
from storage_pool.lvm import Lvm, LvmHost
from storage_pool.monitor import RecoveryPolicy
from storage_pool.space import SpacePolicy
from storage_pool.testing.killing import Killed, KillingDomain
from storage_pool.testing.lvm import local_lvm, loop_devices
from storage_pool.testing.process import ScriptedRunner, completed

GIB = 1 << 30
MIB = 1 << 20


@pytest.fixture
def engine(tmp_path):
    with storage_pool.connect(tmp_path, clock=lambda: 1617235200) as made:
        yield made


def put(disk, data, offset=0):
    with disk.open("r+") as image:
        image.pwrite(data, offset)


def get(disk, offset=0, **options):
    with disk.open(**options) as image:
        return image.pread(5, offset)


def life(data):
    disk = data.create_disk(64 * MIB, description="root")
    put(disk, b"first")
    taken = disk.snapshot()
    put(disk, b"later")
    look = disk.preview(taken)
    assert get(disk, volume_id=look) == b"first"
    disk.undo(look)
    assert get(disk) == b"later" and disk.snapshots == [taken]
    look = disk.preview(taken)
    disk.commit(look)
    assert get(disk) == b"first" and disk.leaf == look
    template = disk.make_template(description="gold")
    thin = data.create_disk(template=template)
    put(thin, b"thin!")
    assert (
        template.is_template and template.description == "gold" and (get(template), get(thin)) == (b"first", b"thin!")
    )
    with pytest.raises(Illegal):
        template.open("r+")
    clone = thin.clone()
    assert len(clone.chain) == 1 and get(clone) == b"thin!" and thin.chain[1] == template.leaf
    disk.delete_snapshot(taken)
    assert disk.snapshots == [] and get(disk) == b"first"
    disk.extend(128 * MIB)
    assert disk.size == 128 * MIB and {one.image for one in data.disks()} == {
        disk.image,
        template.image,
        thin.image,
        clone.image,
    }
    with pytest.raises(Illegal):
        template.remove()
    for one in (thin, template, clone):
        one.remove()
    assert data.check().clean
    return disk


def test_the_life_of_disks_in_a_directory(engine):
    life(engine.create_domain("data"))


@pytest.mark.real("lvm", "losetup", "mke2fs")
def test_the_life_of_disks_on_a_volume_group_and_a_move_to_files(tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    with (
        loop_devices(tmp_path, 24 * GIB, 12 * GIB) as devices,
        storage_pool.connect(place, lvm=local_lvm(tmp_path / "host", devices)) as engine,
    ):
        group = engine.create_domain("group", devices=devices[:1])
        disk = life(group)
        files = engine.create_domain("files")
        pool = engine.create_pool("p", group, files)
        assert disk.move(files).home is files and get(disk) == b"first" and not group.disks()
        free = group.domain.capacity()[1]
        group.extend(devices[1:])
        assert group.domain.capacity()[1] > free + 11 * GIB
        group.reduce(devices[1])
        assert pool.space().total == sum(domain.space().total for domain in (group, files))
        assert [domain.uuid for domain in engine.domains()] == sorted([group.uuid, files.uuid])
        with pytest.raises(Illegal, match="no devices"):
            files.extend(devices[1:])
        status, events = pool.watch()
        assert all(one.valid for one in status.values()) and events == []


def test_a_second_engine_reads_what_the_first_made_and_waits_for_no_lock(engine, tmp_path):
    disk = engine.create_domain("data").create_disk(MIB)
    with storage_pool.connect(tmp_path) as other:
        data = other.domain("data")
        assert data.disk(disk.image).leaf == disk.leaf and data.check().clean
        with pytest.raises(Busy):
            data.create_disk(MIB)
        with pytest.raises(NotFound):
            data.disk(make_id())
    for name in ("nothing", make_id()):
        with pytest.raises(NotFound):
            engine.domain(name)


def test_pools_are_made_found_and_change_members(engine, tmp_path):
    first, second, late = (engine.create_domain(name, storage_type="NFS") for name in ("a", "b", "c"))
    old = engine.create_domain("old", version=3)
    pool = engine.create_pool("Default", first, second)
    pool.attach(late)
    pool.activate(late)
    pool.attach(old)
    pool.activate(old)
    assert old.version == 5
    pool.migrate_master(second)
    with storage_pool.connect(tmp_path) as other:
        assert other.pool().members == pool.members and other.pool().info()["master_uuid"] == second.uuid
        assert [one.uuid for one in other.pool().active()] == list(pool.members)
    with pytest.raises(NotFound):
        engine.pool(make_id())
    with pytest.raises(Illegal):
        engine.destroy_domain(late)
    for domain in (first, late, old):
        pool.deactivate(domain)
        pool.detach(domain)
    pool.destroy()
    assert engine.pools() == []
    engine.destroy_domain(late)
    assert late.uuid not in [one.uuid for one in engine.domains()]


def test_a_lost_domain_comes_back_by_itself_and_a_former_master_is_put_in_its_place(engine, tmp_path):
    first, second = engine.create_domain("a"), engine.create_domain("b")
    pool = engine.create_pool("Default", first, second)
    policy, uuid = RecoveryPolicy(60, 60), first.uuid
    assert [one.valid for one in pool.watch(0, policy)[0].values()] == [True, True]
    (tmp_path / "a").rename(tmp_path.parent / "away")
    status, events = pool.watch(10, policy)
    assert not status[uuid].valid and events == []
    assert [(event.kind, event.uuid) for event in pool.watch(70, policy)[1]] == [("lost", uuid)]
    again = engine.reconstruct(pool.uuid, "Default", second, master_version=9)
    assert again.pool.master is second.domain and uuid not in again.members
    (tmp_path.parent / "away").rename(tmp_path / "a")
    with pytest.raises(AlreadyExists):
        engine.reconstruct(pool.uuid, "Default", second, master_version=9)
    again.pool.master.change(engine._context.token, {"POOL_DOMAINS": f"{second.uuid}:Active,{uuid}:Active"})
    again.recovery = pool.recovery
    assert [event.kind for event in again.watch(80, policy)[1]] == ["back"]
    assert first.domain.metadata.role == "Regular" and first.domain.metadata.master_version == 0
    assert engine.pool().uuid == pool.uuid and engine.pool().info()["master_ver"] == 9


def test_actions_are_refused_where_little_space_is_left(tmp_path):
    with storage_pool.connect(tmp_path, space=SpacePolicy(100, 1 << 60)) as engine:
        data = engine.create_domain("data")
        assert "block actions" in data.warnings()[0] and data.info()["warnings"] == data.warnings()
        for call in (
            lambda: data.create_disk(MIB),
            lambda: data.upload(io.BytesIO(bytes(MIB)), MIB),
        ):
            with pytest.raises(NoSpace):
                call()
        assert data.disks() == []


def test_disks_are_exported_imported_uploaded_and_downloaded(engine):
    data, export, iso = (
        engine.create_domain(name, domain_class=kind) for name, kind in (("d", "data"), ("e", "export"), ("i", "iso"))
    )
    disk = data.upload(io.BytesIO(b"hello" + bytes(MIB - 5)), MIB, description="up")
    disk.export(export)
    disk.remove()
    back = export.disk(disk.image).import_to(data)
    assert get(back) == b"hello" and back.description == "up" and get(back.copy()) == b"hello"
    sink = io.BytesIO()
    assert back.download(sink).size == MIB and sink.getvalue()[:5] == b"hello"
    iso.upload_media("x.iso", io.BytesIO(b"123"))
    assert iso.media() == {"x.iso": 3}
    pool = engine.create_pool("p", data, export, iso)
    assert list(pool.members.values()) == ["Active"] * 3
    # What is free on a file system that others use changes between two looks.
    whole, part = pool.space(), data.space()
    assert whole._replace(free=0) == part._replace(free=0)


def test_everything_that_was_cut_is_ended(engine, tmp_path):
    one, other = engine.create_domain("one"), engine.create_domain("other")
    moving, merging = (one.create_disk(MIB) for _ in range(2))
    put(moving, b"hello")
    taken = merging.snapshot()
    put(merging, b"hello")
    for at, action in ((1, lambda: moving.move(other)), (3, lambda: merging.delete_snapshot(taken))):
        real, one.domain = one.domain, KillingDomain(one.domain, at)
        with pytest.raises(Killed):
            action()
        one.domain = real
        one.refresh()
    engine.close()
    with storage_pool.connect(tmp_path) as again:
        left = again.recover()
        assert all(report.clean for report in left.values())
        disks = {disk.image: disk for domain in again.domains() for disk in domain.disks()}
        assert get(disks[moving.image]) == get(disks[merging.image]) == b"hello"


def test_recovery_takes_domain_by_domain_and_tells_what_failed(engine, tmp_path):
    """A damaged domain and a machine whose LVM fails keep no other domain from being mended."""
    domains = sorted((engine.create_domain(name) for name in ("one", "two", "three")), key=lambda made: made.uuid)
    broken, unread, good = domains
    disk = good.create_disk(MIB)
    engine._context.change(good.domain.set_note, disk.leaf, "remove")
    assert not good.check().clean
    for damaged in (broken, unread):
        file = Path(damaged.domain.name) / "dom_md/metadata"
        file.write_bytes(b"nonsense")
    engine.close()
    lvm = Lvm(ScriptedRunner(lambda argv: completed(argv, 5, stderr=b"  Volume group is not there\n")), LvmHost())
    with storage_pool.connect(tmp_path, lvm=lvm) as again:
        left = again.recover()
        assert set(left) == {"lvm", broken.uuid, unread.uuid, good.uuid}
        assert "Volume group is not there" in left["lvm"].error
        assert all(left[name].error and not left[name].clean for name in (broken.uuid, unread.uuid))
        assert list(left["lvm"].lines()) == [left["lvm"].error]
        assert left[good.uuid].clean


def test_a_domain_whose_mending_fails_is_told_and_the_next_is_mended(engine, monkeypatch):
    first, second = sorted((engine.create_domain(name) for name in ("one", "two")), key=lambda made: made.uuid)

    def sweep(self, token, leftovers):
        if self is first.domain:
            raise StorageError(5, path=self.uuid, operation="remove")

    monkeypatch.setattr(type(first.domain), "sweep", sweep)
    left = engine.recover()
    assert "Input/output error" in left[first.uuid].error and left[second.uuid].clean


def test_a_lost_right_ends_recovery(engine, monkeypatch):
    domain = engine.create_domain("one")

    def sweep(self, token, leftovers):
        raise NotAuthorized("over")

    monkeypatch.setattr(type(domain.domain), "sweep", sweep)
    with pytest.raises(NotAuthorized):
        engine.recover()


def test_a_move_that_was_cut_is_ended_by_mending_the_domain_it_left(engine):
    one, other = engine.create_domain("one"), engine.create_domain("other")
    disk = one.create_disk(MIB)
    put(disk, b"hello")
    real, one.domain = one.domain, KillingDomain(one.domain, 1)
    with pytest.raises(Killed):
        disk.move(other)
    one.domain = real
    one.refresh()
    assert list(one.check().unfinished.values()) == [f"move:{other.uuid}"]
    assert one.mend().clean and other.mend().clean
    (disk,) = one.disks() + other.disks()
    assert get(disk) == b"hello"
    # To a domain that is away a move can neither be ended nor be taken back.
    engine._context.change(disk.home.domain.set_note, disk.leaf, f"move:{make_id()}")
    assert list(disk.home.mend().unfinished) == [disk.leaf] and get(disk) == b"hello"


def test_jobs_on_volumes_keep_what_a_disk_reads(engine):
    data = engine.create_domain("data")
    disk = data.create_disk(8 * MIB)
    put(disk, b"\0" * MIB + b"hello")
    disk.add_bitmap("backup", granularity=65536)
    assert [(one.name, one.granularity, one.enabled) for one in disk.bitmaps()] == [("backup", 65536, True)]
    put(disk, b"later", 2 * MIB)
    disk.clear_bitmap("backup")
    disk.remove_bitmap("backup")
    assert disk.bitmaps() == [] and disk.sparsify() == MIB
    disk.amend("0.10")
    disk.amend("1.1")
    assert disk.reduce() > 0
    taken = disk.snapshot()
    put(disk, b"after")
    leaf = disk.leaf
    assert disk.delete_snapshot(taken, by_renames=True) == leaf and disk.chain == [leaf]
    assert get(disk) == b"after" and get(disk, MIB) == b"hello" and get(disk, 2 * MIB) == b"later"
    with pytest.raises(NotFound):
        disk.amend("1.1", make_id())
    assert data.check().clean


def test_what_another_process_changed_before_our_first_change_is_seen(tmp_path):
    with storage_pool.connect(tmp_path) as first:
        data = first.create_domain("data")
    with storage_pool.connect(tmp_path) as slow:
        (seen,) = slow.domains()
        assert seen.disks() == []
        with storage_pool.connect(tmp_path) as quick:
            made = quick.domain(data.uuid).create_disk(MIB)
        disk = seen.create_disk(MIB)
        assert {one.image for one in seen.disks()} == {made.image, disk.image}


@pytest.mark.parametrize("name", ["", "a/b", "..", ".x", "x\n"])
def test_a_name_that_is_no_directory_is_refused(engine, name):
    with pytest.raises(InvalidName):
        engine.create_domain(name)


def test_what_is_no_place_is_refused(tmp_path):
    with pytest.raises(NotFound):
        storage_pool.connect(tmp_path / "nothing")
    with storage_pool.connect(tmp_path) as engine, pytest.raises(Illegal, match="without devices"):
        engine.create_domain("x", devices=["/dev/null"])


def test_the_package_imports_nothing_by_itself():
    code = "import sys, storage_pool; sys.exit(any(m.startswith('storage_pool.') for m in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(storage_pool.__file__).parents[1])


def test_closing_leaves_no_descriptor(tmp_path):
    def held():
        return len(list(Path("/proc/self/fd").iterdir()))

    before = held()
    with storage_pool.connect(tmp_path) as engine:
        data = engine.create_domain("data")
        engine.create_pool("p", data).watch()
        put(data.create_disk(MIB), b"x")
    assert held() == before
