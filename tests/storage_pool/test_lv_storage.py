# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The bytes of a logical volume by its extents, and how an open one catches up with a volume that grew."""

import contextlib
from pathlib import Path

import pytest

from qcowlib.errors import ReadOnly, StorageError
from storage_pool.block_domain import BlockDomain
from storage_pool.errors import LvmError, NotFound
from storage_pool.ids import make_id
from storage_pool.lv_storage import catch_up

pytestmark = pytest.mark.real("lvm", "losetup", "mke2fs")

MIB = 1 << 20
EXTENT = 128 * MIB


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def read(storage, offset, length):
    data = bytearray(length)
    storage.read_into(offset, [data])
    return bytes(data)


@pytest.fixture
def volume(block_domain, token):
    """A domain, a volume of one extent in it, and what makes it longer as another host does."""
    domain = block_domain()
    name = make_id()
    domain.allocate(token, make_id(), name, EXTENT)
    other = BlockDomain.open(domain.lvm, domain.uuid)

    def grow(size, *, apart=False):
        if apart:
            # Whatever comes next is not beside it.
            other.allocate(token, make_id(), make_id(), EXTENT)
        other.extend(token, name, size)

    return domain, name, grow


@pytest.mark.parametrize("apart", [False, True])
def test_an_open_volume_goes_on_where_it_ended_when_it_catches_up(volume, apart):
    domain, name, grow = volume
    with contextlib.closing(domain.open_volume(name, writable=True)) as storage:
        storage.write(EXTENT - 4096, [b"old" * 1024])
        grow(3 * EXTENT, apart=apart)
        # Until it is asked to nothing changes for who has it open.
        assert storage.size == EXTENT
        with pytest.raises(StorageError, match="No space"):
            storage.write(EXTENT - 4096, [bytes(8192)])
        domain.catch_up(name, storage)
        assert storage.size == 3 * EXTENT and storage.writable
        storage.write(EXTENT - 1024, [b"border" * 1024])
        storage.write(3 * EXTENT - 4096, [b"last" * 1024])
        storage.flush()
    segments = domain.state.lv(name).segments
    assert len(segments) == 1 + apart
    with contextlib.closing(domain.open_volume(name)) as again:
        assert read(again, EXTENT - 4096, 3072) == b"old" * 1024
        assert read(again, EXTENT - 1024, 6144) == b"border" * 1024
        assert read(again, 3 * EXTENT - 4096, 4096) == b"last" * 1024


def test_catching_up_in_steps_takes_each_part_once(volume):
    domain, name, grow = volume
    with contextlib.closing(domain.open_volume(name, writable=True)) as storage:
        for count in (2, 3, 6):
            grow(count * EXTENT, apart=count == 3)
            domain.catch_up(name, storage)
            assert storage.size == count * EXTENT
            storage.write((count - 1) * EXTENT, [bytes([count]) * 512])
        open_now = descriptors()
        domain.catch_up(name, storage)
        assert descriptors() == open_now
    with contextlib.closing(domain.open_volume(name)) as again:
        assert [read(again, (count - 1) * EXTENT, 512)[0] for count in (2, 3, 6)] == [2, 3, 6]
        assert again.size == 6 * EXTENT


def test_one_that_is_open_for_reading_stays_so(volume):
    domain, name, grow = volume
    before = descriptors()
    with contextlib.closing(domain.open_volume(name)) as storage:
        grow(2 * EXTENT)
        domain.catch_up(name, storage)
        assert storage.size == 2 * EXTENT
        with pytest.raises(ReadOnly):
            storage.write(EXTENT, [b"x" * 512])
    assert descriptors() == before


def test_what_cannot_be_appended_leaves_the_storage_as_it_was(volume):
    domain, name, grow = volume
    with contextlib.closing(domain.open_volume(name, writable=True)) as storage:
        grow(3 * EXTENT, apart=True)
        domain.refresh()
        good, before = domain.state, descriptors()
        lv = good.lv(name)
        gone = lv._replace(segments=(lv.segments[0], lv.segments[1]._replace(device="/dev/gone")))
        short = lv._replace(segments=lv.segments[:1])
        far = lv._replace(segments=(lv.segments[0], lv.segments[1]._replace(first_extent=10**6)))
        for bad in (gone, short, far):
            with pytest.raises((LvmError, StorageError, ValueError)):
                catch_up(domain.lvm, good._replace(lvs={**good.lvs, name: bad}), name, storage)
            assert storage.size == EXTENT and descriptors() == before
        with pytest.raises(NotFound):
            catch_up(domain.lvm, good._replace(lvs={}), name, storage)
        catch_up(domain.lvm, good, name, storage)
        assert storage.size == 3 * EXTENT
