# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Disks that change places: move, export and import, upload and download, media."""

import hashlib
import io
import itertools
import stat
from pathlib import Path

import pytest

import qcowlib
from qcowlib.errors import FormatError, UnsupportedFeature
from storage_pool import exchange, snapshot, transfer
from storage_pool import volume as vol
from storage_pool.check import check_domain
from storage_pool.errors import AlreadyExists, Illegal, InvalidName, NotAuthorized, NotFound, UnsupportedVersion
from storage_pool.file_domain import FileDomain
from storage_pool.ids import make_id
from storage_pool.iso import (
    list_media,
    list_ovfs,
    read_ovf,
    remove_media,
    remove_ovf,
    upload_media,
    write_ovf,
)
from storage_pool.testing.killing import Killed, KillingDomain

CTIME = 1617235200
MIB = 1 << 20


def make_disk(domain, token, *, parent="00000000-0000-0000-0000-000000000000", fmt="COW", length=2, mark=b"a"):
    image, leaf = make_id(), make_id()
    kind = "PREALLOCATED" if fmt == "RAW" else "SPARSE"
    vol.create_volume(token, domain, vol.VolumeSpec(image, leaf, 8 * MIB, fmt, kind, parent), CTIME)
    write(domain, leaf, mark, 0)
    for number in range(1, length):
        leaf = snapshot.create_snapshot(token, domain, image, ctime=CTIME)
        write(domain, leaf, mark * 2, number * MIB)
    return image


def write(domain, volume, data, offset):
    with vol.open_image(domain, volume, writable=True) as opened:
        opened.pwrite(data * 512, offset)


def content(domain, image):
    sink = io.BytesIO()
    exchange.download(domain, image, sink)
    return sink.getvalue()


@pytest.fixture
def special(tmp_path, token):
    """Make an ISO or export domain."""
    made = []

    def make(domain_class):
        mount = tmp_path / f"special{len(made)}"
        mount.mkdir()
        options = {"version": 0, "storage_type": "NFS", "domain_class": domain_class, "remote_path": "s:/x"}
        made.append(FileDomain.create(token, str(mount), make_id(), ctime=CTIME, **options))
        return made[-1]

    yield make
    for domain in made:
        domain.close()


# Moving


@pytest.mark.parametrize("fmt", ["COW", "RAW"])
def test_a_disk_moves_between_files_with_its_chain_and_uuids(file_domain, token, fmt):
    source, target = file_domain(5), file_domain(4)
    image = make_disk(source, token, fmt=fmt)
    before, volumes = content(source, image), sorted(vol.records_of(source, image))
    told = []
    exchange.move_image(token, source, image, target, ctime=CTIME, progress=lambda done, total: told.append(done))
    assert content(target, image) == before and sorted(vol.records_of(target, image)) == volumes
    assert not source.entries() and check_domain(target).clean and check_domain(source).clean and told
    assert not source.notes() and not target.notes()


@pytest.mark.real("lvm", "losetup", "mke2fs")
def test_a_disk_moves_from_files_to_a_volume_group_and_back(file_domain, block_domain, token):
    files, group, other = file_domain(), block_domain(), file_domain()
    image = make_disk(files, token)
    before = content(files, image)
    exchange.move_image(token, files, image, group, ctime=CTIME)
    assert content(group, image) == before and not files.entries()
    exchange.move_image(token, group, image, other, ctime=CTIME)
    assert content(other, image) == before and not group.entries() and check_domain(group).clean


