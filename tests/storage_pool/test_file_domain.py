# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Life of file domains and of the volumes in them."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest

from qcowlib.errors import GateDenied
from storage_pool import volume as vol
from storage_pool.check import check_domain, mend
from storage_pool.errors import (
    AlreadyExists,
    Illegal,
    InvalidName,
    MetadataError,
    NotAuthorized,
    NotFound,
    UnsupportedVersion,
)
from storage_pool.file_domain import FileDomain, discover
from storage_pool.ids import BLANK, make_id
from storage_pool.layout import mount_directory
from storage_pool.lease_records import SafeleaseTag
from storage_pool.metadata_volume import VolumeMetadata
from storage_pool.rooted import Rooted
from storage_pool.testing.golden import rebuild_file_domain

GOLDEN = Path(__file__).parent / "golden/file"
CTIME = 1617235200


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def mode(path):
    return oct(Path(path).stat().st_mode & 0o777)


@pytest.fixture
def make(tmp_path, token):
    made = []

    def create(version=5, storage_type="NFS", **options):
        mount = tmp_path / f"mount{len(made)}"
        mount.mkdir()
        options.setdefault("remote_path", "server:/export")
        domain = FileDomain.create(
            token, str(mount), make_id(), version=version, storage_type=storage_type, ctime=CTIME, **options
        )
        made.append(domain)
        return domain

    yield create
    for domain in made:
        domain.close()


def record(domain, image, **changes):
    values = {"domain": domain.uuid, "image": image, "parent": BLANK, "capacity": 8192, "format": "RAW"}
    values |= {"type": "SPARSE", "voltype": "LEAF", "disktype": "DATA", "description": "", "legality": "LEGAL"}
    return VolumeMetadata(**{**values, "ctime": CTIME, **changes})


def add_volume(domain, token, image=None, **changes):
    image, volume = image or make_id(), make_id()
    domain.allocate(token, image, volume, 8192)
    domain.publish(token, volume, record(domain, image, **changes))
    return image, volume


@pytest.mark.parametrize("case", ["v1_nfs", "v3_nfs", "v4_glusterfs_512", "v5_nfs", "v5_localfs", "iso", "export"])
def test_fd01_a_new_domain_is_laid_out_as_other_hosts_do(make, case):
    expected = json.loads((GOLDEN / case / "expected.json").read_text())
    raw = expected["domain_metadata_raw"]
    domain = make(
        expected["version"],
        raw["TYPE"],
        domain_class=raw["CLASS"],
        description=raw["DESCRIPTION"],
        remote_path=raw["REMOTE_PATH"],
    )
    want = {key: value for key, value in raw.items() if not key.startswith(("POOL_", "MASTER_"))}
    assert domain.metadata.raw == {**want, "POOL_UUID": "", "SDUUID": domain.uuid, "ROLE": "Regular"}
    tree = {entry["path"]: (entry["mode"], entry.get("size")) for entry in expected["tree"]}
    for path, (permission, size) in tree.items():
        if path.split("/")[0] == "master" and case != "export":
            continue
        if path.startswith("images/") and path != "images/":
            continue
        state = Path(domain.name, path).stat()
        assert oct(state.st_mode & 0o777) == permission, path
        if size is not None and path not in ("dom_md/metadata", "dom_md/xleases"):
            assert state.st_size == size, path
    assert Path(domain.name, "master").is_dir() == (case == "export")
    assert (case == "iso") == Path(domain.name, "images/11111111-1111-1111-1111-111111111111").is_dir()


def test_lock_of_old_domains_is_a_free_safelease_block(make):
    assert (Path(make(0).name) / "dom_md/leases").read_bytes() == SafeleaseTag(None).pack()


def test_fd02_a_second_domain_on_a_mount_is_refused(make, token):
    domain = make()
    with pytest.raises(AlreadyExists):
        FileDomain.create(
            token,
            str(Path(domain.name).parent),
            make_id(),
            version=5,
            storage_type="NFS",
            remote_path="server:/export",
            ctime=CTIME,
        )


