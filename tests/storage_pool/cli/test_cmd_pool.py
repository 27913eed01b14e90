# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``qpool pool``: the life of a pool by command."""

import shutil

from storage_pool.cli.main import main
from storage_pool.ids import make_id


def uuid_of(answer, place):
    return answer("domain", "show", place)["uuid"]


def test_life_of_a_pool(answer, place):
    first, second, third, old = place(), place(), place(), place("--version", "V3")
    uuid = make_id()
    made = answer("pool", "create", "Default", first, second, "--uuid", uuid)
    assert (made["uuid"], made["name"], made["master_ver"]) == (uuid, "Default", 1)
    for late in (third, old):
        assert answer("pool", "attach", first, late)["domains"][uuid_of(answer, late)] == "Attached"
        assert answer("pool", "activate", first, late)["domains"][uuid_of(answer, late)] == "Active"
    assert answer("domain", "show", old)["version"] == "5"
    assert "is active" in answer("pool", "detach", first, third, status=1)
    answer("pool", "deactivate", first, uuid_of(answer, third))
    assert uuid_of(answer, third) not in answer("pool", "detach", first, third)["domains"]
    moved = answer("pool", "migrate", first, second)
    assert (moved["master_uuid"], moved["master_ver"]) == (uuid_of(answer, second), 2)
    assert "master of no pool" in answer("pool", "show", first, status=1)
    assert answer("pool", "show", second) == moved
    assert "other members" in answer("pool", "destroy", second, status=1)
    for member in (first, old):
        answer("pool", "deactivate", second, member)
        answer("pool", "detach", second, member)
    answer("pool", "destroy", second)
    assert answer("domain", "show", second)["pool"] == []


def test_a_pool_without_its_master_is_reconstructed(answer, place, tmp_path):
    lost, left, other = place(), place(), place()
    made = answer("pool", "create", "Default", lost, left, other)
    shutil.move(lost, tmp_path / "away")
    again = answer("pool", "reconstruct", made["uuid"], left, other, "--name", "Default", "--master-version", "2")
    assert (again["uuid"], again["name"], again["master_ver"], len(again["domains"])) == (made["uuid"], "Default", 2, 2)
    assert "not above" in answer("pool", "reconstruct", made["uuid"], left, "--master-version", "2", status=1)
    shutil.move(tmp_path / "away", lost)
    answer("pool", "attach", left, lost)
    answer("pool", "activate", left, lost)
    assert answer("domain", "show", lost)["role"] == "Regular"


def test_for_people_it_is_a_table(place, capfd, answer, tmp_path):
    path = place()
    answer("pool", "create", "Default", path)
    assert main(["pool", "show", str(path)]) == 0
    shown = capfd.readouterr().out
    assert "name:" in shown and "DOMAIN" in shown and "Active" in shown


def test_domains_are_watched_and_one_that_is_lost_is_told_with_status_3(answer, place, tmp_path, capfd):
    path = place()
    (one,) = answer("domain", "monitor", path)
    assert one["valid"] and one["delay"] >= 0 and one["error"] == ""
    found = answer("domain", "monitor", path, tmp_path / "nothing", status=3)
    assert [row["valid"] for row in found] == [True, False] and "nothing" in found[1]["error"]
    assert main(["domain", "monitor", str(path)]) == 0
    assert "READ DELAY" in capfd.readouterr().out
    assert "no devices" in answer("domain", "extend", path, "/dev/null", status=1)


def test_local_storage_is_mounted_as_a_link_and_a_directory_has_no_volumes_to_deactivate(answer, place, tmp_path):
    path = place()
    options = (path, "--type", "LOCALFS", "--root", tmp_path / "root")
    mounted = answer("domain", "mount", *options)["path"]
    assert answer("domain", "show", mounted)["uuid"] == uuid_of(answer, path)
    answer("domain", "unmount", *options)
    assert "neither a directory" in answer("domain", "show", mounted, status=1)
    assert "no devices" in answer("domain", "deactivate", path, status=1)
