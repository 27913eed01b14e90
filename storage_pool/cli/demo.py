# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A whole pool at work: domain, disk, template, thin clone, snapshot, preview, undo, a merge that is killed.

Invariant: everything happens in one temporary directory, and on a volume
group in a file of it where root, LVM and loop devices are there; nothing is
left.  What each step reads back is compared with what it wrote.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from qcowlib.errors import Error
from storage_pool import check, image_group, merge, snapshot, transfer, volume
from storage_pool.block_domain import BlockDomain
from storage_pool.block_group import create_block_domain
from storage_pool.embedded import FileToken
from storage_pool.file_domain import FileDomain
from storage_pool.ids import make_id
from storage_pool.lvm import Lvm, LvmHost
from storage_pool.process import SystemRunner

__all__ = ["Result", "run_demo"]

MIB = 1 << 20
_LUN = 24 << 30
AnyDomain = FileDomain | BlockDomain


class Problem(Exception):
    """A step found that something is not as it must be."""


class Result(NamedTuple):
    """One step of one kind of domain: how long it took and what it said, or what is wrong."""

    kind: str
    step: str
    seconds: float
    text: str
    problem: str | None


class _DyingToken:
    """Kills its process before change number *left*; every change asks a token first."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.epoch = 1

    def check(self) -> None:
        """See :class:`~storage_pool.token.SpmToken`."""
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)


class _Demo:
    """One domain and what the steps made in it."""

    def __init__(self, place: str, token: FileToken, lvm: Lvm | None, device: str, now: int) -> None:
        self.place = place
        self.token = token
        self.lvm = lvm
        self.device = device
        self.now = now
        self.expected: dict[str, bytes] = {}
        self.image = self.leaf = self.template = ""

    @property
    def domain(self) -> AnyDomain:
        if self.made is None:
            raise Problem("there is no domain")
        return self.made

    made: AnyDomain | None = None

    def compare(self, *volumes: str) -> str:
        """Compare what volumes read as with what they must."""
        total = 0
        for name in volumes:
            expected = self.expected[name]
            with volume.open_image(self.domain, name) as image:
                if image.pread(len(expected), 0) != expected:
                    raise Problem(f"the volume {name} reads other data than were written")
            total += len(expected)
        return f"{total / MIB:.0f} MiB compared"

    def write(self, name: str, offset: int, data: bytes) -> None:
        with volume.open_image(self.domain, name, writable=True) as image:
            image.pwrite(data, offset)
        old = self.expected[name]
        self.expected[name] = old[:offset] + data + old[offset + len(data) :]

    def create(self) -> str:
        uuid = make_id()
        if self.lvm is None:
            self.made = FileDomain.create(
                self.token,
                self.place,
                uuid,
                version=5,
                storage_type="NFS",
                remote_path="server:/export",
                ctime=self.now,
            )
        else:
            runner = SystemRunner()
            devices = [self.device]
            self.made = create_block_domain(self.token, self.lvm, runner, uuid, devices, version=5, ctime=self.now)
        return f"domain {uuid} of version 5"

    def disk(self) -> str:
        spec = volume.VolumeSpec(make_id(), make_id(), 1 << 30)
        volume.create_volume(self.token, self.domain, spec, self.now)
        self.image, self.leaf = spec.image, spec.volume
        self.expected[self.leaf] = bytes(32 * MIB)
        self.write(self.leaf, 3 * MIB, os.urandom(8 * MIB))
        return f"1 GiB thin, 8 MiB written, {self.compare(self.leaf)}"

    def make_template(self) -> str:
        _, self.template = transfer.make_template(self.token, self.domain, self.image, self.domain, ctime=self.now)
        self.expected[self.template] = self.expected[self.leaf]
        return f"{self.compare(self.template)}"

    def thin_clone(self) -> str:
        spec = volume.VolumeSpec(make_id(), make_id(), 1 << 30, parent=self.template)
        volume.create_volume(self.token, self.domain, spec, self.now)
        self.expected[spec.volume] = self.expected[self.template]
        self.write(spec.volume, 5 * MIB, b"only in the clone" * 1000)
        self.image, self.leaf = spec.image, spec.volume
        return f"stands on the template, {self.compare(spec.volume, self.template)}"

    def snapshot(self) -> str:
        base = self.leaf
        for number in range(2):
            made = snapshot.create_snapshot(self.token, self.domain, self.image, ctime=self.now)
            self.expected[made] = self.expected[self.leaf]
            self.leaf = made
            self.write(made, (9 + number) * MIB, os.urandom(4 * MIB))
        return f"two, 4 MiB written on each, {self.compare(base, self.leaf)}"

    def preview(self) -> str:
        chain = image_group.ImageGroup.load(self.domain, self.image).chain()
        look = snapshot.preview(self.token, self.domain, self.image, chain[2], ctime=self.now)
        self.expected[look] = self.expected[chain[2]]
        told = self.compare(look)
        snapshot.undo_preview(self.token, self.domain, self.image, look)
        return f"the first snapshot, {told}; undone, {self.compare(self.leaf)}"

    def merge(self) -> str:
        """Merge in processes that are killed further and further, each time recover half, then to the end."""
        kills = 0
        top = image_group.ImageGroup.load(self.domain, self.image).chain()[1]
        for left in (2, 5, 8):
            if self._killed(lambda token: merge.merge(token, self.domain, self.image, top), left):
                kills += 1
            self.domain.refresh()
            if self._killed(lambda token: check.mend(token, self.domain), left):
                kills += 1
            self.domain.refresh()
            if top not in self.domain.entries():
                break
        check.mend(self.token, self.domain)
        if top in self.domain.entries():
            merge.merge(self.token, self.domain, self.image, top)
        if not kills:
            raise Problem("nothing was killed")
        return f"killed {kills} times, recovered, {self.compare(self.leaf)}"

    @staticmethod
    def _killed(call: Callable[[_DyingToken], object], left: int) -> bool:
        child = os.fork()
        if child == 0:
            try:
                call(_DyingToken(left))
            finally:
                os._exit(0)
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])

    def check(self) -> str:
        report = check.check_domain(self.domain)
        if not report.clean:
            raise Problem(f"the domain is not clean: {report}")
        said = f"{report.volumes} volumes of {report.images} images are clean"
        if isinstance(self.domain, FileDomain) and shutil.which("qemu-img"):
            runner = SystemRunner()
            for name in self.domain.entries():
                done = runner.run(["qemu-img", "check", "-q", self.domain.path_of(name)])
                if done.returncode:
                    raise Problem(f"qemu-img check: {done.message()}")
            said += ", and qemu-img finds nothing"
        return said

    def remove(self) -> str:
        before = len(self.domain.entries())
        for image in sorted({entry.images[0] for entry in self.domain.entries().values()}, key=self._order):
            own = image_group.ImageGroup.load(self.domain, image).own()
            volume.remove_volumes(self.token, self.domain, image, own)
        if self.domain.entries() or self.domain.leftovers():
            raise Problem("something is left")
        return f"{before} volumes, nothing is left"

    def _order(self, image: str) -> int:
        # A template goes after the disks that stand on it.
        return int(self.template in image_group.ImageGroup.load(self.domain, image).own())


_STEPS: tuple[tuple[str, Callable[[_Demo], str]], ...] = (
    ("create a domain", _Demo.create),
    ("a disk", _Demo.disk),
    ("a template of it", _Demo.make_template),
    ("a thin clone", _Demo.thin_clone),
    ("snapshots", _Demo.snapshot),
    ("preview and undo", _Demo.preview),
    ("merge, killed in the middle", _Demo.merge),
    ("check the whole domain", _Demo.check),
    ("remove all disks", _Demo.remove),
)


def _has_groups() -> bool:
    programs = all(shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin") for name in ("lvm", "losetup", "mke2fs"))
    return programs and os.geteuid() == 0 and Path("/dev/loop-control").exists()


@contextlib.contextmanager
def _loop_device(folder: str) -> Iterator[str]:
    runner = SystemRunner()
    lun = f"{folder}/lun"
    with open(lun, "xb") as file:
        file.truncate(_LUN)
    done = runner.run(["losetup", "--find", "--show", lun])
    if done.returncode:
        raise Problem(f"losetup: {done.message()}")
    device = done.stdout.decode().strip()
    try:
        yield device
    finally:
        runner.run(["losetup", "--detach", device])


def _own_lvm(folder: str, device: str) -> Lvm:
    own = Path(folder, "lvm")
    own.mkdir()
    (own / "lvm.conf").touch()
    host = LvmHost(lambda: (device,), activation=False, system_dir=str(own), locking_dir=str(own))
    return Lvm(SystemRunner(), host)


def _run_kind(kind: str, demo: _Demo, tell: Callable[[Result], None]) -> Iterator[Result]:
    for title, work in _STEPS:
        started = time.monotonic()
        text, problem = "", None
        try:
            text = work(demo)
        except (Problem, Error, OSError) as error:
            problem = str(error) or type(error).__name__
        result = Result(kind, title, round(time.monotonic() - started, 3), text, problem)
        tell(result)
        yield result


def run_demo(tell: Callable[[Result], None], directory: str | None = None) -> list[Result]:
    """Run all steps on files and, where that is possible, on a volume group; *tell* hears of each at once."""
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="qpool-demo-", dir=directory) as folder:
        for kind in ("files", "volume group") if _has_groups() else ("files",):
            place = f"{folder}/{kind.replace(' ', '-')}"
            Path(place).mkdir()
            with contextlib.ExitStack() as stack:
                token = stack.enter_context(FileToken(f"{place}.lock"))
                device, lvm = "", None
                if kind != "files":
                    device = stack.enter_context(_loop_device(place))
                    lvm = _own_lvm(place, device)
                demo = _Demo(place, token, lvm, device, int(time.time()))
                results += _run_kind(kind, demo, tell)
                if demo.made is not None:
                    demo.made.close()
    return results