def test_fd02_unsupported_block_size_is_refused_before_anything_is_made(tmp_path, token):
    with pytest.raises(UnsupportedVersion):
        FileDomain.create(
            token, str(tmp_path), make_id(), version=4, storage_type="NFS", remote_path="s:/e", block_size=4096, ctime=1
        )
    assert names(tmp_path) == ["pool.lock"]


def test_fd04_discovery_finds_domains_and_nothing_else(make, tmp_path):
    domain = make()
    mount = str(Path(domain.name).parent)
    Path(mount, make_id()).mkdir()
    Path(mount, make_id()).symlink_to(domain.name)
    assert discover(mount) == [domain.name]
    (tmp_path / "[fd00::1]:_a").mkdir()
    assert discover(str(tmp_path / "[fd00::1]:_a")) == []
    with FileDomain.open(mount) as opened:
        assert opened.uuid == domain.uuid
    # Names of mounts, as other hosts make them; none of their characters is a pattern.
    for remote in ("[fd00::1]:/export/a_b", "glusterSD/server:_vol", "server:/[0-9a-f]*?"):
        place = tmp_path / (remote if "SD/" in remote else mount_directory(remote))
        place.mkdir(parents=True)
        shutil.move(domain.name, place)
        assert discover(str(place)) == [f"{place}/{domain.uuid}"] and discover(mount) == []
        with FileDomain.open(str(place)) as opened:
            assert opened.uuid == domain.uuid
        shutil.move(f"{place}/{domain.uuid}", domain.name)
    with pytest.raises(NotFound):
        FileDomain.open(str(tmp_path / "[fd00::1]:_a"))


def test_fd05_volume_life_leaves_nothing(make, token):
    domain = make()
    image, volume = add_volume(domain, token)
    folder = Path(domain.name) / "images" / image
    assert names(folder) == [volume, f"{volume}.lease", f"{volume}.meta"]
    assert [mode(folder / name) for name in names(folder)] == [
        "0o660",
        "0o660",
        "0o644",
    ]
    with contextlib.closing(domain.open_volume(volume, writable=True)) as storage:
        storage.write(0, [b"pattern"])
    assert domain.record(volume) == record(domain, image)
    assert domain.lease_leader(volume).resource_name == volume
    domain.mark_removed(token, image, [volume])
    assert domain.entries()[volume].removed
    domain.purge(token, image)
    assert domain.entries() == {} and names(folder.parent) == []


def test_fd05_records_are_replaced_whole_also_in_the_images_that_share_them(make, token):
    domain = make()
    image, volume = add_volume(domain, token, voltype="SHARED")
    clone, _ = add_volume(domain, token)
    domain.share(token, volume, clone)
    domain.write_record(token, volume, record(domain, image, voltype="SHARED", description="new"))
    metas = [Path(domain.name) / "images" / where / f"{volume}.meta" for where in (image, clone)]
    assert len({meta.stat().st_ino for meta in metas}) == 1
    assert b"DESCRIPTION=new\n" in metas[1].read_bytes()


def test_fd03_listing_tells_templates_with_their_own_image_first(make, token):
    domain = make()
    assert domain.entries() == {}
    image, template = add_volume(domain, token, voltype="SHARED")
    clones = [add_volume(domain, token) for _ in range(3)]
    for clone, _ in clones:
        domain.share(token, template, clone)
    domain.refresh()
    entry = domain.entries()[template]
    assert entry.images == (image, *sorted(clone for clone, _ in clones)) and entry.parent == BLANK
    assert {domain.entries()[volume].parent for _, volume in clones} == {None}


