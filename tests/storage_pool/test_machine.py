# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A whole domain against a model: any order of operations, each followed by a check of everything."""

import contextlib
import copy
import os
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from storage_pool import exchange as ex
from storage_pool import image_group as ig
from storage_pool import merge as mg
from storage_pool import merge_swap as ms
from storage_pool import snapshot as sn
from storage_pool import transfer as tr
from storage_pool import volume as vol
from storage_pool import volume_jobs as vj
from storage_pool.block_domain import BlockDomain
from storage_pool.check import check_domain, mend
from storage_pool.embedded import FileToken
from storage_pool.file_domain import FileDomain
from storage_pool.ids import make_id
from storage_pool.testing.killing import Killed
from storage_pool.testing.lvm import attached, local_lvm

LONG = int(os.environ.get("QCOWLIB_LONG", "1"))
KIB = 1 << 10
MIB = 1 << 20
CTIME = 1617235200
PIECES = 16
PIECE = 60 * KIB


class Model:
    """A disk: per volume, base first, its bytes as ``{piece: fill}``, its size, and a second leaf."""

    def __init__(self, names, size):
        self.names = names
        self.data = {names[0]: {}}
        self.sizes = {names[0]: size}
        self.look = None
        self.template = False
        self.below = None

    def fork(self, parent, name):
        self.data[name] = copy.copy(self.data[parent])
        self.sizes[name] = self.sizes[parent]


class DyingToken:
    """A right after whose use number *left* the process is gone."""

    epoch = 1

    def __init__(self, left):
        self.left = left

    def check(self):
        self.left -= 1
        if self.left < 0:
            raise Killed


