# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The same random work on us and on one long-lived qemu-io, over random geometries and chains.

Each has its own copy of one image.  Now and then both are flushed and
compared: the guest's bytes as qemu reads ours and as we read qemu's, the maps
of both files as both read them, qemu-img check; and the files are handed
over, so that each works on what the other wrote.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import qcowlib
from tests.qcowlib.qemu import QemuIo, our_map, qemu_img, qemu_map, run

pytestmark = [pytest.mark.real("qemu-img", "qemu-io"), pytest.mark.fuzz]

LONG = int(os.environ.get("QCOWLIB_LONG", "1"))
KIB, MIB = 1024, 1024 * 1024

#: Operations of all runs, on each side.
counted = {"operations": 0, "comparisons": 0, "runs": 0}


class Shape(NamedTuple):
    """What kind of image; ``size`` in bytes."""

    options: str
    cluster: int
    size: int
    version: int
    refcount_bits: int
    data_file: bool
    raw: bool


class Base(NamedTuple):
    """One layer below; ``size`` in units of a quarter of the image's size."""

    format: str
    size: int
    bits: int


class Op(NamedTuple):
    """A request of the guest in bytes."""

    kind: str
    offset: int
    length: int
    pattern: int


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    bits = draw(st.sampled_from([9, 9, 10, 11, 12, 12, 13, 14, 14, 15, 16, 16, 16, 17, 18, 19, 20, 21]))
    cluster = 1 << bits
    version = draw(st.sampled_from([3, 3, 3, 3, 2]))
    data_file = version == 3 and draw(st.integers(0, 5)) == 0
    parts = [f"cluster_size={cluster}", f"compat={'1.1' if version == 3 else '0.10'}"]
    refcount_bits = 16
    if version == 3:
        refcount_bits = 1 << draw(st.integers(0, 6))
        parts.append(f"refcount_bits={refcount_bits}")
        if bits >= 14 and draw(st.booleans()):
            parts.append("extended_l2=on")
        if draw(st.integers(0, 3)) == 0:
            parts.append("lazy_refcounts=on")
        if draw(st.integers(0, 3)) == 0 and not data_file:
            parts.append("compression_type=zstd")
    raw = data_file and draw(st.booleans())
    if raw:
        parts.append("data_file_raw=on")
    clusters = draw(st.integers(1, max(3, min(300, (2 * MIB) >> bits))))
    size = clusters * cluster - 512 * draw(st.integers(0, min(7, cluster // 512 - 1)))
    return Shape(",".join(parts), cluster, size, version, refcount_bits, data_file, raw)


def bases() -> st.SearchStrategy[list[Base]]:
    one = st.builds(Base, st.sampled_from(["raw", "qcow2", "qcow2"]), st.integers(1, 7), st.integers(9, 16))
    return st.one_of(st.just([]), st.lists(one, max_size=4))


#: Kind, place in 1/4096 of the image, length before it is cut, pattern.
Request = tuple[str, int, int, int]

#: Kinds of request, the likelier ones repeated.
KINDS = ["write"] * 6 + ["read"] * 2 + ["zero", "unmap", "discard", "discard", "flush", "noise"]


@st.composite
def requests(draw: st.DrawFn) -> Request:
    return (
        draw(st.sampled_from(KINDS)),
        draw(st.integers(0, 4095)),
        draw(st.integers(0, 1 << 30)),
        draw(st.integers(1, 255)),
    )


def same(ours: qcowlib.Image, theirs: qcowlib.Image, what: str) -> None:
    """Both images read the same."""
    assert ours.size == theirs.size
    one, other = ours.pread(ours.size, 0), theirs.pread(theirs.size, 0)
    wrong = [at for at in range(0, len(one), 512) if one[at : at + 512] != other[at : at + 512]]
    first = wrong[0] if wrong else 0
    assert not wrong, f"{what} at {wrong[:3]}: {one[first:][:8].hex()} not {other[first:][:8].hex()}"


class SameAsQemuIo(RuleBasedStateMachine):
    """One image here, its copy in qemu-io."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="qcowlib-"))
        self.sides = [self.folder / "a.qcow2", self.folder / "b.qcow2"]
        self.io: QemuIo | None = None
        self.image: qcowlib.Image | None = None
        self.names: list[str] = []
        self.touched: set[int] = set()
        self.failed = True

    # -- set-up ----------------------------------------------------------------

    @initialize(shape=shapes(), layers=bases(), seed=st.integers(0, 2**32))
    def create(self, shape: Shape, layers: list[Base], seed: int) -> None:
        counted["runs"] += 1
        self.shape = shape
        self.noise = self.folder / "noise"
        data = bytes((seed >> (8 * (i % 4)) ^ i * i * 31 ^ i >> 3) & 255 for i in range(5000))
        self.noise.write_bytes(data)
        self.noise_bytes = data
        if shape.raw:
            layers = []
        self.below = below = self._bases(layers)
        for side in self.sides:
            options = shape.options
            if shape.data_file:
                options += f",data_file={side.with_suffix('.data')}"
            qemu_img("create", "-q", "-f", "qcow2", "-o", options, *below, side, str(shape.size))
        self._open()

    def _bases(self, layers: list[Base]) -> list[str]:
        """Make the chain below; returns the arguments that name its top."""
        below: list[str] = []
        for number, base in enumerate(layers):
            name = f"base{number}"
            path = self.folder / name
            size = max(512, self.shape.size * base.size // 4 // 512 * 512)
            if base.format == "raw":
                path.write_bytes(b"".join(bytes([1 + i * 7 % 250]) * 512 for i in range(size // 512)))
                # Some holes.
                with path.open("r+b") as file:
                    file.truncate(size // 2 // 512 * 512)
                    file.truncate(size)
                below = ["-b", name, "-F", "raw"]
                continue
            qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={1 << base.bits}", *below, path, str(size))
            step = max(512, size // 9 // 512 * 512)
            words = []
            for at in range(0, size, step):
                length = min(step // 2 + 512, size - at)
                command = ("write -z -u", f"write -P {at % 251 + 1}", "")[(at // step + number) % 3]
                if command:
                    words += ["-c", f"{command} {at} {length}"]
            run("qemu-io", "-t", "unsafe", "-f", "qcow2", *words, path)
            below = ["-b", name, "-F", "qcow2"]
        return below

    def _open(self) -> None:
        self.image = qcowlib.open(self.sides[0], "r+", cache="unsafe")
        self.io = QemuIo(self.sides[1], "-d", "unmap", "-t", "unsafe")

    def _close(self) -> None:
        assert self.image is not None and self.io is not None
        self.image.close()
        self.io.close()
        self.image = self.io = None

    # -- requests --------------------------------------------------------------

    def _place(self, request: Request) -> Op:
        kind, where, much, pattern = request
        assert self.image is not None
        size, cluster = self.image.size, self.shape.cluster
        offset = size * where // 4096
        # Mostly at borders of clusters or sectors.
        offset -= offset % (cluster, 512, 512, 1)[pattern % 4]
        length = 1 + much % (512, cluster, 3 * cluster, 3 * cluster, size)[much % 5]
        if pattern % 8:
            length = -(-length // 512) * 512
        if much % 3 == 0:
            length = -(-length // cluster) * cluster
        return Op(kind, offset, min(length, size - offset), pattern)

    @rule(requests=st.lists(requests(), min_size=20, max_size=60))
    def guest(self, requests: list[Request]) -> None:
        self._all(requests)

    @rule(requests=st.lists(requests(), min_size=20, max_size=60))
    def same_guest_more_often(self, requests: list[Request]) -> None:
        self._all(requests)

    @rule(requests=st.lists(requests(), min_size=1, max_size=5))
    def a_few(self, requests: list[Request]) -> None:
        self._all(requests)

    def _all(self, requests: list[Request]) -> None:
        for request in requests:
            op = self._place(request)
            counted["operations"] += 1
            if op.length > 0:
                self._play(op)

    def _play(self, op: Op) -> None:
        image, io = self.image, self.io
        assert image is not None and io is not None
        where = f"{op.offset} {op.length}"
        if op.kind != "read":
            last = op.offset + op.length - 1
            self.touched.update(range(op.offset // self.shape.cluster, last // self.shape.cluster + 1))
        if op.kind == "write":
            image.pwrite(bytes([op.pattern]) * op.length, op.offset)
            io.do(f"write -P {op.pattern} {where}")
        elif op.kind == "noise":
            repeated = self.noise_bytes * (op.length // len(self.noise_bytes) + 1)
            image.pwrite(repeated[: op.length], op.offset)
            io.do(f"write -s {self.noise} {where}")
        elif op.kind in ("zero", "unmap"):
            image.zero(op.length, op.offset, unmap=op.kind == "unmap")
            io.do(f"write -z {'-u ' if op.kind == 'unmap' else ''}{where}")
        elif op.kind == "discard":
            image.discard(op.length, op.offset)
            io.do(f"discard {where}")
        elif op.kind == "flush":
            image.flush()
            io.do("flush")
        else:
            # Where it is of one byte qemu-io tells whether it reads the same.
            data = image.pread(op.length, op.offset)
            assert len(data) == op.length
            if data == data[:1] * op.length:
                assert "verification failed" not in io.ask(f"read -P {data[0]} {where}")

    @precondition(lambda self: not self.shape.data_file)
    @rule(where=st.integers(0, 4095), noise=st.booleans(), pattern=st.integers(1, 255))
    def write_compressed(self, where: int, noise: bool, pattern: int) -> None:
        image, io, cluster = self.image, self.io, self.shape.cluster
        assert image is not None and io is not None
        index = image.size * where // 4096 // cluster
        if index in self.touched or (index + 1) * cluster > image.size:
            return
        counted["operations"] += 1
        self.touched.add(index)
        source = f"-s {self.noise}" if noise else f"-P {pattern}"
        data = (self.noise_bytes * (cluster // 5000 + 1))[:cluster] if noise else bytes([pattern]) * cluster
        image.write_compressed(data, index * cluster)
        io.do(f"write -c {source} {index * cluster} {cluster}")

    # In version 2 qemu cannot hide what a base would show behind the old end, and says so too late to be heard.
    @precondition(lambda self: self.shape.version == 3 or not self.below)
    @rule(quarters=st.integers(1, 9), odd=st.integers(0, 5))
    def resize(self, quarters: int, odd: int) -> None:
        image, io = self.image, self.io
        assert image is not None and io is not None
        size = max(512, (self.shape.size * quarters // 4 // 512 + odd) * 512)
        counted["operations"] += 1
        old = image.size
        try:
            image.resize(size, shrink=True)
        except qcowlib.Error as error:
            assert error.message in io.ask(f"truncate {size}")
            return
        io.do(f"truncate {size}")
        if size > old:
            # What an earlier shrink cut off inside a cluster qemu shows again, we do not.
            edge = min(size, -(-old // self.shape.cluster) * self.shape.cluster)
            if edge > old:
                image.zero(edge - old, old)
                io.do(f"write -z {old} {edge - old}")
        # What an earlier, larger image left is not known to be unallocated.
        self.touched.update(range(-(-max(size, self.shape.size) * 10 // self.shape.cluster)))

    # -- snapshots -------------------------------------------------------------

    @precondition(lambda self: not self.shape.data_file and self.shape.refcount_bits >= 4)
    @rule(action=st.sampled_from(["create", "create", "apply", "delete"]), pick=st.integers(0, 100))
    def snapshot(self, action: str, pick: int) -> None:
        image = self.image
        assert image is not None and self.io is not None
        counted["operations"] += 1
        self.io.close()
        if action == "create" and len(self.names) < 5:
            name = f"s{counted['operations']}"
            image.create_snapshot(name)
            qemu_img("snapshot", "-c", name, self.sides[1])
            self.names.append(name)
        elif action != "create" and self.names:
            name = self.names[pick % len(self.names)]
            if action == "apply":
                image.apply_snapshot(name)
            else:
                image.delete_snapshot(name, by_id=False)
                self.names.remove(name)
            qemu_img("snapshot", "-a" if action == "apply" else "-d", name, self.sides[1])
            self.touched.update(range(1 << 16))
        self.io = QemuIo(self.sides[1], "-d", "unmap", "-t", "unsafe")

    # -- comparison ------------------------------------------------------------

    @rule(swap=st.booleans())
    def compare(self, swap: bool) -> None:
        """Close both, judge both files by both programs, and go on with either."""
        counted["comparisons"] += 1
        self._close()
        for side in self.sides:
            qemu_img("check", "-q", side)
            with qcowlib.open(side) as image:
                report = image.check()
                assert report.corruptions == report.leaks == report.check_errors == 0
                ours, theirs = our_map(image), qemu_map(side)
                assert ours == theirs, f"{set(ours) - set(theirs)} not {set(theirs) - set(ours)}"
        with qcowlib.open(self.sides[0]) as ours, qcowlib.open(self.sides[1]) as theirs:
            same(ours, theirs, "top")
        qemu_img("compare", "-q", "-f", "qcow2", "-F", "qcow2", *self.sides)
        for name in self.names:
            with (
                qcowlib.open(self.sides[0], snapshot=name) as ours,
                qcowlib.open(self.sides[1], snapshot=name) as theirs,
            ):
                same(ours, theirs, name)
        if swap:
            self.sides.reverse()
        self._open()

    def teardown(self) -> None:
        try:
            if self.image is not None and self.io is not None:
                self.compare(False)
                self._close()
        finally:
            if self.io is not None:
                self.io.kill()
            if self.image is not None:
                self.image.close()
            shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture
def report() -> Iterator[None]:
    yield
    print(", ".join(f"{value} {name}" for name, value in counted.items()))


def test_random_work_is_the_same_as_on_qemu_io(report: None) -> None:
    # A run is a few hundred requests; shrinking one takes minutes.
    phases = [Phase.explicit, Phase.reuse, Phase.generate] + [Phase.shrink] * (LONG > 1)
    run_state_machine_as_test(
        SameAsQemuIo, settings=settings(max_examples=90 * LONG, stateful_step_count=30, phases=phases)
    )
    assert counted["operations"] >= 10_000
