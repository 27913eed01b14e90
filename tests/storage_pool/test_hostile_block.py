# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Volume groups that somebody wrote to do harm: one clear line, never a write, bounded memory.

One group is used for all cases: LVM's own text of it is changed and given
back to LVM, or bytes of a special volume are changed, and both are undone.
"""

import contextlib
import json
import re
import resource

import pytest

from storage_pool import block_group, snapshot, volume
from storage_pool.check import mend
from storage_pool.cli.main import main
from storage_pool.embedded import FileToken
from storage_pool.errors import MetadataError, NotFound
from storage_pool.ids import make_id
from storage_pool.lease_records import lockspace_area, resource_area
from storage_pool.process import SystemRunner
from storage_pool.sealed import to_tags
from storage_pool.testing.lvm import attached, local_lvm, loop_devices

pytestmark = pytest.mark.real("lvm", "losetup", "mke2fs")

GIB, MIB = 1 << 30, 1 << 20
CTIME = 1617235200
OTHER = "00000000-dead-4000-8000-00000000beef"
BEGIN = "\tlogical_volumes {\n"
COMMANDS = (
    ["domain", "dump"],
    ["domain", "check"],
    ["domain", "show"],
    ["domain", "leftovers"],
    ["volume", "list"],
    ["image", "show"],
)


class ReadingRunner:
    """Runs reports only, each once for a state of the group, and says what else was asked for."""

    def __init__(self):
        self.inner = SystemRunner()
        self.known = {}
        self.refused = []

    def run(self, argv, **options):
        if list(argv[:2]) != ["lvm", "fullreport"]:
            self.refused.append(argv)
        key = tuple(argv)
        if key not in self.known:
            self.known[key] = self.inner.run(argv, **options)
        return self.known[key]


class Victim:
    """A group with a disk of two volumes and a raw disk, whose text can be changed."""

    def __init__(self, folder, devices, lvm, domain, image, base, leaf, raw):
        self.folder, self.devices, self.lvm, self.domain = folder, devices, lvm, domain
        self.image, self.base, self.leaf, self.raw = image, base, leaf, raw
        self.number = 0
        self.good = self.backup()

    def backup(self):
        path = self.folder / "backup"
        self.lvm.run("vgcfgbackup", "-f", str(path), self.domain.uuid)
        return path.read_text()

    def restore(self, text):
        path = self.folder / "changed"
        path.write_text(text)
        self.lvm.run("vgcfgrestore", "--force", "-f", str(path), self.domain.uuid)
        self.domain.refresh()

    def part(self, name):
        """LVM's text of a logical volume."""
        return re.search(rf"\n\t\t{name} \{{\n.*?\n\t\t\}}\n", self.good, re.DOTALL)[0]

    def linear(self, name, device, first, count=1, status='"READ", "WRITE", "VISIBLE"', tags=""):
        """The text of one more logical volume of *count* extents."""
        segment = f'type = "striped"\nstripe_count = 1\nstripes = ["{device}", {first}]'
        return self.lv(name, segment, count, status, tags)

    def lv(self, name, segment, count=1, status='"READ", "WRITE", "VISIBLE"', tags=""):
        self.number += 1
        identity = f"{self.number:06d}-AAAA-BBBB-CCCC-DDDD-EEEE-{self.number:06d}"
        return (
            f'\n\t\t{name} {{\nid = "{identity}"\nstatus = [{status}]\nflags = []\ntags = [{tags}]\n'
            f"segment_count = 1\nsegment1 {{\nstart_extent = 0\nextent_count = {count}\n{segment}\n}}\n\t\t}}\n"
        )

    def more(self, *texts):
        """The whole text with more logical volumes."""
        return self.good.replace(BEGIN, BEGIN + "".join(texts))

    def edit(self, name, old, new):
        """The whole text with a change in one volume."""
        part = self.part(name)
        assert old in part
        return self.good.replace(part, part.replace(old, new))

    def tag(self, name, old, new):
        found = re.search(rf'"({old}_?[^"]*)"', self.part(name))[1]
        return self.edit(name, f'"{found}"', new)


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    with loop_devices(folder, 12 * GIB, 12 * GIB) as devices, FileToken(str(folder / "lock")) as token:
        lvm = local_lvm(folder / "host", devices)
        domain = block_group.create_block_domain(token, lvm, SystemRunner(), make_id(), devices, version=5, ctime=CTIME)
        spec = volume.VolumeSpec(make_id(), make_id(), 256 * MIB)
        volume.create_volume(token, domain, spec, CTIME)
        leaf = snapshot.create_snapshot(token, domain, spec.image, ctime=CTIME)
        raw = volume.VolumeSpec(make_id(), make_id(), 128 * MIB, "RAW", "PREALLOCATED")
        volume.create_volume(token, domain, raw, CTIME)
        token.close()
        yield Victim(folder, devices, lvm, domain, spec.image, spec.volume, leaf, raw.volume)