class Machine(RuleBasedStateMachine):
    """Every rule does one operation to the domain and to the model."""

    version = 5
    open_domain = None

    def __init__(self):
        super().__init__()
        self.stack = contextlib.ExitStack()
        folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.token = self.stack.enter_context(FileToken(str(folder / "lock")))
        self.domain = type(self).open_domain(self.stack, self.token, folder)
        mount = folder / "other"
        mount.mkdir()
        options = {
            "version": self.domain.metadata.version,
            "storage_type": "NFS",
            "remote_path": "s:/x",
            "ctime": CTIME,
        }
        self.other = self.stack.enter_context(FileDomain.create(self.token, str(mount), make_id(), **options))
        self.disks = {}

    def teardown(self):
        self.domain.close()
        self.stack.close()

    # Choosing

    def pick(self, data, allowed):
        return data.draw(st.sampled_from(sorted(image for image, disk in self.disks.items() if allowed(disk))))

    def some(self, allowed):
        return any(allowed(disk) for disk in self.disks.values())

    @staticmethod
    def quiet(disk):
        return disk.look is None and not disk.template

    @staticmethod
    def deep(disk):
        return disk.look is None and len(disk.names) > 1

    # Rules

    @initialize(raw=st.booleans())
    def first(self, raw):
        self.create(raw)

    @precondition(lambda self: len(self.disks) < 4)
    @rule(raw=st.booleans())
    def create(self, raw):
        spec = vol.VolumeSpec(make_id(), make_id(), MIB)
        if raw:
            spec = spec._replace(format="RAW", type="PREALLOCATED")
        record = vol.create_volume(self.token, self.domain, spec, CTIME)
        self.disks[spec.image] = Model([spec.volume], record.capacity)

    @precondition(lambda self: self.some(self.quiet))
    @rule(data=st.data(), piece=st.integers(0, PIECES - 1), fill=st.integers(0, 255))
    def write(self, data, piece, fill):
        disk = self.disks[self.pick(data, self.quiet)]
        with vol.open_image(self.domain, disk.names[-1], writable=True) as image:
            if fill:
                image.pwrite(bytes([fill]) * PIECE, piece * PIECE)
            else:
                image.zero(PIECE, piece * PIECE)
        disk.data[disk.names[-1]][piece] = fill

    @precondition(lambda self: self.some(self.quiet))
    @rule(data=st.data())
    def extend(self, data):
        disk = self.disks[self.pick(data, self.quiet)]
        leaf = disk.names[-1]
        disk.sizes[leaf] = vol.extend_capacity(self.token, self.domain, leaf, disk.sizes[leaf] + MIB).capacity

    @precondition(lambda self: self.some(self.quiet))
    @rule(data=st.data())
    def snapshot(self, data):
        image = self.pick(data, self.quiet)
        disk = self.disks[image]
        leaf = sn.create_snapshot(self.token, self.domain, image, ctime=CTIME)
        disk.fork(disk.names[-1], leaf)
        disk.names.append(leaf)

    @precondition(lambda self: self.some(self.deep))
    @rule(data=st.data())
    def preview(self, data):
        image = self.pick(data, self.deep)
        disk = self.disks[image]
        number = data.draw(st.integers(0, len(disk.names) - 2))
        disk.look = sn.preview(self.token, self.domain, image, disk.names[number], ctime=CTIME)
        disk.fork(disk.names[number], disk.look)
        disk.below = number

    @precondition(lambda self: self.some(lambda disk: disk.look))
    @rule(data=st.data(), keep=st.booleans())
    def end_preview(self, data, keep):
        image = self.pick(data, lambda disk: disk.look)
        disk = self.disks[image]
        if keep:
            dropped = sn.commit_preview(self.token, self.domain, image, disk.look)
            assert set(dropped) == set(disk.names[disk.below + 1 :])
            disk.names[disk.below + 1 :] = [disk.look]
        else:
            sn.undo_preview(self.token, self.domain, image, disk.look)
        disk.look = None

    @precondition(lambda self: self.some(self.deep))
    @rule(data=st.data())
    def merge(self, data):
        image = self.pick(data, self.deep)
        disk = self.disks[image]
        number = data.draw(st.integers(1, len(disk.names) - 1))
        base, top = disk.names[number - 1 : number + 1]
        assert mg.merge(self.token, self.domain, image, top) == base
        disk.data[base] = disk.data[top]
        # A RAW logical volume that had more keeps it.
        disk.sizes[base] = max(disk.sizes[base], disk.sizes[top])
        del disk.names[number]

    @precondition(lambda self: self.some(self.deep))
    @rule(data=st.data())
    def merge_by_renames(self, data):
        image = self.pick(data, self.deep)
        disk = self.disks[image]
        number = data.draw(st.integers(1, len(disk.names) - 1))
        assert ms.merge_by_swap(self.token, self.domain, image, disk.names[number - 1]) == disk.names[number]
        del disk.names[number - 1]

    @precondition(lambda self: self.some(self.deep))
    @rule(data=st.data(), at=st.integers(0, 20), renames=st.booleans())
    def merge_that_is_cut(self, data, at, renames):
        image = self.pick(data, self.deep)
        disk = self.disks[image]
        number = data.draw(st.integers(1, len(disk.names) - 1))
        base, top = disk.names[number - 1 : number + 1]
        with contextlib.suppress(Killed):
            if renames:
                ms.merge_by_swap(DyingToken(at), self.domain, image, base)
            else:
                mg.merge(DyingToken(at), self.domain, image, top)
        self.reopen()
        assert mend(self.token, self.domain).clean
        gone = {base, top} - set(self.domain.entries())
        assert gone <= {base if renames else top}
        if gone and renames:
            del disk.names[number - 1]
        elif gone:
            disk.data[base] = disk.data[top]
            disk.sizes[base] = max(disk.sizes[base], disk.sizes[top])
            del disk.names[number]
        else:
            # A RAW base may have got its room already.
            for name in (base, top):
                disk.sizes[name] = self.domain.record(name).capacity

    @precondition(lambda self: self.some(self.quiet))
    @rule(data=st.data())
    def sparsify(self, data):
        leaf = self.disks[self.pick(data, self.quiet)].names[-1]
        if self.domain.record(leaf).type == "SPARSE":
            vj.sparsify(self.token, self.domain, leaf)

    @precondition(lambda self: self.domain.metadata.version >= 4 and self.some(self.quiet))
    @rule(data=st.data())
    def bitmap(self, data):
        leaf = self.disks[self.pick(data, self.quiet)].names[-1]
        if self.domain.record(leaf).format == "COW":
            with vol.open_image(self.domain, leaf, backing=False) as image:
                there = image.bitmaps()
            (vj.remove_bitmap if there else vj.add_bitmap)(self.token, self.domain, leaf, "b")

    @precondition(lambda self: self.some(lambda disk: disk.look is None))
    @rule(data=st.data(), at=st.one_of(st.none(), st.integers(0, 40)))
    def move_there_and_back(self, data, at):
        image = self.pick(data, lambda disk: disk.look is None)
        token = self.token if at is None else DyingToken(at)
        with contextlib.suppress(Killed):
            ex.move_image(token, self.domain, image, self.other, ctime=CTIME)
        self.reopen()
        assert mend(self.token, self.domain, find=lambda uuid: self.other).clean
        if self.other.entries():
            assert not [one for one in self.domain.entries().values() if image in one.images]
            assert check_domain(self.other).clean
            ex.move_image(self.token, self.other, image, self.domain, ctime=CTIME)
        assert self.other.entries() == {}

    @precondition(lambda self: len(self.disks) < 4 and self.some(lambda disk: disk.look is None))
    @rule(data=st.data(), how=st.sampled_from(["copy", "clone", "template"]))
    def copy(self, data, how):
        image = self.pick(data, lambda disk: disk.look is None)
        disk = self.disks[image]
        if how == "copy":
            made = tr.copy_image(self.token, self.domain, image, self.domain, ctime=CTIME)
            names = ig.ImageGroup.load(self.domain, made).chain()[::-1]
            assert len(names) == len(disk.names)
            new = Model(names, 0)
            for mine, theirs in zip(disk.names, names, strict=True):
                new.data[theirs], new.sizes[theirs] = copy.copy(disk.data[mine]), disk.sizes[mine]
            new.template = disk.template
        else:
            call = tr.make_template if how == "template" else tr.collapse
            made, volume = call(self.token, self.domain, image, self.domain, ctime=CTIME)
            new = Model([volume], disk.sizes[disk.names[-1]])
            new.data[volume] = copy.copy(disk.data[disk.names[-1]])
            new.template = how == "template"
        self.disks[made] = new

    @precondition(lambda self: self.some(lambda disk: disk.look is None))
    @rule(data=st.data())
    def remove(self, data):
        image = self.pick(data, lambda disk: disk.look is None)
        vol.remove_volumes(self.token, self.domain, image, ig.ImageGroup.load(self.domain, image).own())
        del self.disks[image]

    @rule()
    def reopen(self):
        domain = self.domain
        self.domain = (
            BlockDomain.open(domain.lvm, domain.uuid)
            if domain.block
            else FileDomain.open(str(Path(domain.name).parent))
        )
        domain.close()

    # Truth

    @invariant()
    def everything_is_as_it_should_be(self):
        report = check_domain(self.domain)
        assert report.clean, report
        live = {volume for disk in self.disks.values() for volume in (*disk.names, disk.look) if volume}
        assert set(self.domain.entries()) == live
        for image, disk in self.disks.items():
            group = ig.ImageGroup.load(self.domain, image)
            assert group.chain(disk.names[-1]) == disk.names[::-1]
            for leaf in filter(None, (disk.names[-1], disk.look)):
                assert group.records[leaf].capacity == disk.sizes[leaf]
                with vol.open_image(self.domain, leaf) as opened:
                    assert opened.size == disk.sizes[leaf]
                    seen = opened.pread(PIECES * PIECE, 0)
                for piece in range(PIECES):
                    fill = disk.data[leaf].get(piece, 0)
                    assert seen[piece * PIECE : (piece + 1) * PIECE] == bytes([fill]) * PIECE, (leaf, piece)


def run(machine, examples, steps):
    run_state_machine_as_test(
        machine, settings=settings(max_examples=examples * LONG, stateful_step_count=steps, deadline=None)
    )


@pytest.mark.fuzz
@pytest.mark.parametrize("version", [0, 3, 5])
def test_any_order_of_operations_on_a_file_domain(version):
    class OnFiles(Machine):
        @staticmethod
        def open_domain(stack, token, folder):
            options = {"storage_type": "NFS", "remote_path": "server:/export", "ctime": CTIME}
            return FileDomain.create(token, str(folder), make_id(), version=version, **options)

    run(OnFiles, 6, 20)


@pytest.mark.fuzz
@pytest.mark.real("lvm", "losetup", "mke2fs")
@pytest.mark.parametrize("version", [3, 5])
def test_any_order_of_operations_on_a_block_domain(version, block_masters):
    master, uuid = block_masters(version)

    class OnVolumeGroup(Machine):
        @staticmethod
        def open_domain(stack, token, folder):
            subprocess.run(["cp", "--sparse=always", master, folder / "lun"], check=True)
            devices = stack.enter_context(attached([folder / "lun"]))
            return BlockDomain.open(local_lvm(folder / "host", devices), uuid)

    run(OnVolumeGroup, 1, 12)
