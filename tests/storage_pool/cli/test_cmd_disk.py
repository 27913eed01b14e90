# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``qpool volume``, ``image``, ``snapshot``, ``template``: the life of a disk by command."""

import json

import pytest

from qcowlib import open as open_image
from storage_pool.cli.main import main
from storage_pool.testing.golden import rebuild_file_domain


@pytest.fixture
def qpool(capsys, tmp_path):
    def run(*arguments, status=0):
        assert main([*map(str, arguments), "--lock", str(tmp_path / "lock"), "--output=json"]) == status
        got = capsys.readouterr()
        return json.loads(got.out) if got.out else got.err

    return run


@pytest.fixture
def mount(qpool, tmp_path):
    path = tmp_path / "mount"
    path.mkdir()
    qpool("domain", "create", path)
    return path


def test_life_of_a_disk(qpool, mount):
    made = qpool("volume", "create", mount, "64M", "--description", "disk")
    image, base = made["image"], made["volume"]
    assert made["capacity"] == 64 << 20
    (row,) = qpool("volume", "list", mount)
    assert (row["volume"], row["voltype"], row["description"]) == (base, "LEAF", "disk")
    with open_image(next(mount.glob(f"*/images/{image}/{base}")), "r+") as opened:
        opened.pwrite(b"first", 0)
    taken = qpool("snapshot", "create", mount, image)
    assert taken["snapshot"] == base
    look = qpool("snapshot", "preview", mount, image, base)["preview"]
    (dropped,) = mount.glob(f"*/images/{image}/{look}")
    (mount / "kept").hardlink_to(dropped)
    qpool("snapshot", "undo", mount, image, look, "--zero")
    assert not any((mount / "kept").read_bytes())
    (mount / "kept").unlink()
    assert qpool("snapshot", "delete", mount, image, taken["leaf"], "--zero") == {"merged_into": base}
    assert qpool("volume", "extend", mount, base, "128M")["capacity"] == 128 << 20
    template = qpool("template", "create", mount, image, "--description", "t")
    thin = qpool("volume", "create", mount, "128M", "--parent", template["volume"])
    assert qpool("image", "show", mount, thin["image"])["findings"] == []
    copied = qpool("image", "copy", mount, image)
    assert "has children" in qpool("image", "remove", mount, template["image"], status=1)
    for disk in (thin["image"], copied["image"], template["image"], image):
        qpool("image", "remove", mount, disk)
    assert qpool("volume", "list", mount) == []
    assert qpool("domain", "check", mount)["volumes"] == 0


def test_a_refused_command_is_one_line(qpool, mount):
    text = qpool("volume", "create", mount, "1M", "--format", "RAW", "--parent", "x" * 8, status=1)
    assert text.startswith("qpool: ") and len(text.splitlines()) == 1
    assert "not a valid" in qpool("volume", "remove", mount, "../x", status=1)
    assert "no image" in qpool("image", "show", mount, "00000000-0000-0000-0000-000000000001", status=1)


def test_a_foreign_domain_is_upgraded_and_checked(qpool, tmp_path, golden):
    path = rebuild_file_domain(golden / "file/v1_nfs", tmp_path)
    qpool("domain", "leftovers", path, "--sweep")
    # The images of golden data are empty files, so their sizes and chains are told.
    assert qpool("domain", "upgrade", path, "V5", status=3)["version"] == 5
    assert qpool("domain", "show", path)["version"] == "5"
    assert qpool("domain", "check", path, status=3)["volumes"] == 10
    assert "no way back" in qpool("domain", "upgrade", path, "V3", status=1)


def test_a_record_is_updated_under_its_expected_generation(qpool, mount):
    volume = qpool("volume", "create", mount, "1M")["volume"]
    assert qpool("volume", "update", mount, volume, "--legality", "ILLEGAL")["generation"] == 1
    (finding,) = qpool("check", mount, status=3)["findings"]
    assert "ILLEGAL" in finding["text"]
    assert "generation 1, not 5" in qpool("volume", "update", mount, volume, "--expect", "5", status=1)
    done = qpool("volume", "update", mount, volume, "--legality", "LEGAL", "--expect", "1", "--generation", "9")
    assert (done["legality"], done["generation"]) == ("LEGAL", 9)
    assert qpool("check", mount)["findings"] == []


def test_a_template_is_listed_with_its_disks_and_cloned(qpool, mount):
    image = qpool("volume", "create", mount, "1M")["image"]
    template = qpool("template", "create", mount, image, "--description", "gold")
    thin = qpool("template", "thin", mount, template["image"], "--description", "web")
    clone = qpool("template", "clone", mount, template["image"])
    assert thin["capacity"] == 1 << 20
    (row,) = qpool("template", "list", mount)
    assert (row["volume"], row["disks"], row["description"]) == (template["volume"], 1, "gold")
    assert set(qpool("image", "show", mount, thin["image"])["volumes"]) == {thin["volume"], template["volume"]}
    assert set(qpool("image", "show", mount, clone["image"])["volumes"]) == {clone["volume"]}
    assert "not a valid image UUID" in qpool("template", "thin", mount, "x", status=1)


def test_jobs_on_one_volume(answer, place):
    data = place()
    made = answer("volume", "create", data, "8M")
    name = made["volume"]
    assert answer("volume", "bitmap-add", data, name, "backup", "--granularity", 65536)["generation"] == 1
    assert answer("volume", "bitmaps", data, name) == [
        {"name": "backup", "granularity": 65536, "enabled": True, "inconsistent": False}
    ]
    assert "generation" in answer("volume", "bitmap-clear", data, name, "backup", "--expect", 0, status=1)
    assert answer("volume", "bitmap-clear", data, name, "backup", "--expect", 1)["generation"] == 2
    answer("volume", "bitmap-remove", data, name, "backup")
    assert answer("volume", "amend", data, name, "0.10")["generation"] == 4
    assert answer("volume", "sparsify", data, name)["zeros"] == 0
    assert answer("volume", "reduce", data, name)["size"] > 0
    assert answer("volume", "check", data, name)["findings"] == []
    taken = answer("snapshot", "create", data, made["image"], "--new-bitmap", "next", status=0)
    assert [one["name"] for one in answer("volume", "bitmaps", data, taken["leaf"])] == ["next"]