def stamps(group):
    return [(group.folder / name).stat().st_mtime_ns for name in ("lun0", "lun1")]


@pytest.fixture
def told(group, capfd, monkeypatch):
    """Run commands that read; return what each said, as one text.  Nothing may have been written."""
    monkeypatch.setenv("QPOOL_LVM_LOCKING_DIR", str(group.folder / "host/lock"))
    monkeypatch.setenv("LVM_SYSTEM_DIR", str(group.folder / "host/lvm"))

    def run(devices=None, *commands):
        runner = ReadingRunner()
        options = [word for device in devices or group.devices for word in ("--device", device)]
        options += ["--no-activation", "--output=json", "--lock", str(group.folder / "lock")]
        before, memory = stamps(group), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        texts = []
        for command in commands or COMMANDS:
            operands = [*command[2:]] + [group.image] * (command[0] == "image")
            status = main([*command[:2], group.domain.uuid, *operands, *options], runner=runner)
            said = capfd.readouterr()
            assert "Traceback" not in said.err and len(said.err.splitlines()) <= 2, (command, said.err)
            assert said.err.replace("\n", "").isprintable()
            assert status in (0, 3) or (status == 1 and said.err.startswith("qpool: ")), (command, said.err)
            if said.out:
                json.loads(said.out)
            texts.append(said.err + said.out)
        assert runner.refused == [] and stamps(group) == before
        # In KiB.
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100_000
        return "".join(texts)

    return run


@contextlib.contextmanager
def changed(group, text):
    """Let the group have another text for a while."""
    try:
        group.restore(text)
        yield
    finally:
        group.restore(group.good)


@contextlib.contextmanager
def written(group, name, offset, data):
    """Let a special volume have other bytes for a while."""
    before = bytearray(len(data))
    try:
        with group.domain.special(name, writable=True) as storage:
            storage.read_into(offset, [before])
            storage.write(offset, [data])
            storage.flush()
        yield
    finally:
        with group.domain.special(name, writable=True) as storage:
            storage.write(offset, [before])
            storage.flush()


# Logical volumes of other kinds: the leaf is one of them

HIDDEN = '"READ", "WRITE"'


def instead(group, segment, *more):
    """The whole text in which the leaf has another *segment* of two extents."""
    tags = re.search(r"\ttags = \[(.*)\]\n", group.part(group.leaf))[1]
    return group.more(group.lv(group.leaf, segment, 2, tags=tags), *more).replace(group.part(group.leaf), "")


def thin(group):
    pool = 'type = "thin-pool"\nmetadata = "pool_tmeta"\npool = "pool_tdata"\ntransaction_id = 1\nchunk_size = 128'
    return instead(
        group,
        'type = "thin"\nthin_pool = "pool"\ntransaction_id = 0\ndevice_id = 1',
        group.lv("pool", f'{pool}\ndiscards = "passdown"\nzero_new_blocks = 1', 2),
        group.linear("pool_tmeta", "pv1", 70, 1, HIDDEN),
        group.linear("pool_tdata", "pv1", 71, 2, HIDDEN),
    )


