# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What only a real device mapper shows; run by ``test_device_mapper.py`` inside a virtual host."""

import contextlib
import os
from pathlib import Path

import pytest

from qcowlib.errors import Busy
from storage_pool import activation, block_group
from storage_pool import snapshot as sn
from storage_pool import volume as vol
from storage_pool.block_domain import BlockDomain
from storage_pool.ids import make_id
from storage_pool.lv_storage import open_logical_volume
from storage_pool.lvm import Lvm, LvmHost

MIB = 1 << 20
CTIME = 1617235200


def disk(domain, token, **options):
    spec = vol.VolumeSpec(make_id(), make_id(), **{"capacity": 128 * MIB, **options})
    vol.create_volume(token, domain, spec, CTIME)
    return spec.image, spec.volume


def raw(domain, token):
    return disk(domain, token, format="RAW", type="PREALLOCATED")[1]


def node(domain, volume):
    return Path(f"/dev/{domain.uuid}/{volume}")


def node_size(domain, volume):
    with node(domain, volume).open("rb") as file:
        return file.seek(0, os.SEEK_END)


def lv(domain, volume):
    domain.changed()
    return domain.state.lv(volume)


def without_mapper(domain, runner):
    """The same group as a host without device mapper sees it."""
    return Lvm(runner, LvmHost(lambda: tuple(domain.state.pvs), activation=False))


def test_a_volume_is_opened_by_its_node_which_the_device_mapper_made(block_domain, token):
    domain = block_domain()
    volume = raw(domain, token)
    activation.deactivate(domain, [volume])
    assert not lv(domain, volume).active and not node(domain, volume).exists()
    with contextlib.closing(domain.open_volume(volume)) as storage:
        assert storage.name == str(node(domain, volume)) and storage.size == 128 * MIB
        assert node(domain, volume).is_block_device()
        assert lv(domain, volume).active and lv(domain, volume).opened
    assert not lv(domain, volume).opened


def test_the_node_and_the_extents_hold_the_same_bytes(block_domain, token, runner):
    domain = block_domain()
    volume = raw(domain, token)
    domain.extend(token, volume, 384 * MIB)
    activation.deactivate(domain, [volume])
    plain = without_mapper(domain, runner)
    places = (0, 128 * MIB - 4096, 384 * MIB - 8192)
    with contextlib.closing(domain.open_volume(volume, writable=True)) as storage:
        for number, place in enumerate(places):
            storage.write(place, [bytes([number + 1]) * 8192])
        storage.flush()
    with contextlib.closing(open_logical_volume(plain, domain.state, volume, writable=True)) as storage:
        assert storage.name == f"{domain.uuid}/{volume}"
        for number, place in enumerate(places):
            data = bytearray(8192)
            storage.read_into(place, [data])
            assert data == bytes([number + 1]) * 8192
        storage.write(4096, [b"e" * 4096])
        storage.flush()
    with contextlib.closing(domain.open_volume(volume)) as storage:
        data = bytearray(12288)
        storage.read_into(0, [data])
        assert data == b"\1" * 4096 + b"e" * 4096 + bytes(4096)


def test_an_open_volume_is_not_deactivated_shrunk_or_removed(block_domain, token):
    domain = block_domain()
    image, volume = disk(domain, token)
    domain.extend(token, volume, 256 * MIB)
    with vol.open_image(domain, volume):
        with pytest.raises(Busy, match="in use on this host"):
            activation.deactivate(domain, [volume])
        with pytest.raises(Busy, match="in use on this host"):
            domain.reduce(token, volume, 128 * MIB)
        with pytest.raises(Busy, match="in use on this host"):
            vol.remove_volumes(token, domain, image, [volume])
        assert volume in activation.deactivate_unused(domain)
        assert lv(domain, volume).active and lv(domain, volume).size == 256 * MIB
        assert domain.record(volume).legality == "LEGAL"
    assert activation.deactivate_unused(domain) == [] and not lv(domain, volume).active
    vol.remove_volumes(token, domain, image, [volume])
    domain.changed()
    assert volume not in domain.state.lvs and not node(domain, volume).exists()


def test_extending_leaves_a_node_in_use_as_it_is_until_it_is_asked_to_follow(block_domain, token):
    domain = block_domain()
    volume = raw(domain, token)
    activation.deactivate(domain, [volume])
    with contextlib.closing(domain.open_volume(volume, writable=True)) as storage:
        domain.extend(token, volume, 256 * MIB)
        assert lv(domain, volume).size == 256 * MIB and node_size(domain, volume) == 128 * MIB
        with pytest.raises(OSError):
            storage.write(128 * MIB, [b"x" * 4096])
        # Others that open it meanwhile do not change its size behind the first one's back.
        domain.open_volume(volume).close()
        assert storage.size == 128 * MIB
        domain.catch_up(volume, storage)
        assert storage.size == node_size(domain, volume) == 256 * MIB
        storage.write(128 * MIB, [b"x" * 4096])
        storage.flush()


def test_a_node_that_nobody_uses_follows_when_it_is_opened(block_domain, token):
    """Another host extended the volume since it was activated here."""
    domain = block_domain()
    volume = raw(domain, token)
    domain.open_volume(volume).close()
    BlockDomain.open(domain.lvm, domain.uuid).extend(token, volume, 256 * MIB)
    assert node_size(domain, volume) == 128 * MIB
    # LVM's attributes have no state for such a volume.
    assert lv(domain, volume).active and not lv(domain, volume).opened
    with contextlib.closing(domain.open_volume(volume)) as storage:
        assert storage.size == 256 * MIB


def test_a_volume_deactivated_behind_our_back_is_activated_again(block_domain, token):
    domain = block_domain()
    volume = raw(domain, token)
    domain.open_volume(volume).close()
    domain.changed()
    assert domain.state.lv(volume).active
    domain.lvm.activate(domain.uuid, [volume], active=False)
    with contextlib.closing(domain.open_volume(volume)) as storage:
        assert storage.size == 128 * MIB


def test_a_thin_image_grows_while_the_engine_writes_it(block_domain, token):
    domain = block_domain()
    _, volume = disk(domain, token, capacity=1024 * MIB, initial_size=64 * MIB)
    with vol.open_image(domain, volume, writable=True) as image:
        with pytest.raises(OSError):
            image.pwrite(b"g" * 200 * MIB, 0)
        domain.extend(token, volume, 512 * MIB)
        domain.catch_up(volume, image.layers[0].storage)
        image.pwrite(b"g" * 200 * MIB, 0)
    with vol.open_image(domain, volume) as image:
        assert image.pread(4096, 200 * MIB - 4096) == b"g" * 4096 and image.check().clean


def test_a_domain_is_made_and_removed_with_active_volumes(lvm, runner, token, spare):
    uuid = make_id()
    domain = block_group.create_block_domain(token, lvm, runner, uuid, [spare], version=5, ctime=CTIME, force=True)
    image, volume = disk(domain, token)
    leaf = sn.create_snapshot(token, domain, image, ctime=CTIME)
    assert set(domain.entries()) == {volume, leaf} and lv(domain, "master").active
    activation.deactivate_unused(domain)
    block_group.destroy_block_domain(token, domain)
    assert not Path(f"/dev/{uuid}").exists() and uuid not in BlockDomain.discover(lvm)
