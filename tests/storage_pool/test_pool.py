# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Pools: membership, master, owner."""

from pathlib import Path

import pytest

from storage_pool.errors import (
    AlreadyExists,
    Illegal,
    InvalidName,
    MetadataError,
    NotAuthorized,
    NotFound,
    UnsupportedVersion,
)
from storage_pool.file_domain import FileDomain
from storage_pool.ids import make_id
from storage_pool.pool import StoragePool, find_master
from storage_pool.testing.golden import rebuild_file_domain
from storage_pool.testing.killing import Killed, KillingDomain

CTIME = 1617235200
FIRST_KEYS = {"POOL_SPM_ID": "-1", "POOL_SPM_LVER": "-1", "MASTER_VERSION": "1", "POOL_DESCRIPTION": "Default"}


def test_the_master_gets_the_keys_that_others_write(make_domain, token):
    master, uuid = make_domain(3), make_id()
    pool = StoragePool.create(token, uuid, "Default", master)
    raw = master.metadata.raw
    assert {key: raw[key] for key in FIRST_KEYS} == FIRST_KEYS
    assert raw["POOL_DOMAINS"] == f"{master.uuid}:Active"
    assert (raw["ROLE"], raw["POOL_UUID"]) == ("Master", uuid)
    assert pool.info()["domains"] == {master.uuid: "Active"}
    assert StoragePool.open(uuid, master, master_version=1).name == "Default"
    with pytest.raises(Illegal):
        StoragePool.open(uuid, master, master_version=2)
    with pytest.raises(Illegal):
        StoragePool.open(make_id(), master)
    pool.destroy(token)
    assert not [key for key in master.metadata.raw if key in FIRST_KEYS] and master.metadata.role == "Regular"


def test_a_golden_pool_is_read(golden, tmp_path):
    with FileDomain.open(str(rebuild_file_domain(golden / "file/v1_nfs", tmp_path))) as master:
        pool = StoragePool.open("c1e884e6-2d94-4931-9a82-fa9008ee76c1", master, master_version=7)
        assert sorted(pool.members.values()) == ["Active", "Active", "Attached"]
        assert (pool.info()["spm_id"], pool.info()["lver"]) == (-1, 12)
    assert (Path(master.name) / "master/tasks").is_dir()


def test_attach_activate_deactivate_detach(file_domain, token):
    master, other = file_domain(4), file_domain(3)
    pool = StoragePool.create(token, make_id(), "p", master)
    pool.attach(token, other)
    assert pool.members[other.uuid] == "Attached" and other.metadata.pools == (pool.uuid,)
    with pytest.raises(AlreadyExists):
        pool.attach(token, other)
    pool.activate(token, other)
    with pytest.raises(Illegal, match="active"):
        pool.detach(token, other)
    pool.deactivate(token, other.uuid)
    pool.detach(token, other)
    assert other.uuid not in pool.members and other.metadata.pools == ()
    for call in (lambda: pool.activate(token, other), lambda: pool.detach(token, other)):
        with pytest.raises(NotFound):
            call()
    for call in (lambda: pool.deactivate(token, master.uuid), lambda: pool.detach(token, master)):
        with pytest.raises(Illegal):
            call()


def test_a_data_domain_has_one_pool_and_no_newer_version(file_domain, token):
    first = StoragePool.create(token, make_id(), "a", file_domain(3))
    second = StoragePool.create(token, make_id(), "b", file_domain(3))
    member = file_domain(3)
    first.attach(token, member)
    with pytest.raises(Illegal, match="belongs to pool"):
        second.attach(token, member)
    with pytest.raises(Illegal):
        StoragePool.create(token, make_id(), "c", member)
    with pytest.raises(UnsupportedVersion):
        first.attach(token, file_domain(4))
    with pytest.raises(UnsupportedVersion):
        StoragePool.create(token, make_id(), "d", file_domain(3), [file_domain(4)])


def test_an_iso_domain_has_several_pools(tmp_path, file_domain, token):
    mount = tmp_path / "iso"
    mount.mkdir()
    iso = FileDomain.create(
        token, str(mount), make_id(), version=0, storage_type="NFS", domain_class="Iso", remote_path="s:/i", ctime=CTIME
    )
    pools = [StoragePool.create(token, make_id(), "p", file_domain(3)) for _ in range(2)]
    for pool in pools:
        pool.attach(token, iso)
    assert iso.metadata.pools == tuple(pool.uuid for pool in pools)
    pools[0].detach(token, iso)
    assert iso.metadata.pools == (pools[1].uuid,)
    with pytest.raises(Illegal):
        StoragePool.create(token, make_id(), "p", iso)


def test_a_pool_takes_100_domains(file_domain, token):
    master = file_domain()
    pool = StoragePool.create(token, make_id(), "p", master)
    others = ",".join(f"{make_id()}:Active" for _ in range(99))
    master.change(token, {"POOL_DOMAINS": f"{master.uuid}:Active,{others}"})
    late = file_domain()
    with pytest.raises(InvalidName, match="at most 100"):
        pool.attach(token, late)
    assert late.metadata.pools == ()


