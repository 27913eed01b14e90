# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``qpool domain``: what is printed and with which exit status."""

import json
from pathlib import Path

import pytest

from storage_pool.cli.main import main
from storage_pool.ids import is_id
from storage_pool.testing.golden import rebuild_block_domain, rebuild_file_domain
from storage_pool.testing.lvm import local_lvm, loop_devices

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def qpool(capsys, tmp_path):
    def run(*arguments, status=0):
        assert main([*map(str, arguments), "--lock", str(tmp_path / "lock")]) == status
        got = capsys.readouterr()
        assert "Traceback" not in got.err
        return got.err if status == 1 else got.out

    return run


def test_dump_of_a_directory_is_the_golden_document(qpool, tmp_path):
    path = rebuild_file_domain(GOLDEN / "file/v5_nfs", tmp_path)
    expected = json.loads((GOLDEN / "file/v5_nfs/expected.json").read_text())
    for place in (path, tmp_path):
        document = json.loads(qpool("domain", "dump", place, "--output=json"))
        for field in ("domain_metadata_raw", "info", "volumes", "all_volumes", "all_images", "external_leases"):
            assert document[field] == expected[field]
    assert "67684444-c544-445b-b3cf-a38c29be3fc9" in qpool("domain", "dump", path)


@pytest.mark.real("lvm", "losetup")
def test_dump_of_a_volume_group_is_the_golden_document(qpool, tmp_path, monkeypatch):
    expected = json.loads((GOLDEN / "block/v5_1pv/expected.json").read_text())
    monkeypatch.setenv("QPOOL_LVM_LOCKING_DIR", str(tmp_path / "host/lock"))
    with loop_devices(tmp_path, 480 << 27) as devices:
        name = rebuild_block_domain(GOLDEN / "block/v5_1pv", local_lvm(tmp_path / "host", devices), devices)
        options = ("--device", devices[0], "--no-activation", "--output=json")
        document = json.loads(qpool("domain", "dump", name, *options))
        listed = json.loads(qpool("domain", "list", *options))
        shown = json.loads(qpool("domain", "show", name, *options))
    for field in ("domain_metadata_raw", "volumes", "all_volumes", "slots", "pv_mapping", "occupied_slots"):
        assert document[field] == expected[field]
    assert [row["uuid"] for row in listed] == [name]
    assert shown["volumes"] == 12 and shown["warnings"] == []


def test_create_list_show_and_destroy_a_domain_in_a_directory(qpool, tmp_path):
    mount = tmp_path / "mount"
    mount.mkdir()
    made = json.loads(qpool("domain", "create", mount, "--version", "V3", "--name", "données", "--output=json"))
    assert is_id(made["uuid"]) and made["path"] == f"{mount}/{made['uuid']}"
    (row,) = json.loads(qpool("domain", "list", mount, "--output=json"))
    assert (row["uuid"], row["version"], row["type"], row["name"]) == (made["uuid"], "3", "LOCALFS", "données")
    assert "données" in qpool("domain", "list", mount)
    assert "LOCALFS" in qpool("domain", "show", mount)
    assert "holds a domain already" in qpool("domain", "create", mount, status=1)
    qpool("domain", "destroy", mount)
    assert "no storage domain here" in qpool("domain", "show", mount, status=1)


def test_v1_means_version_0(qpool, tmp_path):
    (tmp_path / "mount").mkdir()
    qpool("domain", "create", tmp_path / "mount", "--version", "v1", "--type", "NFS", "--class", "iso")
    assert json.loads(qpool("domain", "show", tmp_path / "mount", "--output=json"))["version"] == "0"


def test_leftovers_are_listed_with_status_3_and_swept(qpool, tmp_path):
    path = rebuild_file_domain(GOLDEN / "file/v3_nfs", tmp_path)
    (found,) = json.loads(qpool("domain", "leftovers", path, "--output=json", status=3))
    assert found["kind"] == "removed image"
    qpool("domain", "leftovers", path, "--sweep")
    assert json.loads(qpool("domain", "leftovers", path, "--output=json")) == []


@pytest.mark.parametrize("name", ["/nonexistent", "x", ""])
def test_what_is_no_domain_is_one_line_of_error(qpool, name):
    text = qpool("domain", "dump", name, status=1)
    assert text.startswith("qpool: ") and len(text.splitlines()) == 1


def test_a_domain_that_cannot_be_read_does_not_hide_the_others(qpool, tmp_path, capsys):
    good, bad = tmp_path / "good", tmp_path / "bad"
    for mount in (good, bad):
        mount.mkdir()
        qpool("domain", "create", mount)
    capsys.readouterr()
    (uuid,) = [path.name for path in bad.iterdir()]
    (bad / uuid / "dom_md/metadata").write_text("VERSION=9\n")
    assert main(["domain", "list", str(bad), str(good), "--output=json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert [("error" in row) for row in rows] == [True, False]


def test_bad_usage_is_status_2(capsys):
    for arguments in ([], ["domain"], ["domain", "create", "/x", "--version", "V9"], ["nonsense"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