def test_fd03_a_thousand_volumes_are_listed_without_reading_a_record(make, token, monkeypatch):
    domain = make()
    for number in range(500):
        folder = Path(domain.name) / f"images/{number:08x}-0000-4000-8000-000000000000"
        folder.mkdir()
        for part in (1, 2):
            volume = f"{number:08x}-0000-4000-8000-00000000000{part}"
            (folder / volume).touch()
            (folder / f"{volume}.meta").touch()
    looked = []
    listed = Rooted.names
    monkeypatch.setattr(Rooted, "names", lambda own, path="": (looked.append(path), listed(own, path))[1])
    monkeypatch.setattr(Rooted, "storage", None)
    assert len(domain.entries()) == 1000
    assert len(looked) == len(set(looked)) == 501
    # What is known is not looked up again.
    assert domain.path_of(f"{5:08x}-0000-4000-8000-000000000002").endswith("2") and len(looked) == 501


class Between:
    """Does *deed* once, before call number *at* of those that look at or change directories."""

    def __init__(self, monkeypatch, at, deed):
        self.left, self.deed, self.done = at, deed, False
        for name in ("open", "stat", "listdir", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, self.wrapped(getattr(os, name)))

    def wrapped(self, call):
        def interrupted(*arguments, **options):
            self.left -= 1
            if self.left < 0 and not self.done:
                self.done = True
                self.deed()
            return call(*arguments, **options)

        return interrupted


def purged_between(monkeypatch, token, domain, at, deed):
    """Purge an image while *deed* comes between; returns whether it did, and whether all is gone."""
    image, volume = add_volume(domain, token)
    domain.mark_removed(token, image, [volume])
    folder = Path(domain.name) / f"images/_remove_me_{image}"
    with monkeypatch.context() as patch:
        between = Between(patch, at, lambda: deed(image, folder))
        domain.purge(token, image)
    return between.done, not folder.exists()


@pytest.mark.parametrize("whole", [True, False], ids=["all", "one file"])
def test_fd15_a_purge_in_which_another_one_takes_files_away_ends_with_all_gone(make, token, monkeypatch, whole):
    """Whatever call it is at which the other one comes between."""
    domain = make()
    with FileDomain.open(domain.name) as other:

        def deed(image, folder):
            if whole:
                other.purge(token, image)
            elif folder.exists() and (left := sorted(folder.iterdir())):
                left[-1].unlink()

        outcomes = []
        while not outcomes or outcomes[-1][0]:
            outcomes.append(purged_between(monkeypatch, token, domain, len(outcomes), deed))
    assert len(outcomes) > 15 and all(gone for _, gone in outcomes)


def test_removing_one_volume_of_an_image_keeps_the_others(make, token):
    domain = make()
    image, first = add_volume(domain, token)
    _, second = add_volume(domain, token, image=image)
    domain.mark_removed(token, image, [first])
    assert domain.entries()[first].removed and not domain.entries()[second].removed
    domain.purge(token, image)
    assert list(domain.entries()) == [second]
    with pytest.raises(NotFound):
        domain.mark_removed(token, image, [first])


def test_removing_an_image_leaves_the_template_it_used(make, token):
    domain = make()
    own, template = add_volume(domain, token, voltype="SHARED")
    image, volume = add_volume(domain, token)
    domain.share(token, template, image)
    domain.mark_removed(token, image, [volume])
    assert domain.entries()[template].images == (own,)
    domain.purge(token, image)
    assert domain.record(template).voltype == "SHARED"


def test_what_a_creation_left_is_found_and_swept(make, token):
    domain = make()
    image, volume = make_id(), make_id()
    domain.allocate(token, image, volume, 4096)
    assert domain.entries()[volume].initializing
    with pytest.raises(AlreadyExists):
        domain.allocate(token, image, volume, 4096)
    (Path(domain.name) / "images" / image / f"{volume}.meta.new").touch()
    (Path(domain.name) / "dom_md/metadata.new").touch()
    found = domain.leftovers()
    assert sorted(leftover.kind for leftover in found) == ["new file", "new file", "unfinished volume"]
    domain.sweep(token, found)
    assert domain.leftovers() == [] and domain.entries() == {}


