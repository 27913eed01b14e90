# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Dumps of block domains that others wrote, on real volume groups made of LVM's own text."""

import json
from pathlib import Path

import pytest

from storage_pool.block_domain import BlockDomain
from storage_pool.check import check_domain
from storage_pool.dump import dump_block
from storage_pool.lock_check import lock_findings
from storage_pool.testing.golden import rebuild_block_domain
from storage_pool.testing.lvm import local_lvm, loop_devices

pytestmark = pytest.mark.real("lvm", "losetup")

GOLDEN = Path(__file__).parent / "golden/block"
CASES = sorted(path.name for path in GOLDEN.iterdir())
EXTRA = {"labels", "qemu", "what"}


@pytest.fixture(params=CASES)
def rebuilt(request, tmp_path):
    case = GOLDEN / request.param
    expected = json.loads((case / "expected.json").read_text())
    extents = [pv["pe_count"] for pv in expected["pvs"]]
    # Metadata areas of 128 MiB stand before and behind the extents.
    with loop_devices(tmp_path, *((count + 3) << 27 for count in extents)) as devices:
        lvm = local_lvm(tmp_path / "host", devices)
        name = rebuild_block_domain(case, lvm, devices)
        named = {pv["guid"]: device.removeprefix("/dev/") for pv, device in zip(expected["pvs"], devices, strict=True)}
        yield lvm, name, expected, named


def test_dump_of_a_block_domain_equals_what_its_writer_reads_in_it(rebuilt):
    lvm, name, expected, named = rebuilt
    before = lvm.commands
    with BlockDomain.open(lvm, name) as domain:
        document = dump_block(domain)
        assert lock_findings(domain) == []
    assert lvm.commands - before == 1
    text = json.dumps(document)
    # Devices have other names here; the mapping in the tags keeps the old ones.
    for guid, device in named.items():
        text = text.replace(f'"{device}"', f'"{guid}"').replace(f"/dev/{device}(", f"/dev/mapper/{guid}(")
    document = json.loads(text)
    for field in sorted(set(expected) - EXTRA):
        assert document[field] == expected[field], field
    assert "problems" not in document
    resources = {volume: lease["resource"] for volume, lease in document["leases"].items()}
    assert resources == ({} if expected["version"] < 3 else {volume: volume for volume in expected["all_volumes"]})


def test_bd06_volumes_with_bad_or_missing_tags_do_not_break_listing(rebuilt):
    lvm, name, expected, _ = rebuilt
    first, second = sorted(expected["all_volumes"])[:2]
    slot = expected["slots"][second]["slot"]
    lvm.change_tags(name, [first], remove=[f"IU_{expected['slots'][first]['image']}"])
    lvm.change_tags(name, [second], add=["MD_x"], remove=[f"MD_{slot}"])
    with BlockDomain.open(lvm, name) as domain:
        document = dump_block(domain)
        left = {leftover.name for leftover in domain.leftovers() if leftover.kind == "unknown volume"}
    assert left == {first, second} == set(document["problems"])
    # Other hosts list what says its image and parent, whatever its slot.
    listed = {volume: told for volume, told in expected["all_volumes"].items() if volume != first}
    assert document["all_volumes"] == listed
    told = {**expected["volumes"], first: {**expected["volumes"][first], "status": "INVALID"}}
    keys = ("apparentsize", "truesize", "image", "parent")
    told[second] = {**{key: told[second][key] for key in keys}, "status": "INVALID"}
    assert document["volumes"] == told


@pytest.mark.parametrize("rebuilt", ["v5_1pv"], indirect=True)
def test_what_a_record_does_not_say_is_told_by_tags(rebuilt):
    lvm, name, expected, _ = rebuilt
    cleared, gone, zeroed, wide = sorted(expected["all_volumes"])[:4]
    slots = expected["slots"]
    lvm.change_tags(
        name,
        [zeroed],
        add=[f"IU__remove_me_ZERO_{slots[zeroed]['image']}"],
        remove=[f"IU_{slots[zeroed]['image']}"],
    )
    # No slot that was ever given is there; all before and behind stay readable.
    lvm.change_tags(name, [wide], add=["MD_999999"], remove=[f"MD_{slots[wide]['slot']}"])
    with BlockDomain.open(lvm, name) as domain:
        with domain.special("metadata", writable=True) as metadata:
            metadata.write(slots[cleared]["metadata_offset"], [b"NONE=#####\nEOF\n".ljust(512, b"#")])
            metadata.write(slots[gone]["metadata_offset"], [bytes(512)])
        document = dump_block(domain)
        lines = list(check_domain(domain).lines())
    known = {key: expected["volumes"][gone][key] for key in ("apparentsize", "truesize", "image", "parent", "mdslot")}
    assert document["volumes"][gone] == {**known, "status": "INVALID", "generation": 0, "sequence": 0}
    assert document["volumes"][cleared]["status"] == "INVALID" and "cleared" in document["problems"][cleared][0]
    assert document["volumes"][zeroed] == {**expected["volumes"][zeroed], "status": "REMOVED"}
    assert document["slots"][zeroed]["image"] == f"_remove_me_ZERO_{slots[zeroed]['image']}"
    assert zeroed not in document["all_volumes"] and document["volumes"][wide]["status"] == "INVALID"
    for volume in set(expected["volumes"]) - {cleared, gone, zeroed, wide}:
        assert document["volumes"][volume] == expected["volumes"][volume]
    assert any(wide in line and "behind the end of the volume metadata" in line for line in lines)


@pytest.mark.parametrize("rebuilt", ["v2_1pv"], indirect=True)
def test_records_of_hosts_that_counted_slots_in_bytes_are_read(rebuilt):
    lvm, name, expected, _ = rebuilt
    volume, slot = next((volume, told["slot"]) for volume, told in sorted(expected["slots"].items()))
    far = 2048 + 512 * 80
    lvm.change_tags(name, [volume], add=[f"MD_{far}"], remove=[f"MD_{slot}"])
    with BlockDomain.open(lvm, name) as domain:
        with domain.special("metadata", writable=True) as metadata:
            data = bytearray(512)
            metadata.read_into(slot * 512, [data])
            metadata.write(far * 512, [data])
        document = dump_block(domain)
    assert far * 512 > 17 << 20
    assert document["volumes"][volume] == {**expected["volumes"][volume], "mdslot": far}
    assert "problems" not in document
