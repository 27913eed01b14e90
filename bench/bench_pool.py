# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Storage domains: making one, volumes by the hundred, snapshots, listing, opening a long chain.

On files, and on a volume group where root, LVM and loop devices are there.
``LVM commands`` of a record is what one round needed of them; each costs tens
of milliseconds, so more than an operation may need is an error.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scale import Scale

from storage_pool import image_group, snapshot, volume
from storage_pool.block_domain import BlockDomain
from storage_pool.block_group import create_block_domain, destroy_block_domain
from storage_pool.embedded import FileToken
from storage_pool.file_domain import FileDomain
from storage_pool.ids import make_id
from storage_pool.process import SystemRunner
from storage_pool.testing.lvm import local_lvm, loop_devices

GIB = 1 << 30
AnyDomain = FileDomain | BlockDomain
BLOCK = (
    os.geteuid() == 0 and all(map(shutil.which, ("lvm", "losetup", "mke2fs"))) and Path("/dev/loop-control").exists()
)
KINDS = ["file", "block"] if BLOCK else ["file"]
#: Commands of LVM that are enough: a report, and what changes.
_CREATE_DOMAIN = 24
_CREATE_VOLUME = 3
_READ = 1


class Place:
    """Where domains of one kind are made."""

    def __init__(self, kind: str, folder: Path, token: FileToken, devices: list[str]) -> None:
        self.kind = kind
        self.folder = folder
        self.token = token
        self.devices = devices
        self.lvm = local_lvm(folder / "host", devices)
        self.numbers = itertools.count()

    def create(self) -> AnyDomain:
        """Make a domain."""
        if self.kind == "file":
            mount = self.folder / f"mount{next(self.numbers)}"
            mount.mkdir()
            options = {"version": 5, "storage_type": "NFS", "remote_path": "server:/export", "ctime": 0}
            return FileDomain.create(self.token, str(mount), make_id(), **options)
        return create_block_domain(
            self.token, self.lvm, SystemRunner(), make_id(), self.devices, version=5, ctime=0, force=True
        )

    def destroy(self, domain: AnyDomain) -> None:
        """Remove a domain."""
        if isinstance(domain, BlockDomain):
            destroy_block_domain(self.token, domain)
        else:
            domain.destroy(self.token)
            domain.close()

    def disk(self, domain: AnyDomain) -> volume.VolumeSpec:
        """Make a disk of one thin volume."""
        spec = volume.VolumeSpec(make_id(), make_id(), GIB, initial_size=64 << 20 if domain.block else None)
        volume.create_volume(self.token, domain, spec, 0)
        return spec


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, bench_dir: Path) -> Iterator[Place]:
    """A place for domains of one kind after the other."""
    folder = bench_dir / f"pool-{make_id()}"
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        token = stack.enter_context(FileToken(str(folder / "lock")))
        devices = stack.enter_context(loop_devices(folder, 1 << 40)) if request.param == "block" else []
        yield Place(request.param, folder, token, devices)
    shutil.rmtree(folder)


def _counted(benchmark: object, place: Place, run: Callable[[], object], most: int) -> Callable[[], None]:
    """Return *run* that fails when it needs more than *most* commands of LVM."""

    def call() -> None:
        before = place.lvm.commands
        run()
        used = place.lvm.commands - before
        benchmark.extra_info["LVM commands"] = used  # type: ignore[attr-defined]
        if used > most:
            raise RuntimeError(f"{used} commands of LVM, {most} are enough")

    return call


def bench_pool_create_domain(benchmark: object, measure: Callable[..., None], place: Place) -> None:
    benchmark.group = f"pool, {place.kind}: create a domain"  # type: ignore[attr-defined]
    made: list[AnyDomain] = []

    def clean() -> None:
        while made:
            place.destroy(made.pop())

    measure(_counted(benchmark, place, lambda: made.append(place.create()), _CREATE_DOMAIN), who="qcowlib", setup=clean)
    clean()


def bench_pool_volumes(benchmark: object, measure: Callable[..., None], place: Place, scale: Scale) -> None:
    """Volumes into one domain, then a list of all of them."""
    count = scale.pool_volumes if place.kind == "file" else scale.pool_volumes // 7
    benchmark.group = f"pool, {place.kind}: create volumes"  # type: ignore[attr-defined]
    domain = place.create()
    measure(
        _counted(benchmark, place, lambda: [place.disk(domain) for _ in range(count)], count * _CREATE_VOLUME),
        who="qcowlib",
        amount=count,
        unit="volume",
    )
    place.destroy(domain)


def bench_pool_list(benchmark: object, measure: Callable[..., None], place: Place, scale: Scale) -> None:
    count = scale.pool_volumes if place.kind == "file" else scale.pool_volumes // 7
    benchmark.group = f"pool, {place.kind}: list all volumes with their records"  # type: ignore[attr-defined]
    domain = place.create()
    for _ in range(count):
        place.disk(domain)

    def run() -> None:
        domain.refresh()
        volume.records_of(domain)

    measure(_counted(benchmark, place, run, _READ), who="qcowlib", amount=count, unit="volume")
    place.destroy(domain)


def bench_pool_snapshot(benchmark: object, measure: Callable[..., None], place: Place) -> None:
    benchmark.group = f"pool, {place.kind}: snapshot"  # type: ignore[attr-defined]
    domain = place.create()
    spec = place.disk(domain)

    def take() -> None:
        snapshot.create_snapshot(place.token, domain, spec.image, ctime=0)

    run = _counted(benchmark, place, take, _CREATE_VOLUME)
    measure(run, who="qcowlib")
    place.destroy(domain)


def bench_pool_open_chain(benchmark: object, measure: Callable[..., None], place: Place, scale: Scale) -> None:
    """Open a disk of 20 volumes and read a sector through all of them."""
    benchmark.group = f"pool, {place.kind}: open a chain of {scale.pool_chain}"  # type: ignore[attr-defined]
    domain = place.create()
    spec = place.disk(domain)
    for _ in range(scale.pool_chain - 1):
        snapshot.create_snapshot(place.token, domain, spec.image, ctime=0)

    def run() -> None:
        domain.refresh()
        with volume.open_image(domain, image_group.ImageGroup.load(domain, spec.image).leaf()) as image:
            image.pread(512, 0)

    measure(_counted(benchmark, place, run, _READ), who="qcowlib")
    place.destroy(domain)