def test_an_abandoned_volume_leaves_nothing_and_a_complete_one_stays(make, token):
    domain = make()
    image, volume = make_id(), make_id()
    domain.allocate(token, image, volume, 4096)
    domain.abandon(token, image, volume)
    assert names(f"{domain.name}/images") == []
    image, volume = add_volume(domain, token)
    with pytest.raises(Illegal):
        domain.abandon(token, image, volume)


def test_old_versions_guard_volumes_by_their_mode(make, token):
    domain = make(0)
    _, volume = add_volume(domain, token)
    domain.set_writable(token, [volume], False)
    assert mode(domain.path_of(volume)) == "0o440"
    domain.set_writable(token, [volume], True)
    assert mode(domain.path_of(volume)) == "0o660"


def test_no_change_without_a_valid_token(make, token):
    domain = make()
    image, volume = add_volume(domain, token)
    token.close()
    for call in (
        lambda: domain.change(token, {"DESCRIPTION": "x"}),
        lambda: domain.allocate(token, image, make_id(), 1),
        lambda: domain.write_record(token, volume, record(domain, image)),
        lambda: domain.mark_removed(token, image, [volume]),
        lambda: domain.purge(token, image),
        lambda: domain.destroy(token),
    ):
        with pytest.raises(NotAuthorized):
            call()


class Stopped:
    """A right that ends while its holder is stopped inside the call *name*, and what others do meanwhile."""

    def __init__(self, monkeypatch, name, meanwhile):
        self.valid = True
        self.meanwhile = meanwhile
        self.real = getattr(os, name)
        monkeypatch.setattr(os, name, self.stop)

    epoch = 1

    def check(self):
        if not self.valid:
            raise NotAuthorized("another host manages the pool")

    def stop(self, *arguments, **words):
        if self.valid:
            self.valid = False
            self.meanwhile()
        return self.real(*arguments, **words)


@pytest.mark.parametrize("call", ["open", "fchmod", "write", "fsync"])
def test_s2_a_writer_stopped_inside_a_change_changes_nothing_after_another_began(make, token, monkeypatch, call):
    domain = make()
    other = FileDomain.open(domain.name)
    # Already read, so that the next call is of the change itself.
    assert domain.metadata.description == ""
    stopped = Stopped(monkeypatch, call, lambda: other.change(token, {"DESCRIPTION": "of the next term"}))
    with pytest.raises(NotAuthorized):
        domain.change(stopped, {"DESCRIPTION": "late, and longer than what the other one wrote"})
    assert FileDomain.open(domain.name).metadata.description == "of the next term"
    other.change(token, {"DESCRIPTION": "and goes on"})
    assert FileDomain.open(domain.name).metadata.description == "and goes on"
    other.close()


def test_a_changed_key_is_sealed_and_unknown_keys_stay(tmp_path, token):
    path = rebuild_file_domain(GOLDEN / "v3_nfs", tmp_path)
    meta = path / "dom_md/metadata"
    with FileDomain.open(str(path)) as domain:
        domain.change(token, {"FUTURE": "kept"})
        domain.change(token, {"DESCRIPTION": "données"})
        assert domain.metadata.description == "données"
    with FileDomain.open(str(path)) as domain:
        assert domain.metadata.raw["FUTURE"] == "kept" and domain.metadata.description == "données"
    assert meta.stat().st_mode & 0o777 == 0o644 and not meta.with_name("metadata.new").exists()


def test_a_broken_seal_ends_opening(tmp_path):
    path = rebuild_file_domain(GOLDEN / "v3_nfs", tmp_path)
    meta = path / "dom_md/metadata"
    meta.write_text(meta.read_text().replace("ROLE=Master", "ROLE=Regular"))
    with pytest.raises(MetadataError, match="seal"):
        FileDomain.open(str(path))


@pytest.mark.parametrize("bad", ["", "..", "x", make_id() + "\n", make_id().upper(), "*"])
def test_names_that_are_no_uuid_reach_no_file(make, token, bad):
    domain = make()
    good = make_id()
    for call in (
        lambda: domain.allocate(token, bad, good, 1),
        lambda: domain.allocate(token, good, bad, 1),
        lambda: domain.record(bad),
        lambda: domain.open_volume(bad),
        lambda: domain.mark_removed(token, bad, []),
        lambda: domain.purge(token, bad),
    ):
        with pytest.raises(InvalidName):
            call()


