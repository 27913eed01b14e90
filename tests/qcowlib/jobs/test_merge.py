# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Merge: the same guest bytes before and after, the plan to the cluster, any cut and kill taken up again."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qcowlib
from qcowlib.jobs.merge import merge, plan_merge
from qcowlib.jobs.merge_copy import copy_layers
from qcowlib.jobs.pipeline import Control
from qcowlib.luks import LuksHeader
from qcowlib.storage.linear import LinearStorage, Segment
from qcowlib.storage.memory import MemoryStorage
from qcowlib.testing.crash import CrashState, Finding, assert_crash_safe
from qcowlib.testing.recorder import OpLog
from tests.conftest import LONG
from tests.qcowlib.jobs.samples import qemu_img

KiB, MiB = 1 << 10, 1 << 20
OPTIONS: list[dict[str, Any]] = [
    {},
    {"cluster_size": 512},
    {"cluster_size": 4096, "extended_l2": False},
    {"cluster_size": 16384, "extended_l2": True},
    {"cluster_size": 65536, "extended_l2": True, "refcount_bits": 1},
    {"compat": "0.10", "cluster_size": 4096},
    {"cluster_size": 4096, "lazy_refcounts": True, "preallocation": "metadata"},
]


def content(path: Path | str, format: str = "qcow2") -> bytes:
    with qcowlib.open(path, format=format) as image:
        return image.pread(image.size, 0)