def test_op21_a_move_cut_at_every_step_is_ended_or_taken_back(file_domain, token):
    ends, finished = set(), set()
    for at in itertools.count():
        source, target = file_domain(), file_domain()
        image = make_disk(source, token)
        before = content(source, image)
        # The source dies at its step, then the target at its, and so on.
        dying = [source, target]
        dying[at % 2] = KillingDomain(dying[at % 2], at // 2)
        try:
            exchange.move_image(token, dying[0], image, dying[1], ctime=CTIME)
        except Killed:
            pass
        else:
            finished.add(at % 2)
            if len(finished) == 2:
                break
            continue
        ends.update(exchange.recover_moves(token, source, lambda uuid, target=target: target).values())
        whole = [domain for domain in (source, target) if image in {e.images[0] for e in domain.entries().values()}]
        assert len(whole) == 1 and content(whole[0], image) == before
        source.sweep(token, source.leftovers())
        assert check_domain(source).clean and check_domain(target).clean
    assert ends == {"moved", "taken back"}


def test_a_move_that_cannot_be_is_refused_before_any_change(file_domain, token):
    source, target = file_domain(), file_domain()
    image = make_disk(source, token)
    with pytest.raises(Illegal, match="one domain"):
        exchange.move_image(token, source, image, source, ctime=CTIME)
    base = next(volume for volume, record in vol.records_of(source, image).items() if record.is_base)
    looked = snapshot.preview(token, source, image, base, ctime=CTIME)
    with pytest.raises(Illegal, match="previewed"):
        exchange.move_image(token, source, image, target, ctime=CTIME)
    snapshot.undo_preview(token, source, image, looked)
    template_image, template = transfer.make_template(token, source, image, source, ctime=CTIME)
    thin = make_disk(source, token, parent=template, length=1)
    with pytest.raises(Illegal, match="used by 1 disks"):
        exchange.move_image(token, source, template_image, target, ctime=CTIME)
    with pytest.raises(NotFound):
        exchange.move_image(token, source, thin, target, ctime=CTIME)
    assert not target.entries() and not source.notes() and check_domain(source).clean
    transfer.copy_image(token, source, image, target, ctime=CTIME)
    with pytest.raises(AlreadyExists):
        exchange.move_image(token, source, image, target, ctime=CTIME)


def test_a_right_that_is_lost_ends_a_move(file_domain, token):
    source, target = file_domain(), file_domain()
    image = make_disk(source, token)

    def give_up(done, total):
        token.close()

    with pytest.raises(NotAuthorized):
        exchange.move_image(token, source, image, target, ctime=CTIME, progress=give_up)
    assert len(vol.records_of(source, image)) == 2


# Export domains


def test_a_disk_is_exported_without_its_template_and_imported_where_the_template_is(file_domain, special, token):
    source, export = file_domain(), special("Backup")
    base_image, template = transfer.make_template(token, source, make_disk(source, token), source, ctime=CTIME)
    thin = make_disk(source, token, parent=template, mark=b"t")
    before = content(source, thin)
    exchange.export_image(token, source, thin, export, ctime=CTIME)
    fake = export.record(template)
    assert (fake.legality, fake.voltype, fake.description, fake.image) == ("FAKE", "SHARED", "Fake volume", base_image)
    assert export.entries()[template].images == (base_image, thin)
    with pytest.raises(Illegal, match="not exported"):
        content(export, thin)
    for options in ({"flat": True}, {}):
        with pytest.raises((Illegal, NotFound), match=r"not exported|is not there"):
            exchange.import_image(token, export, thin, file_domain(), ctime=CTIME, **options)
    vol.remove_volumes(
        token, source, thin, sorted(v for v, r in vol.records_of(source, thin).items() if r.image == thin)
    )
    assert exchange.import_image(token, export, thin, source, ctime=CTIME) == thin
    assert content(source, thin) == before and check_domain(source).clean
    beside = exchange.import_image(token, export, thin, source, ctime=CTIME, new_ids=True)
    assert beside != thin and content(source, beside) == before


@pytest.mark.parametrize("fmt", ["COW", "RAW"])
def test_a_fake_template_is_filled_by_the_real_one_and_made_fake_again(file_domain, special, token, fmt):
    source, export, target = file_domain(), special("Backup"), file_domain(4)
    image = make_disk(source, token)
    options = {"ctime": CTIME, "description": "gold", "role": "SHARED", "fmt": fmt}
    base_image, template = transfer.collapse(token, source, image, source, **options)
    thin = make_disk(source, token, parent=template, mark=b"t")
    exchange.export_image(token, source, thin, export, ctime=CTIME)
    assert (export.record(template).format, export.record(template).legality) == ("COW", "FAKE")
    assert check_domain(export).clean
    exchange.export_image(token, source, base_image, export, ctime=CTIME)
    filled = export.record(template)
    assert (filled.legality, filled.description, filled.format) == ("LEGAL", "gold", fmt)
    assert content(export, thin) == content(source, thin) and check_domain(export).clean
    assert stat.S_IMODE(Path(export.path_of(template)).stat().st_mode) == 0o440
    assert exchange.import_image(token, export, base_image, target, ctime=CTIME) == base_image
    exchange.import_image(token, export, thin, target, ctime=CTIME)
    assert content(target, thin) == content(source, thin) and check_domain(target).clean
    with pytest.raises(AlreadyExists):
        exchange.export_image(token, source, base_image, export, ctime=CTIME)
    exchange.remove_exported(token, export, base_image)
    assert (export.record(template).legality, export.record(template).format) == ("FAKE", "COW")
    assert check_domain(export).clean
    # Exported once more it is filled again.
    exchange.export_image(token, source, base_image, export, ctime=CTIME)
    assert content(export, thin) == content(source, thin) and check_domain(export).clean
    exchange.remove_exported(token, export, base_image)
    exchange.remove_exported(token, export, thin)
    assert not export.entries()


def test_filling_a_fake_template_that_was_cut_is_run_again(file_domain, special, token):
    source = file_domain()
    options = {"ctime": CTIME, "role": "SHARED", "fmt": "RAW"}
    base_image, template = transfer.collapse(token, source, make_disk(source, token), source, **options)
    thin = make_disk(source, token, parent=template)
    for at in range(9):
        export = special("Backup")
        exchange.export_image(token, source, thin, export, ctime=CTIME)
        with pytest.raises(Killed):
            exchange.export_image(token, source, base_image, KillingDomain(export, at), ctime=CTIME)
        if export.record(template).legality != "LEGAL":
            exchange.export_image(token, source, base_image, export, ctime=CTIME)
        assert content(export, thin) == content(source, thin)


def test_only_export_domains_take_exports(file_domain, special, token):
    source = file_domain()
    image = make_disk(source, token)
    for call in (
        lambda: exchange.export_image(token, source, image, file_domain(), ctime=CTIME),
        lambda: exchange.import_image(token, source, image, file_domain(), ctime=CTIME),
        lambda: exchange.remove_exported(token, source, image),
        lambda: list_ovfs(source),
    ):
        with pytest.raises(Illegal):
            call()


def test_descriptions_of_machines_are_kept_on_an_export_domain(special, token):
    export, machine = special("Backup"), make_id()
    write_ovf(token, export, machine, b"<ovf/>")
    write_ovf(token, export, machine, b"<ovf>2</ovf>")
    assert list_ovfs(export) == [machine] and read_ovf(export, machine) == b"<ovf>2</ovf>"
    with pytest.raises(InvalidName):
        write_ovf(token, export, "../x", b"")
    with pytest.raises(InvalidName, match="limit"):
        write_ovf(token, export, machine, bytes((1 << 20) + 1))
    remove_ovf(token, export, machine)
    with pytest.raises(NotFound):
        remove_ovf(token, export, machine)
    assert list_ovfs(export) == []


# Streams


def pattern(size):
    data = bytearray(size)
    data[100:200] = b"p" * 100
    data[-512:] = b"q" * 512
    return bytes(data)


@pytest.mark.parametrize("fmt", ["COW", "RAW"])
def test_a_stream_becomes_a_disk_and_a_disk_a_stream(make_domain, token, fmt):
    domain, data, told = make_domain(), pattern(8 * MIB), []
    checksum = hashlib.sha256(data).hexdigest()
    made = exchange.upload(
        token,
        domain,
        io.BytesIO(data),
        len(data),
        ctime=CTIME,
        fmt=fmt,
        kind="PREALLOCATED" if fmt == "RAW" else "SPARSE",
        sha256=checksum,
        progress=lambda done, total: told.append((done, total)),
    )
    assert (made.size, made.sha256) == (len(data), checksum) and told[-1] == (len(data), len(data))
    record = domain.record(made.volume)
    assert (record.legality, record.generation, record.format) == ("LEGAL", 1, fmt)
    sink = io.BytesIO()
    got = exchange.download(domain, made.image, sink)
    assert sink.getvalue()[: len(data)] == data and not sink.getvalue()[len(data) :].strip(b"\0")
    assert got.sha256 == hashlib.sha256(sink.getvalue()).hexdigest() and check_domain(domain).clean


def test_a_qcow2_file_is_uploaded_as_it_is(make_domain, token, tmp_path):
    domain, path = make_domain(), tmp_path / "disk.qcow2"
    qcowlib.create(path, 8 * MIB)
    with qcowlib.open(path, "r+") as image:
        image.pwrite(b"x" * 512, 5 * MIB)
    data = path.read_bytes()
    made = exchange.upload(token, domain, io.BytesIO(data), len(data), ctime=CTIME, content="qcow2")
    assert made.sha256 == hashlib.sha256(data).hexdigest()
    assert content(domain, made.image)[5 * MIB : 5 * MIB + 512] == b"x" * 512
    with vol.open_image(domain, made.volume, writable=True) as image:
        image.pwrite(b"y" * 512, 0)
    assert check_domain(domain).clean


@pytest.mark.parametrize(
    ("size", "options", "words"),
    [
        (MIB - 1, {}, "longer than"),
        (2 * MIB, {}, "ended after"),
        (MIB, {"sha256": "0" * 64}, "checksum"),
    ],
)
def test_an_upload_that_is_not_what_was_told_leaves_nothing(make_domain, token, size, options, words):
    domain = make_domain()
    with pytest.raises(Illegal, match=words):
        exchange.upload(token, domain, io.BytesIO(pattern(MIB)), size, ctime=CTIME, **options)
    assert not domain.entries() and not domain.leftovers()


def test_a_qcow2_file_that_names_others_or_is_none_is_refused(file_domain, token, tmp_path):
    domain, path = file_domain(), tmp_path / "disk.qcow2"

    def upload(to=domain):
        data = path.read_bytes()
        exchange.upload(token, to, io.BytesIO(data), len(data), ctime=CTIME, content="qcow2")

    qcowlib.create(tmp_path / "base", MIB)
    qcowlib.create(path, MIB, backing=tmp_path / "base", backing_format="qcow2")
    with pytest.raises(Illegal, match="names other files"):
        upload()
    path.write_bytes(bytes(65536))
    with pytest.raises(FormatError):
        upload()
    qcowlib.create(path, MIB + 512)
    with pytest.raises(Illegal, match="multiple of 4096"):
        upload()
    qcowlib.create(path, MIB)
    with pytest.raises(UnsupportedVersion):
        upload(file_domain(3))
    data = bytearray(path.read_bytes())
    data[3 * 65536 : 3 * 65536 + 8] = (1 << 63 | 99 << 40).to_bytes(8, "big")
    path.write_bytes(data)
    with pytest.raises((Illegal, UnsupportedFeature)):
        upload()
    assert not domain.entries() and not domain.leftovers()


# Media


def test_media_of_an_iso_domain_appear_whole_and_are_listed(special, token):
    iso, data, told = special("Iso"), pattern(6 * MIB), []
    checksum = hashlib.sha256(data).hexdigest()
    done = upload_media(
        token, iso, "Boot.ISO", io.BytesIO(data), size=len(data), sha256=checksum, progress=lambda *at: told.append(at)
    )
    assert done == (len(data), checksum) and told[-1] == (len(data), len(data))
    assert list_media(iso) == {"Boot.ISO": len(data)}
    with iso.root.open("images/11111111-1111-1111-1111-111111111111/Boot.ISO") as storage:
        got = bytearray(len(data))
        storage.read_into(0, [got])
    assert got == data
    with pytest.raises(AlreadyExists):
        upload_media(token, iso, "Boot.ISO", io.BytesIO(b"x"))
    upload_media(token, iso, "Boot.ISO", io.BytesIO(b"x"), replace=True)
    assert list_media(iso) == {"Boot.ISO": 1}
    remove_media(token, iso, "Boot.ISO")
    assert iso.root.names("images/11111111-1111-1111-1111-111111111111") == []


@pytest.mark.parametrize("name", ["x.img", "../x.iso", "a/b.iso", ".x.iso", "x\n.iso", "", "n" * 300 + ".iso"])
def test_a_name_that_is_no_medium_is_refused(special, token, name):
    with pytest.raises(InvalidName):
        upload_media(token, special("Iso"), name, io.BytesIO(b""))


def test_a_medium_that_fails_leaves_nothing_and_data_domains_take_none(special, file_domain, token):
    iso = special("Iso")
    for options in ({"sha256": "0" * 64}, {"size": 1}, {"size": 9}):
        with pytest.raises(Illegal):
            upload_media(token, iso, "x.iso", io.BytesIO(b"123"), **options)
    assert iso.root.names("images/11111111-1111-1111-1111-111111111111") == []
    with pytest.raises(Illegal, match="media are on Iso domains"):
        upload_media(token, file_domain(), "x.iso", io.BytesIO(b""))
