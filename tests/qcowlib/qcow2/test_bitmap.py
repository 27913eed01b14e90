# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Persistent dirty bitmaps: random histories shared with qemu, its errors, damaged ones."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import qcowlib
from qcowlib import aio
from qcowlib.qcow2.create import CreateOptions, create
from qcowlib.storage.memory import MemoryStorage
from qcowlib.testing.reference import RefImage, reference_check
from tests.qcowlib.qcow2.ref_bitmaps import SECTOR, ref_bitmaps

SIZE = 1 << 20
OPTIONS = [
    "",
    "cluster_size=512",
    "cluster_size=4k,lazy_refcounts=on",
    "extended_l2=on,cluster_size=16k",
    "data_file=data,data_file_raw=on",
]


def qemu_img(*words: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True, text=True, cwd=cwd)
    return done.stdout


def qemu_ranges(path: Path, name: str) -> list[tuple[int, int]]:
    """What qemu says that a bitmap has recorded."""
    socket = path.parent / f"socket-{name}"
    words = ["qemu-nbd", "--fork", "-r", "-k", str(socket), "-B", name, "-f", "qcow2", path.name]
    subprocess.run(words, check=True, cwd=path.parent)
    tree = f"driver=nbd,server.type=unix,server.path={socket},x-dirty-bitmap=qemu:dirty-bitmap:{name}"
    found = json.loads(qemu_img("map", "--output=json", "--image-opts", tree))
    return joined([(part["start"], part["length"]) for part in found if not part["data"]])