@pytest.mark.real("lvm", "losetup", "mke2fs")
def test_a_v1_master_without_room_refuses_before_the_domain_is_changed(block_domain, file_domain, token):
    master = block_domain(0)
    pool = StoragePool.create(token, make_id(), "p", master)
    room = ",".join(f"{make_id()}:Active" for _ in range(25))
    master.change(token, {"POOL_DOMAINS": f"{master.uuid}:Active,{room}"})
    refused = None
    for _ in range(9):
        late = file_domain(0)
        try:
            pool.attach(token, late)
        except MetadataError as error:
            refused = error
            break
    assert "limit is 2048" in str(refused) and late.metadata.pools == ()


def test_s2_an_older_term_is_refused(file_domain, token):
    pool = StoragePool.create(token, make_id(), "p", file_domain())
    pool.set_owner(token, 3, 7)
    assert (pool.info()["spm_id"], pool.info()["lver"]) == (3, 7)
    for host, term in ((3, 6), (4, 7), (-1, 6)):
        with pytest.raises(NotAuthorized):
            pool.set_owner(token, host, term)
    pool.set_owner(token, -1, 7)
    pool.set_owner(token, 4, 8)


def test_the_master_role_moves_with_a_higher_version(file_domain, token):
    first, second = file_domain(), file_domain()
    pool = StoragePool.create(token, make_id(), "p", first, [second])
    pool.migrate_master(token, second)
    assert StoragePool.open(pool.uuid, second, master_version=2).members == {
        first.uuid: "Active",
        second.uuid: "Active",
    }
    assert first.metadata.role == "Regular" and first.metadata.master_version == 0
    assert (Path(second.name) / "master/tasks").is_dir()
    pool.deactivate(token, first.uuid)
    with pytest.raises(Illegal):
        pool.migrate_master(token, first)


@pytest.mark.parametrize("at", [0, 1])
def test_an_attachment_that_was_cut_is_run_again(file_domain, token, at):
    master, other = file_domain(), file_domain()
    pool = StoragePool.create(token, make_id(), "p", master)
    cut = StoragePool(pool.uuid, KillingDomain(master, 0))
    with pytest.raises(Killed):
        cut.attach(token, KillingDomain(other, 0) if at == 0 else other)
    assert other.uuid not in pool.members
    pool.attach(token, other)
    pool.detach(token, other)
    assert other.metadata.pools == ()


def test_a_pool_whose_master_is_lost_is_reconstructed_and_the_old_one_becomes_ordinary(file_domain, token):
    first, second = file_domain(), file_domain()
    pool = StoragePool.create(token, make_id(), "p", first, [second])
    members = pool.members
    again = StoragePool.reconstruct(token, pool.uuid, "p", second, members, master_version=5)
    assert again.info()["master_ver"] == 5 and again.members == members and again.info()["spm_id"] == -1
    assert find_master(pool.uuid, [first, second]) is second
    assert (Path(second.name) / "master/tasks").is_dir()
    with pytest.raises(Illegal, match="is master with version 5"):
        pool.repair_role(token, second)
    again.activate(token, first)
    assert (first.metadata.role, first.metadata.master_version) == ("Regular", 0)
    assert not again.repair_role(token, first)
    with pytest.raises(Illegal):
        StoragePool.open(pool.uuid, first)


def test_what_cannot_be_the_new_master_is_refused(file_domain, token):
    first, second, stranger = file_domain(), file_domain(), file_domain()
    pool = StoragePool.create(token, make_id(), "p", first, [second])
    other = StoragePool.create(token, make_id(), "q", stranger)
    with pytest.raises(NotFound):
        StoragePool.reconstruct(token, pool.uuid, "p", stranger, pool.members, master_version=2)
    with pytest.raises(Illegal, match="belongs to pool"):
        StoragePool.reconstruct(token, pool.uuid, "p", stranger, {stranger.uuid: "Active"}, master_version=2)
    with pytest.raises(Illegal, match="not above"):
        StoragePool.reconstruct(token, pool.uuid, "p", first, pool.members, master_version=1)
    assert find_master(other.uuid, [first, second]) is None
    assert second.metadata.role == "Regular"


def test_an_export_domain_belongs_to_one_data_centre_at_a_time(tmp_path, file_domain, token):
    mount = tmp_path / "export"
    mount.mkdir()
    with FileDomain.create(
        token,
        str(mount),
        make_id(),
        version=0,
        storage_type="NFS",
        domain_class="Backup",
        remote_path="s:/e",
        ctime=CTIME,
    ) as export:
        first, second = (StoragePool.create(token, make_id(), "p", file_domain()) for _ in range(2))
        first.attach(token, export)
        with pytest.raises(Illegal, match="belongs to pool"):
            second.attach(token, export)
        first.detach(token, export)
        second.attach(token, export)
        assert export.metadata.pools == (second.uuid,)