@pytest.mark.parametrize("where", ["images", "image", "data", "meta", "dom_md"])
def test_links_in_a_domain_lead_nowhere(make, token, tmp_path, where):
    domain = make()
    image, volume = add_volume(domain, token)
    secret = tmp_path / "outside"
    secret.mkdir()
    (secret / "file").write_bytes(b"secret")
    root = Path(domain.name)
    target = {
        "images": root / "images",
        "image": root / "images" / image,
        "data": root / "images" / image / volume,
        "meta": root / "images" / image / f"{volume}.meta",
        "dom_md": root / "dom_md",
    }[where]
    target.rename(tmp_path / "moved")
    target.symlink_to(secret if where in ("images", "image", "dom_md") else secret / "file")
    domain.refresh()
    with pytest.raises((GateDenied, NotFound)):
        if where == "dom_md":
            domain.change(token, {"DESCRIPTION": "x"})
        elif where == "meta":
            domain.record(volume)
        else:
            domain.open_volume(volume, writable=True)
    assert names(secret) == ["file"] and (secret / "file").read_bytes() == b"secret"


def test_an_attached_domain_is_not_destroyed(make, token):
    domain = make()
    domain.change(token, {"POOL_UUID": make_id()})
    with pytest.raises(Illegal):
        domain.destroy(token)
    domain.change(token, {"POOL_UUID": ""})
    domain.destroy(token)
    assert names(str(Path(domain.name).parent)) == []


def test_no_descriptor_is_left_open(make, token):
    domain = make()
    image, volume = add_volume(domain, token)
    before = names("/proc/self/fd")
    domain.write_record(token, volume, record(domain, image))
    domain.change(token, {"DESCRIPTION": "x"})
    add_volume(domain, token, image=image)
    domain.open_volume(volume).close()
    with pytest.raises(NotFound):
        domain.open_volume(make_id())
    domain.leftovers()
    domain.mark_removed(token, image, [volume])
    domain.purge(token, image)
    domain.refresh()
    assert domain.entries() and domain.capacity() and domain.external_leases() == {}
    assert names("/proc/self/fd") == before


@pytest.fixture
def template(make, token):
    """A domain with a template; its own image is in the middle of all names."""
    domain = make()
    own, name = "7" + make_id()[1:], make_id()
    vol.create_volume(token, domain, vol.VolumeSpec(own, name, 1 << 20), CTIME)
    vol.update_volume(token, domain, name, role="SHARED")
    return domain, own, name


@pytest.mark.parametrize("first", ["0", "f"])
def test_links_that_a_cut_thin_clone_left_are_found_and_the_template_keeps_its_own_image(template, token, first):
    domain, own, name = template
    clone = first + make_id()[1:]
    domain.share(token, name, clone)
    # Two directories hold nothing but the template: the record decides.
    assert domain.listing()[name] == [own, clone]
    (found,) = domain.leftovers()
    assert (found.kind, found.name) == ("unused template", f"images/{clone}")
    assert mend(token, domain).clean and domain.listing() == {name: [own]}
    assert domain.root.names("images") == [own] and len(domain.root.names(f"images/{own}")) == 3
    vol.create_volume(token, domain, vol.VolumeSpec(clone, make_id(), 1 << 20, parent=name), CTIME)
    assert check_domain(domain).clean and domain.leftovers() == []


def test_a_thin_clone_that_fails_leaves_no_links_of_its_template(template, token, monkeypatch):
    domain, own, name = template
    monkeypatch.setattr(domain, "publish", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vol.create_volume(token, domain, vol.VolumeSpec("0" + make_id()[1:], make_id(), 1 << 20, parent=name), CTIME)
    assert domain.root.names("images") == [own] and check_domain(domain).clean
