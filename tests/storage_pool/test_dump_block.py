# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Dumps of block domains that others wrote, on real volume groups made of LVM's own text."""

import json
from pathlib import Path

import pytest

from storage_pool.block_domain import BlockDomain
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
        volumes = dump_block(domain)["all_volumes"]
        left = {leftover.name for leftover in domain.leftovers() if leftover.kind == "unknown volume"}
    assert left == {first, second}
    assert set(expected["all_volumes"]) - set(volumes) == {first, second}
