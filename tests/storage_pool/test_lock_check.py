# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Checking the locks of a domain and its external leases, on domains of other writers too."""

import struct

import pytest

from storage_pool.check import check_domain, mend
from storage_pool.file_domain import FileDomain
from storage_pool.ids import make_id
from storage_pool.lock_check import lock_findings
from storage_pool.testing.golden import rebuild_file_domain
from storage_pool.xlease import XleaseVolume

MIB = 1 << 20
#: Of the time in a leader record.
TIME = 152


def poke(domain, name, offset, data):
    with domain.special(name, writable=True) as storage:
        block = bytearray(4096)
        start = offset // 4096 * 4096
        storage.read_into(start, [block])
        block[offset - start : offset - start + len(data)] = data
        storage.write(start, [bytes(block)])
        storage.flush()


def told(domain):
    return [(one.volume, one.text, one.repair) for one in check_domain(domain).findings]


def add_lease(domain):
    view, name = domain.metadata, make_id()
    with domain.special("xleases", writable=True) as storage:
        options = {"path": storage.name, "block_size": view.block_size, "alignment": view.alignment}
        lease = XleaseVolume(storage, **options).add(name)
    return name, lease.area.offset


@pytest.mark.parametrize("case", ["export", "iso", "v1_nfs", "v3_nfs", "v4_glusterfs_512", "v5_localfs", "v5_nfs"])
def test_locks_of_domains_that_others_wrote_are_sound(golden, tmp_path, case):
    with FileDomain.open(str(rebuild_file_domain(golden / "file" / case, tmp_path))) as domain:
        assert lock_findings(domain) == []


def test_a_lost_lockspace_is_written_anew_unless_hosts_are_in_it(make_domain, token):
    domain = make_domain()
    poke(domain, "ids", 0, bytes(512))
    assert told(domain) == [("ids", "the lockspace is not there", "write lockspace")]
    assert mend(token, domain).clean
    poke(domain, "ids", 56, b"another")
    ((_, text, rule),) = told(domain)
    assert rule == "write lockspace" and "checksum" in text
    # Host 3 has renewed: what it holds would be taken from it.
    poke(domain, "ids", 2 * 512 + TIME, struct.pack("<Q", 12345))
    ((_, text, rule),) = told(domain)
    assert rule == "none" and text.endswith("hosts are in it: 3")
    assert not mend(token, domain).clean


def test_the_lock_of_the_domain_under_another_name_is_written_anew(make_domain, token):
    domain = make_domain(3)
    for offset, data in ((MIB, bytes(4)), (MIB + 104, b"XDM"), (MIB + 56, bytes(36))):
        poke(domain, "leases", offset, data)
        ((name, text, rule),) = told(domain)
        assert (name, rule) == ("leases", "write lock") and text.startswith("the domain's lock ")
        assert mend(token, domain).clean


@pytest.mark.parametrize("version", [0])
def test_the_block_that_locks_an_old_domain_is_free_held_or_written_anew(file_domain, token, version):
    domain = file_domain(version)
    poke(domain, "leases", 0, b"7".ljust(16) + b"00000000000000ff")
    assert check_domain(domain).clean
    poke(domain, "leases", 0, b"nonsense")
    ((name, _, rule),) = told(domain)
    assert (name, rule) == ("leases", "write lock") and mend(token, domain).clean


def test_the_index_of_external_leases_is_compared_with_their_areas(make_domain, token):
    domain = make_domain()
    (first, at), (second, _) = add_lease(domain), add_lease(domain)
    assert check_domain(domain).clean
    poke(domain, "xleases", at, bytes(512))
    poke(domain, "xleases", MIB + 512 + 64 + 49, b"x")
    found = check_domain(domain).findings
    assert [(one.repair, one.value) for one in found] == [
        ("rebuild leases", f"write resource {first}"),
        ("rebuild leases", f"write record {second}"),
    ]
    assert mend(token, domain).clean and set(domain.external_leases()) == {first, second}
    # Without its head nothing says whose the leases were.
    poke(domain, "xleases", MIB, bytes(512))
    ((name, text, rule),) = told(domain)
    assert (name, rule) == ("xleases", "none") and "can only be made anew" in text


def test_a_special_file_that_is_gone_is_told_in_one_line(file_domain):
    domain = file_domain()
    domain.root.unlink("dom_md/ids")
    ((name, text, rule),) = told(domain)
    assert (name, rule) == ("ids", "none") and "\n" not in text