def of_snapshot(group):
    segment = f'type = "snapshot"\nchunk_size = 8\norigin = "{group.raw}"\ncow_store = "{group.leaf}"'
    return group.more(group.lv("snapshot0", segment))


def mirror(group):
    segment = 'type = "mirror"\nmirror_count = 2\nregion_size = 1024\nmirrors = ["leg0", 0, "leg1", 0]'
    return instead(group, segment, *(group.linear(f"leg{leg}", f"pv{leg}", 73, 2, HIDDEN) for leg in (0, 1)))


def raid(group):
    legs = [f"{group.leaf}_r{kind}_{leg}" for leg in (0, 1) for kind in ("meta", "image")]
    segment = f'type = "raid1"\ndevice_count = 2\nregion_size = 1024\nraids = {json.dumps(legs)}'
    where = {"meta": (75, 1), "image": (76, 2)}
    parts = [group.linear(leg, f"pv{leg[-1]}", *where[leg.split("_r")[1][:-2]], HIDDEN) for leg in legs]
    return instead(group, segment, *parts)


def striped(group):
    old = re.search(r"stripe_count = 1.*?\]\n", group.part(group.leaf), re.DOTALL)[0]
    return group.edit(group.leaf, old, 'stripe_count = 2\nstripe_size = 128\nstripes = ["pv0", 80, "pv1", 80]\n')


def moved(group):
    where, device, first = re.search(r'"(pv.)", (\d+)', group.part(group.leaf)).group(0, 1, 2)
    count = re.search(r"extent_count = (\d+)", group.part(group.leaf))[1]
    segment = f'type = "mirror"\nmirror_count = 2\nregion_size = 2048\nmirrors = ["{device}", {first}, "pv1", 77]'
    move = group.lv("pvmove0", f"extents_moved = 0\n{segment}", count, '"READ", "WRITE", "PVMOVE", "LOCKED"')
    text = group.edit(group.leaf, where, '"pvmove0", 0')
    part = group.part(group.leaf).replace(where, '"pvmove0", 0')
    text = text.replace(part, part.replace('"VISIBLE"]', '"VISIBLE", "LOCKED"]'))
    return text.replace(BEGIN, BEGIN + move)


def many_tags(group):
    return group.tag(group.leaf, "MD", ", ".join(['"MD_2"', *(f'"T{number:0999d}"' for number in range(500))]))


def resealed(**keys):
    """Other keys of the domain under a seal that fits."""

    def change(group):
        old = re.search(r"\n\ttags = \[(.*?)\]\n", group.good)[1]
        new = sorted({*to_tags({**group.domain.metadata.raw, **keys}), "RHAT_storage_domain"})
        return group.good.replace(old, ", ".join(f'"{tag}"' for tag in new), 1)

    return change


def without(name):
    return lambda group: group.good.replace(group.part(name), ""), f"there is no logical volume {name}"


def leaf_tag(kind, *new):
    """Other tags of a kind for the leaf; names in braces are of the group."""
    return lambda g: g.tag(g.leaf, kind, ", ".join(f'"{tag.format(**vars(g))}"' for tag in new))