def joined(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for start, length in ranges:
        if out and sum(out[-1]) == start:
            out[-1] = (out[-1][0], out[-1][1] + length)
        else:
            out.append((start, length))
    return out


class Expected:
    """What a bitmap must have recorded: numbers of bits."""

    def __init__(self, granularity: int, enabled: bool) -> None:
        self.granularity = granularity
        self.enabled = enabled
        self.bits: set[int] = set()

    def add(self, start: int, length: int) -> None:
        self.bits.update(range(start // self.granularity, (start + length - 1) // self.granularity + 1))

    def cut(self, size: int) -> None:
        self.bits = {bit for bit in self.bits if bit * self.granularity < size}

    def ranges(self, size: int) -> list[tuple[int, int]]:
        unit = self.granularity
        return joined([(bit * unit, min(unit, size - bit * unit)) for bit in sorted(self.bits)])


class History:
    """Random changes of one image, made here and by qemu in turn."""

    def __init__(self, path: Path, rng: random.Random) -> None:
        self.path = path
        self.rng = rng
        self.size = SIZE
        self.known: dict[str, Expected] = {}
        self.number = 0
        self.image = qcowlib.open(path, "r+")

    def changed(self, offset: int, length: int) -> None:
        for expected in self.known.values():
            if expected.enabled:
                expected.add(offset, length)

    def place(self) -> tuple[int, int]:
        offset = self.rng.randrange(self.size // SECTOR) * SECTOR
        return offset, min(self.rng.choice([512, 4096, 70000 // 512 * 512]), self.size - offset)

    def write(self) -> None:
        offset, length = self.place()
        kind = self.rng.choice(["write", "write", "zero"])
        if kind == "write":
            self.image.pwrite(self.rng.randbytes(length), offset)
        else:
            self.image.zero(length, offset)
        self.changed(offset, length)

    def qemu_write(self) -> None:
        offset, length = self.place()
        self.image.close()
        words = ["qemu-io", "-f", "qcow2", "-c", f"write {offset} {length}", self.path.name]
        subprocess.run(words, check=True, capture_output=True, cwd=self.path.parent)
        self.changed(offset, length)
        self.image = qcowlib.open(self.path, "r+")

    def reopen(self) -> None:
        self.image.close()
        self.image = qcowlib.open(self.path, "r+")

    def resize(self) -> None:
        new = self.rng.choice([SIZE // 2, SIZE, 3 * SIZE])
        self.image.resize(new, shrink=True)
        old, self.size = self.size, new
        for expected in self.known.values():
            expected.cut(new)
        if new > old:
            self.changed(old, new - old)

    def change(self, by_qemu: bool) -> None:
        """Some change of a bitmap."""
        rng, names = self.rng, list(self.known)
        verb = rng.choice(["add", "add", "remove", "clear", "enable", "disable", "merge"] if names else ["add"])
        name = rng.choice(names) if names else ""
        more: list[str] = []
        if verb == "add":
            if len(names) > 4:
                return
            self.number += 1
            name = f"b{self.number}"
            granularity = rng.choice([512, 4096, 65536, 1 << 20])
            enabled = rng.random() < 0.7
            self.known[name] = Expected(granularity, enabled)
            more = ["-g", str(granularity)] + ([] if enabled else ["--disable"])
        source = rng.choice(names) if names else ""
        if by_qemu:
            self.image.close()
            action = [f"--{verb}", source] if verb == "merge" else [f"--{verb}"]
            qemu_img("bitmap", *action, *more, self.path.name, name, cwd=self.path.parent)
            self.image = qcowlib.open(self.path, "r+")
        else:
            self.apply(verb, name, source)
        if verb == "remove":
            del self.known[name]
        elif verb == "clear":
            self.known[name].bits.clear()
        elif verb in ("enable", "disable"):
            self.known[name].enabled = verb == "enable"
        elif verb == "merge":
            for start, length in self.known[source].ranges(self.size):
                self.known[name].add(start, length)

    def apply(self, verb: str, name: str, source: str) -> None:
        image = self.image
        if verb == "add":
            expected = self.known[name]
            image.add_bitmap(name, expected.granularity, disabled=not expected.enabled)
        elif verb == "merge":
            image.merge_bitmap(name, source)
        else:
            getattr(image, f"{verb}_bitmap")(name)

    def compare(self) -> None:
        listed = {bitmap.name: bitmap for bitmap in self.image.bitmaps()}
        assert list(listed) == list(self.known)
        for name, expected in self.known.items():
            assert listed[name].enabled == expected.enabled
            assert not listed[name].inconsistent
            assert list(self.image.bitmap_extents(name)) == expected.ranges(self.size), name


@pytest.mark.real("qemu-img", "qemu-io", "qemu-nbd")
@pytest.mark.parametrize("options", OPTIONS)
def test_random_histories_record_the_same_here_and_in_qemu(
    tmp_path: Path, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = random.Random(options)
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", *(["-o", options] if options else []), path, str(SIZE), cwd=tmp_path)
    history = History(path, rng)
    for _ in range(60):
        step = rng.choice(["write"] * 4 + ["change"] * 3 + ["qemu-change", "qemu-write", "reopen", "resize"])
        if step == "change":
            history.change(False)
        elif step == "qemu-change":
            history.change(True)
        else:
            getattr(history, step.replace("-", "_"))()
        history.compare()
    history.image.close()
    assert "No errors" in qemu_img("check", path, cwd=tmp_path)
    for name, expected in history.known.items():
        assert qemu_ranges(path, name) == expected.ranges(history.size)


@pytest.mark.real("qemu-img")
def test_refusals_have_the_words_of_qemu(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    qemu_img("create", "-q", "-f", "qcow2", mine, "1M")
    qemu_img("bitmap", "--add", mine, "there")
    qemu_img("bitmap", "--add", mine, "broken")
    flag_in_use(mine, b"broken")
    shutil.copy(mine, theirs)
    other = tmp_path / "other"
    qemu_img("create", "-q", "-f", "qcow2", other, "2M")
    qemu_img("bitmap", "--add", other, "big")
    cases: list[tuple[list[str], Callable[[qcowlib.Image], None]]] = [
        (["--add", "there"], lambda image: image.add_bitmap("there")),
        (["--add", ""], lambda image: image.add_bitmap("")),
        (["--add", "-g", "1000", "x"], lambda image: image.add_bitmap("x", 1000)),
        (["--add", "-g", "256", "x"], lambda image: image.add_bitmap("x", 256)),
        (["--add", "-g", "4G", "x"], lambda image: image.add_bitmap("x", 4 << 30)),
        (["--remove", "x"], lambda image: image.remove_bitmap("x")),
        (["--clear", "x"], lambda image: image.clear_bitmap("x")),
        (["--clear", "broken"], lambda image: image.clear_bitmap("broken")),
        (["--enable", "broken"], lambda image: image.enable_bitmap("broken")),
        (["--disable", "broken"], lambda image: image.disable_bitmap("broken")),
        (["--merge", "x", "there"], lambda image: image.merge_bitmap("there", "x")),
        (["--merge", "there", "x"], lambda image: image.merge_bitmap("x", "there")),
        (["--merge", "broken", "there"], lambda image: image.merge_bitmap("there", "broken")),
        (["--merge", "there", "broken"], lambda image: image.merge_bitmap("broken", "there")),
        (
            ["--merge", "big", "-b", str(other), "-F", "qcow2", "there"],
            lambda image: image.merge_bitmap("there", "big", qcowlib.open(other)),
        ),
    ]
    for words, call in cases:
        *options, name = words
        done = subprocess.run(
            ["qemu-img", "bitmap", *options, str(theirs), name], capture_output=True, text=True, check=False
        )
        verb = options[0][2:]
        first, _, hint = done.stderr.rstrip("\n").partition("\n")
        with qcowlib.open(mine, "r+") as image, pytest.raises(qcowlib.UsageError) as caught:
            call(image)
        assert first == f"qemu-img: Operation {verb} on bitmap {name} failed: {caught.value.message}"
        assert hint == (caught.value.hint or "")
    with qcowlib.open(mine, "r+") as image:
        with pytest.raises(qcowlib.UsageError, match="'broken' is inconsistent"):
            image.resize(2 << 20)
        image.pwrite(b"x", 0)
        image.remove_bitmap("broken")
        image.resize(2 << 20)
    assert "No errors" in qemu_img("check", mine)


def flag_in_use(path: Path, name: bytes) -> None:
    """As after a crash of whoever had the image open."""
    data = bytearray(path.read_bytes())
    at = data.rindex(name) - 24
    data[at + 15] |= 1
    path.write_bytes(data)


def test_what_qemu_cannot_store_is_refused(tmp_path: Path) -> None:
    for options, name, text in (
        (CreateOptions(size=SIZE, version=2), "x", "Cannot store dirty bitmaps in qcow2 v2 files"),
        (CreateOptions(size=SIZE), "x" * 1024, "Name length exceeds maximum"),
        (CreateOptions(size=0), "x", "no bytes"),
    ):
        file = MemoryStorage()
        create(file, options)
        with qcowlib.open(file, "r+", format="qcow2") as image, pytest.raises(qcowlib.UsageError, match=text):
            image.add_bitmap(name)
    huge = MemoryStorage()
    create(huge, CreateOptions(size=1 << 50))
    with qcowlib.open(huge, "r+", format="qcow2") as image, pytest.raises(qcowlib.UsageError, match="Use larger"):
        image.add_bitmap("x", 512)


def test_the_default_granularity_follows_the_cluster_size() -> None:
    for cluster, expected in ((512, 4096), (8192, 8192), (65536, 65536), (2 << 20, 65536)):
        file = MemoryStorage()
        create(file, CreateOptions(size=SIZE, cluster_size=cluster))
        with qcowlib.open(file, "r+", format="qcow2") as image:
            image.add_bitmap("x")
            assert image.bitmaps()[0].granularity == expected


@pytest.mark.real("qemu-img", "qemu-nbd")
def test_bitmaps_are_copied_between_images(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, cluster in zip(paths, ("4k", "64k"), strict=True):
        qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", path, "40M")
    with qcowlib.open(paths[0], "r+") as source, qcowlib.open(paths[1], "r+") as target:
        source.add_bitmap("fine", 512)
        source.add_bitmap("off", 1 << 16)
        for offset in range(0, 40 << 20, 3 << 20):
            source.pwrite(b"x" * 5000, offset)
        source.disable_bitmap("off")
        source.add_bitmap("broken")
        source.close()
        flag_in_use(paths[0], b"broken")
        with qcowlib.open(paths[0]) as again:
            with pytest.raises(qcowlib.UsageError, match="Cannot copy inconsistent bitmap 'broken'"):
                target.copy_bitmaps(again)
            assert target.copy_bitmaps(again, skip_broken=True) == ["broken"]
            expected = {name: list(again.bitmap_extents(name)) for name in ("fine", "off")}
        assert [(b.name, b.enabled, b.granularity) for b in target.bitmaps()] == [
            ("fine", True, 512),
            ("off", False, 65536),
        ]
        assert {name: list(target.bitmap_extents(name)) for name in expected} == expected
    assert "No errors" in qemu_img("check", paths[1])
    assert qemu_ranges(paths[1], "fine") == expected["fine"]


def test_bits_merge_across_granularities_and_images() -> None:
    images = []
    for cluster in (512, 65536):
        file = MemoryStorage()
        create(file, CreateOptions(size=8 << 20, cluster_size=cluster))
        images.append(qcowlib.open(file, "r+", format="qcow2"))
    one, other = images
    one.add_bitmap("fine", 512)
    other.add_bitmap("coarse", 1 << 20, disabled=True)
    other.add_bitmap("same", 512, disabled=True)
    one.pwrite(b"x" * 1000, 3_000_000)
    other.merge_bitmap("coarse", "fine", one)
    other.merge_bitmap("same", "fine", one)
    assert list(other.bitmap_extents("coarse")) == [(2 << 20, 1 << 20)]
    assert list(other.bitmap_extents("same")) == list(one.bitmap_extents("fine"))
    one.close()
    other.close()


def test_whole_tables_of_ones_that_others_write_are_read() -> None:
    """qemu reads, but never writes, a table entry that stands for a page of ones."""
    file = MemoryStorage()
    create(file, CreateOptions(size=8 << 20, cluster_size=512))
    with qcowlib.open(file, "r+", format="qcow2") as image:
        image.add_bitmap("x", 512, disabled=True)
    entry = ref_bitmaps(RefImage(file))["x"]
    file.write(entry.table + 8, [(1).to_bytes(8, "big")])
    page = 512 * 8 * 512
    with qcowlib.open(file, "r+", format="qcow2") as image:
        assert list(image.bitmap_extents("x")) == [(page, page)]
        image.enable_bitmap("x")
        image.pwrite(b"x", page + 77)
        image.pwrite(b"x", page - 1)
    with qcowlib.open(file, format="qcow2") as image:
        assert list(image.bitmap_extents("x")) == [(page - 512, page + 512)]


def test_a_damaged_table_is_an_error_not_an_answer() -> None:
    for value in (3 << 9 | 1, 1 << 60, 5 << 40, 0x201):
        file = MemoryStorage()
        create(file, CreateOptions(size=8 << 20, cluster_size=512))
        with qcowlib.open(file, "r+", format="qcow2") as image:
            image.add_bitmap("x", 512)
        file.write(ref_bitmaps(RefImage(file))["x"].table, [value.to_bytes(8, "big")])
        with qcowlib.open(file, "r+", format="qcow2") as image:
            with pytest.raises(qcowlib.CorruptImage, match="Could not read bitmap_table"):
                list(image.bitmap_extents("x"))
            image.remove_bitmap("x")
            image.pwrite(b"x", 0)
        assert not reference_check(RefImage(file)).corruptions


def test_a_session_that_ends_without_close_leaves_the_enabled_bitmap_in_use() -> None:
    file = MemoryStorage()
    create(file, CreateOptions(size=SIZE))
    with qcowlib.open(file, "r+", format="qcow2") as image:
        image.add_bitmap("on")
        image.add_bitmap("off", disabled=True)
    image = qcowlib.open(file, "r+", format="qcow2")
    assert not any(bitmap.in_use for bitmap in ref_bitmaps(RefImage(file)).values())
    image.pwrite(b"x", 0)
    now = ref_bitmaps(RefImage(file))
    assert now["on"].in_use
    assert not now["off"].in_use
    image.close()
    assert not any(bitmap.in_use for bitmap in ref_bitmaps(RefImage(file)).values())


def test_bitmaps_on_a_loop() -> None:
    async def run() -> None:
        files = [MemoryStorage(), MemoryStorage()]
        for file in files:
            create(file, CreateOptions(size=8 << 20))
        async with await aio.open(files[0], "r+", format="qcow2") as one:
            await one.add_bitmap("a", 4096)
            await asyncio.gather(*(one.pwrite(b"x" * 100, number << 20) for number in range(8)))
            expected = [(number << 20, 4096) for number in range(8)]
            assert [pair async for pair in one.bitmap_extents("a")] == expected
            async with await aio.open(files[1], "r+", format="qcow2") as other:
                assert await other.copy_bitmaps(one) == []
                await other.add_bitmap("b", 512)
                await other.merge_bitmap("b", "a", one)
                await other.disable_bitmap("a")
                await other.pwrite(b"x", 9000)
                assert [pair async for pair in other.bitmap_extents("a")] == expected
                assert [pair async for pair in other.bitmap_extents("b")] == [(0, 4096), (8704, 512), *expected[1:]]
                await other.clear_bitmap("b")
                await other.remove_bitmap("a")
                await other.enable_bitmap("b")
                assert [bitmap.name for bitmap in await other.bitmaps()] == ["b"]

    asyncio.run(run())
