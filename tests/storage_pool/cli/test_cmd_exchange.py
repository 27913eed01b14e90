# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""``qpool image`` between domains and streams, ``qpool iso``."""

import hashlib
import io
import json
import sys

import pytest

import qcowlib
from storage_pool import exchange
from storage_pool.cli.main import main
from storage_pool.embedded import FileToken
from storage_pool.file_domain import FileDomain
from storage_pool.testing.killing import Killed, KillingDomain

MIB = 1 << 20


@pytest.fixture
def data():
    return b"hello" + bytes(3 * MIB - 10) + b"world"


def test_a_file_becomes_a_disk_moves_and_becomes_a_file(answer, place, tmp_path, data):
    first, second, path, back = place(), place(), tmp_path / "disk.raw", tmp_path / "back.raw"
    path.write_bytes(data)
    checksum = hashlib.sha256(data).hexdigest()
    made = answer("image", "upload", first, path, "--description", "up", "--sha256", checksum, "-p")
    assert (made["size"], made["sha256"]) == (len(data), checksum)
    told = [json.loads(line)["percent"] for line in answer.err.splitlines()]
    assert told[0] == 0 and told[-1] == 100
    answer("image", "move", first, made["image"], second)
    assert answer("volume", "list", first) == []
    got = answer("image", "download", second, made["image"], back)
    assert back.read_bytes()[: len(data)] == data and got["size"] == back.stat().st_size
    assert "File exists" in answer("image", "download", second, made["image"], back, status=1)
    assert answer("image", "upload", first, path, "--sha256", "0" * 64, status=1).startswith("qpool: ")
    assert answer("domain", "check", first)["volumes"] == 0


def test_a_qcow2_file_is_uploaded_and_a_snapshot_downloaded(answer, place, tmp_path):
    domain, path, back = place(), tmp_path / "disk.qcow2", tmp_path / "back.raw"
    qcowlib.create(path, MIB)
    with qcowlib.open(path, "r+") as image:
        image.pwrite(b"first", 0)
    made = answer("image", "upload", domain, path, "--content", "qcow2")
    answer("snapshot", "create", domain, made["image"])
    answer("image", "download", domain, made["image"], back, "--volume", made["volume"])
    assert back.read_bytes() == b"first" + bytes(MIB - 5)


def test_standard_input_and_output_are_streams(answer, place, tmp_path, data, monkeypatch):
    domain = place()

    class Standard:
        def __init__(self, buffer):
            self.buffer = buffer

    monkeypatch.setattr(sys, "stdin", Standard(io.BytesIO(data)))
    assert "is not known" in answer("image", "upload", domain, "-", status=1)
    made = answer("image", "upload", domain, "-", "--size", str(len(data)))
    sink = io.BytesIO()
    sink.close = lambda: None
    real = sys.stdout
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(sink))
    assert main(["image", "download", str(domain), made["image"], "-"]) == 0
    monkeypatch.setattr(sys, "stdout", real)
    assert sink.getvalue()[: len(data)] == data


def test_a_template_and_its_disk_go_over_an_export_domain(answer, place, tmp_path, data):
    source, target, path = place(), place(), tmp_path / "disk.raw"
    export = place("--class", "export", "--version", "V1", "--type", "NFS")
    path.write_bytes(data)
    disk = answer("image", "upload", source, path)["image"]
    template = answer("template", "create", source, disk, "-p")
    thin = answer("volume", "create", source, "4M", "--parent", template["volume"])["image"]
    answer("image", "export", source, thin, export)
    assert "is not there" in answer("image", "import", export, thin, target, status=1)
    answer("image", "export", source, template["image"], export)
    answer("image", "import", export, template["image"], target)
    assert answer("image", "import", export, thin, target)["image"] == thin
    flat = answer("image", "import", export, thin, target, "--collapse")["image"]
    assert len(answer("image", "show", target, flat)["volumes"]) == 1
    assert answer("domain", "check", target)["findings"] == []


def test_a_move_that_was_cut_is_ended_by_command(answer, place, tmp_path, data):
    first, second, path = place(), place(), tmp_path / "disk.raw"
    path.write_bytes(data)
    made = answer("image", "upload", first, path)
    with (
        FileDomain.open(str(first)) as source,
        FileDomain.open(str(second)) as target,
        FileToken(str(tmp_path / "token")) as token,
        pytest.raises(Killed),
    ):
        exchange.move_image(token, source, made["image"], KillingDomain(target, 3), ctime=0)
    assert answer("domain", "check", first, status=3)["unfinished"]
    assert answer("image", "recover", first, second) == {made["image"]: "taken back"}
    assert answer("domain", "check", first)["volumes"] == 1 and answer("domain", "check", second)["volumes"] == 0


def test_media_of_an_iso_domain(answer, place, tmp_path, capfd):
    iso, path = place("--class", "iso", "--version", "V1", "--type", "NFS"), tmp_path / "boot.iso"
    path.write_bytes(b"123")
    assert answer("iso", "upload", iso, path)["size"] == 3
    assert answer("iso", "list", iso) == {"boot.iso": 3}
    assert "is there" in answer("iso", "upload", iso, path, status=1)
    answer("iso", "upload", iso, path, "--replace", "--name", "other.iso")
    assert main(["iso", "list", str(iso)]) == 0
    assert "other.iso  3 B" in capfd.readouterr().out
    for name in ("boot.iso", "other.iso"):
        answer("iso", "remove", iso, name)
    assert answer("iso", "list", iso) == {}
    assert "not the name" in answer("iso", "remove", iso, "../x.iso", status=1)
    assert "are on Iso domains" in answer("iso", "list", place(), status=1)


def test_a_checksum_that_is_none_is_refused_and_storage_is_named_absolutely(answer, tmp_path, data, monkeypatch):
    path = tmp_path / "disk.raw"
    path.write_bytes(data)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    answer("domain", "create", "here")
    assert "SHA-256" in answer("image", "upload", "here", path, "--sha256", "00", status=1)
    told = answer("domain", "dump", "here")
    assert told["domain_metadata_raw"]["REMOTE_PATH"] == str(tmp_path / "here") and told["volumes"] == {}