STRAY = "without the tags of a volume"
TEXTS = {
    "a slot beyond all": (leaf_tag("MD", "MD_999999"), "behind the end of the volume metadata"),
    "a slot of too many digits": (leaf_tag("MD", "MD_" + "9" * 900), STRAY),
    "a slot that is no number": (leaf_tag("MD", "MD_-1"), STRAY),
    "the slot of another volume": (leaf_tag("MD", "MD_1"), "together with 1 other"),
    "a reserved slot": (leaf_tag("MD", "MD_0"), "unreadable record"),
    "no slot": (leaf_tag("MD", "XX_2"), STRAY),
    "two slots": (leaf_tag("MD", "MD_2", "MD_7"), STRAY),
    "two images": (leaf_tag("IU", "IU_{image}", f"IU_{OTHER}"), STRAY),
    "two parents": (leaf_tag("PU", "PU_{base}", "PU_{raw}"), STRAY),
    "no image": (leaf_tag("IU", "XX_{image}"), STRAY),
    "an image that leads away": (leaf_tag("IU", "IU_../../../etc"), STRAY),
    "a parent that leads away": (leaf_tag("PU", "PU_../../../etc"), STRAY),
    "its own parent": (leaf_tag("PU", "PU_{leaf}"), "its tag has the parent"),
    "a parent that is not there": (leaf_tag("PU", f"PU_{OTHER}"), "its tag has the parent"),
    "an image of a volume": (leaf_tag("IU", "IU_{base}"), "its record is of image"),
    "a note that leads away": (leaf_tag("MD", "MD_2", "NOTE_merge:../../etc"), "merge:../../etc"),
    "tags without end": (many_tags, '"findings": []'),
    "a key that nobody knows": (lambda g: g.good.replace('"MDT_ROLE=', '"MDT_X&38&=y", "MDT_ROLE='), "seal"),
    "a mapping that is none": (lambda g: g.good.replace("pecount:", "pecount:x"), "seal"),
    "a mapping of words": (resealed(PV1="pv:x,uuid:y,pestart:z"), "not a physical volume mapping"),
    "a mapping that lies": (
        resealed(PV1="pv:x,uuid:y,pestart:-7,pecount:99999999999,mapoffset:-1"),
        '"unmapped": [\n        "/dev/',
    ),
    "numbers of devices beyond all": (
        resealed(PV99999="pv:x,uuid:y,pestart:0,pecount:1,mapoffset:1"),
        '"findings": []',
    ),
    "another version": (resealed(VERSION="2"), "unreadable record"),
    "the first version": (resealed(VERSION="0"), "unreadable record"),
    "a version that does not exist": (resealed(VERSION="99"), "version 99 is not known"),
    "blocks of another size": (resealed(BLOCK_SIZE="4096", ALIGNMENT="8388608"), "is for blocks of 512"),
    "another uuid": (resealed(SDUUID=OTHER), "not named after its domain"),
    "a kind that does not exist": (resealed(TYPE="../x", CLASS="y"), '"findings": []'),
    "names that are no UUIDs": (
        lambda g: g.more(g.linear("lost+found", "pv1", 60), g.linear("..a", "pv1", 61, tags='"MD_5"')),
        "no part of a domain",
    ),
    "no metadata": without("metadata"),
    "no leases": without("leases"),
    "no xleases": without("xleases"),
    "no ids": without("ids"),
    "metadata of other extents": (lambda g: g.edit("metadata", '"pv0", 0', '"pv1", 62'), "unreadable record"),
    "a thin volume": (thin, "is not linear"),
    "a snapshot": (of_snapshot, "is not linear"),
    "a mirror": (mirror, "is not linear"),
    "a raid": (raid, "is not linear"),
    "stripes": (striped, "is not linear"),
    "a volume being moved": (moved, "is being moved to another device"),
}


@pytest.mark.parametrize("what", TEXTS)
def test_a_group_with_damaged_text_is_told(group, told, what):
    change, words = TEXTS[what]
    with changed(group, change(group)):
        assert words in told()