def fill(rng: random.Random, path: Path, format: str) -> None:
    with qcowlib.open(path, "r+", format=format) as image:
        size, cluster = image.size, image.cluster_size or 4096
        for _ in range(rng.randrange(8)):
            offset = rng.randrange(size) // 512 * 512
            length = min(size - offset, rng.choice([512, 4096, 65536, 200 * KiB]))
            kind = rng.random()
            if kind < 0.6:
                image.pwrite(rng.randbytes(64) * (length // 64), offset)
            elif kind < 0.8:
                image.zero(length, offset)
            elif format == "qcow2":
                offset = offset // cluster * cluster
                found = image.map(offset, min(cluster, size - offset))
                if all(run[0] == 0 for run in found) and offset + cluster <= size:
                    image.write_compressed(bytes([rng.randrange(256)]) * cluster, offset)


def make_chain(rng: random.Random, folder: Path, base_format: str, depth: int) -> list[tuple[Path, str]]:
    """A chain with layers of different sizes and options, the base first."""
    sizes = [MiB, MiB + 512, 3 * MiB // 2, 2 * MiB]
    layers = [(folder / "layer0", base_format)]
    options = rng.choice(OPTIONS)
    qcowlib.create(layers[0][0], rng.choice(sizes), format=base_format, **(options if base_format == "qcow2" else {}))
    fill(rng, *layers[0])
    for number in range(1, depth):
        if layers[-1][1] == "qcow2" and rng.random() < 0.4:
            with qcowlib.open(layers[-1][0], "r+") as image:
                if not options.get("refcount_bits"):
                    image.create_snapshot("s")
                    image.pwrite(b"after" * 100, 0)
        path = folder / f"layer{number}"
        options = {key: value for key, value in rng.choice(OPTIONS).items() if key != "preallocation"}
        below, format = layers[-1]
        qcowlib.create(path, rng.choice(sizes), backing=below.name, backing_format=format, **options)
        layers.append((path, "qcow2"))
        with qcowlib.open(path, "r+") as image:
            if options.get("compat") != "0.10" and rng.random() < 0.6:
                image.add_bitmap(rng.choice("ab"), rng.choice([4096, 65536]), disabled=rng.random() < 0.2)
        fill(rng, path, "qcow2")
    return layers


def has_old_snapshots(layers: list[tuple[Path, str]], low: int) -> bool:
    with qcowlib.open(layers[low][0], format=layers[low][1]) as image:
        return bool(image.snapshots()) and image.layers[0].header.version == 2  # type: ignore[union-attr]


@pytest.mark.real("qemu-img")
@settings(max_examples=30 * LONG, deadline=None)
@given(seed=st.integers(0, 2**32), depth=st.integers(2, 5), base=st.sampled_from(["raw", "qcow2"]), into=st.booleans())
def test_plan_is_what_the_merge_leaves(
    tmp_path_factory: pytest.TempPathFactory, seed: int, depth: int, base: str, into: bool
) -> None:
    rng = random.Random(seed)
    folder = tmp_path_factory.mktemp("merge")
    layers = make_chain(rng, folder, base, depth)
    high = rng.randrange(1, depth)
    low = rng.randrange(high)
    if into and has_old_snapshots(layers, low):
        low = high - 1
    upper = [content(path, format) for path, format in layers[high:]]
    lower = [content(path, format) for path, format in layers[:low]]
    options: dict[str, Any] = {"lowest": layers[low][0], "highest": layers[high][0]}
    if not into:
        chosen = rng.choice(OPTIONS if low == 0 else OPTIONS[:-1])
        options.update(target=folder / "new", **chosen)
        options["target_format"] = "qcow2"
    try:
        plan = plan_merge(layers[-1][0], **options)
    except qcowlib.UsageError as error:
        assert "v2 image which has snapshots" in str(error)
        return
    before = {path: path.read_bytes() for path, _ in layers}
    merge(layers[-1][0], **options, workers=rng.choice([1, 3]))
    result = layers[low][0] if into else folder / "new"
    format = layers[low][1] if into else "qcow2"
    assert result.stat().st_size == plan.file_size
    with qcowlib.open(result, format=format) as image:
        if format == "qcow2":
            report = image.check()
            assert (report.corruptions, report.leaks) == (0, 0)
            assert report.image_end_offset == plan.required <= plan.peak
        assert tuple((one.name, one.granularity) for one in image.bitmaps()) == plan.bitmaps
        assert image.pread(image.size, 0)[: len(upper[0])] == upper[0]
    assert [content(path, format) for path, format in layers[:low]] == lower
    for (path, _), old in zip(layers[high + 1 :], upper[1:], strict=True):
        assert content(path) == old
    if format == "qcow2":
        qemu_img("check", result)
    if high + 1 < depth:
        above = layers[high + 1][0]
        with qcowlib.open(above) as image:
            assert result.samefile(image.layers[1].storage.name)
        assert plan.above == str(above)
    for path, _ in layers[low + into : high + 1]:
        assert path.read_bytes() == before[path]
    assert plan.data == sum(one.data for one in plan.sources)
    assert not (folder / f"{result.name}.merge").exists()
    shutil.rmtree(folder)


def three_layers(rng: random.Random) -> dict[str, MemoryStorage]:
    """A small chain in memory: top (larger), middle (shorter than both), base with a snapshot."""
    storages = {name: MemoryStorage(name=name) for name in ("base", "middle", "top")}
    policy = Memory(storages)
    for name, below, size in (("base", None, 20 * KiB), ("middle", "base", 12 * KiB), ("top", "middle", 24 * KiB)):
        kind = {} if below is None else {"backing": below, "backing_format": "qcow2", "check_backing": False}
        qcowlib.create(storages[name], size, cluster_size=512, **kind)  # type: ignore[arg-type]
        with qcowlib.open(storages[name], "r+", format="qcow2", references=policy) as image:
            for _ in range(3):
                offset = rng.randrange(size - 3072) // 256 * 256
                image.pwrite(rng.randbytes(2048), offset)
            image.zero(1024, rng.randrange(size - 1024) // 512 * 512)
            if name == "base":
                image.create_snapshot("kept")
            else:
                image.add_bitmap("b", 512)
                image.pwrite(rng.randbytes(512), 4096)
    return storages


class Memory:
    """A policy that opens storages by name."""

    def __init__(self, storages: dict[str, MemoryStorage]) -> None:
        self.storages = storages

    def open(self, kind: str, name: str, owner: str, *, writable: bool, cache: str) -> Any:
        return self.storages[name]


@pytest.mark.crash
@pytest.mark.parametrize("seed", range(2 * LONG))
def test_no_cut_loses_what_any_upper_layer_shows(seed: int) -> None:
    rng = random.Random(seed)
    storages = three_layers(rng)
    policy = Memory(storages)
    log = OpLog()
    with qcowlib.open(storages["top"], format="qcow2", references=policy) as source:
        expected = source.pread(source.size, 0)
        end = source.layers[2].size
        recorded = log.record(storages["base"])
        with qcowlib.open(recorded, "r+", format="qcow2") as target:
            copy_layers(source, 2, target, Control(workers=1), end=end)
    assert storages["base"].getvalue()[:4] == b"QFI\xfb"

    def judge(state: CrashState) -> list[Finding]:
        base = MemoryStorage(bytearray(state.images[0]), name="base")
        chain = Memory({**storages, "base": base})
        with qcowlib.open(storages["top"], format="qcow2", references=chain) as image:
            if image.pread(image.size, 0) != expected:
                return [Finding("LOST", "the top shows something else")]
        with (
            qcowlib.open(storages["top"], format="qcow2", references=chain) as image,
            qcowlib.open(base, "r+", format="qcow2") as target,
        ):
            copy_layers(image, 2, target, Control(workers=1), end=end)
            if target.pread(target.size, 0) != expected or target.check().corruptions:
                return [Finding("LOST", "taken up again it ends in something else")]
        return []

    assert assert_crash_safe(log, judge, random_states=4).distinct > 50


#: Merges, and tells of each step that is durable.
CHILD = """
import sys
from qcowlib.jobs import journal, merge_plan
import qcowlib.jobs.merge as job
write, remove = journal.write_journal, job._remove
merge_plan._STEP = 65536
def told(path, content):
    write(path, content)
    print("step", flush=True)
def told_remove(*words):
    remove(*words)
    print("step", flush=True)
job.write_journal, job._remove = told, told_remove
job.merge(sys.argv[1], lowest=sys.argv[2], highest=sys.argv[3], delete=True, target=sys.argv[4] or None,
    rate=30_000_000, workers=1)
print("end", flush=True)
"""


@pytest.mark.crash
@pytest.mark.real("qemu-img")
@pytest.mark.parametrize("into", [True, False])
@pytest.mark.parametrize("steps", [0, 1, 2, 5, 9, 16, 17, 18, 19])
def test_killed_at_any_step_it_goes_on(tmp_path: Path, steps: int, into: bool) -> None:
    rng = random.Random(steps)
    names = [tmp_path / name for name in ("base", "low", "middle", "high", "top")]
    for number, path in enumerate(names):
        below = {"backing": names[number - 1].name, "backing_format": "qcow2"} if number else {}
        qcowlib.create(path, MiB, cluster_size=4096, **below)  # type: ignore[arg-type]
        with qcowlib.open(path, "r+") as image:
            for _ in range(6):
                image.pwrite(rng.randbytes(20000), rng.randrange(MiB - 20000))
    shown = content(names[4])
    target = str(tmp_path / "new") if not into else ""
    words = [sys.executable, "-c", CHILD, *map(str, (names[4], names[1], names[3])), target]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        for _ in range(steps):
            child.stdout.readline()
        child.send_signal(signal.SIGKILL)
    result = names[1] if into else tmp_path / "new"
    assert content(names[4]) == shown
    if Path(f"{result}.merge").exists() or steps == 0:
        merge(names[4], lowest=names[1], highest=names[3], delete=True, target=target or None)
    assert content(names[4]) == shown
    with qcowlib.open(names[4]) as image:
        assert [Path(layer.storage.name).name for layer in image.layers] == ["top", result.name, "base"]
    qemu_img("check", names[4])
    assert qemu_img("check", result, check=False).returncode in (0, 3)
    assert not names[2].exists()
    assert not names[3].exists()
    assert names[1].exists() == into
    assert not Path(f"{result}.merge").exists()


def test_nothing_is_changed_where_it_cannot_be_done(tmp_path: Path) -> None:
    qcowlib.create(tmp_path / "a", MiB)
    qcowlib.create(tmp_path / "b", MiB, backing="a", backing_format="qcow2")
    before = [(tmp_path / name).read_bytes() for name in "ab"]
    for options, text in [
        ({"lowest": tmp_path / "b"}, "at least two layers"),
        ({"lowest": tmp_path / "c"}, "not in the chain"),
        ({"target": tmp_path / "a"}, "one of the chain"),
        ({"cluster_size": 4096}, "need a target"),
    ]:
        with pytest.raises(qcowlib.UsageError, match=text):
            merge(tmp_path / "b", **options)  # type: ignore[arg-type]
    (tmp_path / "a.merge").write_text(json.dumps({"journal": 1}))
    with pytest.raises(qcowlib.FormatError, match="no journal of a merge"):
        merge(tmp_path / "b")
    (tmp_path / "a.merge").unlink()
    with qcowlib.open(tmp_path / "b", "r+"), pytest.raises(qcowlib.Busy):
        merge(tmp_path / "b")
    with pytest.raises(qcowlib.Cancelled):
        merge(tmp_path / "b", cancel=lambda: True) if fill_one(tmp_path / "b") else None
    assert before[0] == (tmp_path / "a").read_bytes()
    assert (tmp_path / "a.merge").exists()
    merge(tmp_path / "b", delete=True)
    assert content(tmp_path / "a")[:5] == b"hello"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def fill_one(path: Path) -> bool:
    with qcowlib.open(path, "r+") as image:
        image.pwrite(b"hello", 0)
    return True


@pytest.mark.real("qemu-img")
def test_layers_on_a_device_take_what_the_plan_says(tmp_path: Path) -> None:
    """A base on segments of fixed size, as of a logical volume."""
    rng = random.Random(7)
    qcowlib.create(tmp_path / "base", MiB, cluster_size=4096)
    for number, name in enumerate(("one", "two"), 1):
        below = "base" if number == 1 else "one"
        qcowlib.create(
            tmp_path / name, MiB, backing=below, backing_format="qcow2", cluster_size=4096, check_backing=False
        )
    device = MemoryStorage(2 * MiB, growable=False)
    device.write(0, [(tmp_path / "base").read_bytes()])
    halves = [Segment(device, 0, MiB), Segment(device, MiB, MiB)]
    policy = Device(LinearStorage(halves, name="base"))
    for name in ("one", "two"):
        with qcowlib.open(tmp_path / name, "r+", references=policy) as image:
            image.pwrite(rng.randbytes(300000), 4096 * rng.randrange(100))
    with qcowlib.open(tmp_path / "two", references=policy) as image:
        shown = image.pread(MiB, 0)
    plan = plan_merge(tmp_path / "two", references=policy)
    merge(tmp_path / "two", references=policy)
    with qcowlib.open(policy.storage, format="qcow2") as image:
        assert image.check().image_end_offset == plan.required
        assert image.pread(MiB, 0) == shown
    assert plan.file_size == 2 * MiB
    assert not any(device.getvalue()[plan.peak :])


class Device:
    """A policy that finds the base on one storage."""

    def __init__(self, storage: LinearStorage) -> None:
        self.storage = storage

    def open(self, kind: str, name: str, owner: str, *, writable: bool, cache: str) -> Any:
        return (
            self.storage
            if name == "base"
            else qcowlib.qemu_like.open("backing", name, owner, writable=writable, cache="writeback")
        )


def test_plan_changes_no_byte_of_an_external_data_file(tmp_path: Path) -> None:
    base, top, data = tmp_path / "base", tmp_path / "top", tmp_path / "data"
    qcowlib.create(base, 4 << 20, data_file=str(data), data_file_raw=True)
    with qcowlib.open(base, "r+") as image:
        image.pwrite(b"base" * 100_000, 0)
    qcowlib.create(top, None, backing=base, backing_format="qcow2")
    with qcowlib.open(top, "r+") as image:
        image.pwrite(b"top!" * 50_000, 65536)
        wanted = image.pread(image.size, 0)
    before = [path.read_bytes() for path in (base, top, data)]
    qcowlib.plan_merge(top)
    assert [path.read_bytes() for path in (base, top, data)] == before
    qcowlib.merge(top)
    with qcowlib.open(base) as image:
        assert image.pread(image.size, 0) == wanted
    with pytest.raises(qcowlib.UsageError, match="one file"):
        qcowlib.plan_merge(top, target=tmp_path / "new", data_file=str(tmp_path / "new-data"))
    assert not (tmp_path / "new-data").exists()


def test_a_luks_file_is_read_and_not_merged_into(tmp_path: Path) -> None:
    base, names = tmp_path / "base", ["one", "two"]
    area = LuksHeader.create("key", cipher_alg="aes-128", iter_time=0, host_sectors=False)[0]
    base.write_bytes(area + bytes(256 << 10))
    for below, name in zip(["base", "one"], names, strict=True):
        form = "luks" if below == "base" else "qcow2"
        qcowlib.create(tmp_path / name, 256 << 10, backing=tmp_path / below, backing_format=form, check_backing=False)
    top, before = tmp_path / "two", base.read_bytes()
    secret = [None, None, "key"]
    with qcowlib.open(top, "r+", secret=secret) as image:
        image.pwrite(b"top" * 1000, 70000)
        expected = image.pread(image.size, 0)
    for call in (merge, plan_merge):
        with pytest.raises(qcowlib.UnsupportedFeature, match="not merged into a LUKS file; make a new image"):
            call(top, secret=secret)  # type: ignore[operator]
    assert base.read_bytes() == before
    merge(top, target=tmp_path / "new", secret=secret)
    assert qcowlib.open(tmp_path / "new").pread(256 << 10, 0) == expected
    merge(top, lowest=tmp_path / "one", secret=secret)
    with qcowlib.open(tmp_path / "one", secret=[None, "key"]) as image:
        assert image.pread(image.size, 0) == expected
    assert base.read_bytes() == before