AREAS = {
    "records of other bytes": ("metadata", MIB, b"\xff" * MIB, "unreadable record"),
    "records of many lines": ("metadata", MIB, b"A=\nB\n\0=\n" * 100000, "unreadable record"),
    "escapes in a record": ("metadata", MIB + 8192, b"DESCRIPTION=\x1b[2J\x07\nEOF\n".ljust(512), "unreadable record"),
    "lockspace of other bytes": ("ids", 0, b"\xff" * MIB, "the lockspace is not there"),
    "a lockspace of another domain": ("ids", 0, lockspace_area(OTHER), f"of lockspace '{OTHER}'"),
    "leases of other bytes": ("leases", 0, b"\xff" * (110 * MIB), "its lease is not there"),
    "a lock of another domain": ("leases", MIB, resource_area(OTHER, "SDM"), f"of lockspace '{OTHER}'"),
    "an index of other bytes": ("xleases", 0, b"\xff" * (4 * MIB), "no lease index here"),
    "a full index of nothing": ("xleases", MIB + 512, b"\xff" * (60 * 4096), "it is damaged"),
    "requests of other bytes": ("inbox", 0, b"\xff" * MIB, '"findings": []'),
}


@pytest.mark.parametrize("what", AREAS)
def test_special_volumes_of_other_bytes_are_told(group, told, what):
    name, offset, data, words = AREAS[what]
    with written(group, name, offset, data):
        assert words in told(None, ["domain", "dump"], ["domain", "check"])


# Rules that would do harm


@pytest.mark.parametrize("what", ["the slot of another volume", "two slots", "no image", "no metadata", "no leases"])
def test_mending_writes_no_record_that_may_be_of_another(group, what):
    def areas():
        with group.domain.special("metadata") as metadata, group.domain.special("leases") as leases:
            read = [bytearray(64 * 1024), bytearray(4 * MIB)]
            metadata.read_into(MIB, [read[0]])
            leases.read_into(100 * MIB, [read[1]])
        return read

    before = areas()
    with FileToken(str(group.folder / "lock")) as token, changed(group, TEXTS[what][0](group)):
        with contextlib.suppress(NotFound):
            mend(token, group.domain)
        if what == "two slots":
            assert {2, 7} <= set(group.domain.occupied_slots())
    assert areas() == before


def test_nothing_is_written_by_a_slot_that_another_volume_has_too(group):
    """The record and the lease there are the other one's."""
    with group.domain.special("metadata") as metadata:
        before = bytearray(64 * 1024)
        metadata.read_into(MIB, [before])

    def now():
        read = bytearray(len(before))
        with group.domain.special("metadata") as metadata:
            metadata.read_into(MIB, [read])
        return read

    with FileToken(str(group.folder / "lock")) as token, changed(group, group.tag(group.raw, "MD", '"MD_1"')):
        for call in (
            lambda: volume.update_volume(token, group.domain, group.raw, description="x"),
            lambda: group.domain.make_lease(token, group.base),
        ):
            with pytest.raises(MetadataError, match="have one metadata slot, 1"):
                call()
        assert now() == before
        # One of them can go, and takes nothing of the other with it.
        image = group.domain.entries()[group.raw].images[0]
        volume.remove_volumes(token, group.domain, image, [group.raw])
        assert group.raw not in group.domain.state.lvs and now() == before


# Devices


def test_a_group_without_one_of_its_devices_is_told_and_the_rest_is_read(group, told):
    text = told(group.devices[:1])
    assert '"PARTIAL"' in text and '"status": "OK"' in text
    assert "Couldn't find device" in told(group.devices[1:]) or "no volume group" in told(group.devices[1:])


def test_two_devices_that_say_they_are_the_same_are_told(group, told):
    with attached([group.folder / "lun0"]) as twins:
        text = told([*group.devices, *twins])
    # LVM takes one of them, which reads the same.
    assert "says it is a device of the group too" in text and '"INVALID"' not in text


def test_another_group_of_the_same_name_is_refused(group, told, tmp_path):
    with loop_devices(tmp_path, 2 * GIB) as others:
        strange = local_lvm(tmp_path / "host", others)
        strange.run("pvcreate", others[0])
        strange.run("vgcreate", group.domain.uuid, others[0])
        assert "no storage domain" in told(others)
        text = told([*group.devices, *others])
    assert "Multiple VGs found with the same name" in text and '"status"' not in text
