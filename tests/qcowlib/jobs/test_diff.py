# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Differences: true to the byte against a brute-force look; a stream or an overlay carries over all of it."""

from __future__ import annotations

import io
import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qcowlib
from qcowlib.jobs.diff import Change, diff, diff_overlay
from qcowlib.jobs.diff_stream import Applied, apply, read_diff, write_diff
from qcowlib.storage.memory import MemoryStorage
from qcowlib.testing.crash import CrashState, Finding, assert_crash_safe
from qcowlib.testing.recorder import OpLog
from tests.qcowlib.qemu import qemu_img

SIZE = 3 << 20


def scribble(path: Path, rng: random.Random, count: int, *, unit: int = 4096) -> None:
    with qcowlib.open(path, "r+") as image:
        for _ in range(count):
            offset = rng.randrange(image.size // unit) * unit
            length = min(rng.randrange(1, 40) * unit, image.size - offset)
            kind = rng.randrange(4)
            if kind == 0:
                image.zero(length, offset)
            elif kind == 1 and image.format == "qcow2":
                image.pwrite(bytes(length), offset)
            else:
                image.pwrite(rng.randbytes(length), offset)


def content(path: Path, snapshot: str | None = None) -> bytes:
    with qcowlib.open(path, snapshot=snapshot) as image:
        return image.pread(image.size, 0)


def brute(old: bytes, new: bytes, unit: int) -> set[int]:
    """The units of *new* that differ."""
    old = old[: len(new)].ljust(len(new), b"\0")
    return {at for at in range(0, len(new), unit) if old[at : at + unit] != new[at : at + unit]}


def units(changes: list[Change], unit: int) -> set[int]:
    return {at for start, length, _ in changes for at in range(start - start % unit, start + length, unit)}


def pair(folder: Path, seed: object, kind: str) -> tuple[Path, Path]:
    """Two images: a base and what stands on it, two alone, or of other sizes and formats."""
    rng = random.Random(str(seed))
    old, new = folder / f"old-{kind}", folder / f"new-{kind}"
    if kind == "raw":
        old.write_bytes(rng.randbytes(SIZE) if seed else bytes(SIZE))
        qcowlib.create(new, SIZE + 65536)
    elif kind == "chain":
        qcowlib.create(old, SIZE, cluster_size=rng.choice((4096, 65536)))
        scribble(old, rng, 12)
        qcowlib.create(new, SIZE, backing=old, backing_format="qcow2", extended_l2=rng.choice((True, False)))
    elif kind == "shrunk":
        qcowlib.create(old, SIZE)
        scribble(old, rng, 12)
        qcowlib.create(new, SIZE // 2 + 512)
    else:
        qcowlib.create(old, SIZE)
        scribble(old, rng, 12)
        qcowlib.convert(old, new, compress=True)
    scribble(new, rng, 8)
    return old, new


KINDS = ("raw", "chain", "shrunk", "copy")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_difference_is_that_of_the_bytes(tmp_path: Path, kind: str, seed: int) -> None:
    old, new = pair(tmp_path, seed, kind)
    for unit in (512, 4096, 65536):
        found = diff(old, new, unit=unit, old_format="raw" if kind == "raw" else None)
        assert units(found, unit) == brute(content(old), content(new), unit)
        data = content(new)
        for start, length, zero in found:
            assert not zero or not any(data[start : start + length])
        ends = [(start, start + length) for start, length, _ in found]
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))


@pytest.mark.parametrize("kind", KINDS)
def test_fast_difference_misses_nothing(tmp_path: Path, kind: str) -> None:
    old, new = pair(tmp_path, 1, kind)
    found = units(diff(old, new, exact=False, unit=512, old_format="raw" if kind == "raw" else None), 512)
    assert found >= brute(content(old), content(new), 512)


def test_result_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    rng = random.Random(3)
    for path in (old, new):
        qcowlib.create(path, 64 << 20)
        with qcowlib.open(path, "r+") as image:
            for _ in range(200):
                image.pwrite(rng.randbytes(70000), rng.randrange(900) << 16)
    assert diff(old, new, workers=1) == diff(old, new, workers=8)


def test_two_points_of_a_chain_cost_what_changed(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    qcowlib.create(old, 1 << 40)
    with qcowlib.open(old, "r+") as image:
        image.pwrite(b"x" * (8 << 20), 1 << 30)
    qcowlib.create(new, None, backing=old, backing_format="qcow2")
    with qcowlib.open(new, "r+") as image:
        image.pwrite(b"y" * 512, 1 << 30)
        image.pwrite(b"z", 1 << 39)
    told: list[tuple[int, int]] = []
    assert diff(old, new, progress=lambda done, total: told.append((done, total))) == [
        Change(1 << 30, 4096, False),
        Change(1 << 39, 4096, False),
    ]
    assert told[-1] == (1 << 40, 1 << 40)


def test_snapshots_of_one_image_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    qcowlib.create(path, SIZE)
    rng = random.Random(5)
    for name in ("a", "b"):
        scribble(path, rng, 6)
        with qcowlib.open(path, "r+") as image:
            image.create_snapshot(name)
    scribble(path, rng, 6)
    for old, new in (("a", "b"), ("b", "a"), ("a", None), ("b", None)):
        found = diff(None, path, old_snapshot=old, new_snapshot=new)
        assert units(found, 4096) == brute(content(path, old), content(path, new), 4096)
    assert diff(path, path) == []


def test_bitmap_tells_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    qcowlib.create(path, SIZE)
    with qcowlib.open(path, "r+") as image:
        image.add_bitmap("b", 65536)
        image.pwrite(b"x" * 100, 70000)
        image.zero(65536, 1 << 20)
    assert diff(None, path, bitmap="b") == [
        Change(65536, 4096, True),
        Change(69632, 4096, False),
        Change(73728, 57344, True),
        Change(1 << 20, 65536, True),
    ]
    with pytest.raises(qcowlib.UsageError):
        diff(None, path, bitmap="gone")


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    qcowlib.create(path, SIZE)
    for wrong in ({}, {"bitmap": "b", "old_snapshot": "a"}, {"old_snapshot": "a", "unit": 1000}):
        with pytest.raises(qcowlib.UsageError):
            diff(None, path, **wrong)  # type: ignore[arg-type]
    with pytest.raises(qcowlib.Cancelled):
        diff(*pair(tmp_path, 1, "copy"), cancel=lambda: True)


# -- streams ---------------------------------------------------------------------


def stream_of(old: Path, new: Path, **words: object) -> bytes:
    out = io.BytesIO()
    write_diff(old, new, out, **words)  # type: ignore[arg-type]
    return out.getvalue()


@pytest.mark.real("qemu-img")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exact", [True, False])
def test_stream_makes_the_new_side_of_the_old_one(tmp_path: Path, kind: str, exact: bool) -> None:
    old, new = pair(tmp_path, 7, kind)
    form = "raw" if kind == "raw" else None
    made = stream_of(old, new, exact=exact, old_format=form)
    told = read_diff(io.BytesIO(made))
    over = tmp_path / "over"
    apply(io.BytesIO(made), old, format=form or "qcow2", overlay=over)
    assert content(over) == content(new)
    target = tmp_path / "target"
    if kind == "chain":
        # The new side stands on the old one: what is applied to is a copy.
        qcowlib.convert(old, target)
    else:
        old.rename(target)
    assert apply(io.BytesIO(made), target, format=form) == told
    assert content(target) == content(new)
    if kind != "raw":
        qemu_img("check", target)


def test_stream_goes_through_a_pipe(tmp_path: Path) -> None:
    old, new = pair(tmp_path, 9, "copy")
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            with open(writer, "wb", buffering=0) as output:
                write_diff(old, new, output)
        finally:
            os._exit(0)
    os.close(writer)
    wanted = content(new)
    target = tmp_path / "target"
    qcowlib.convert(old, target)
    with open(reader, "rb", buffering=0) as stream:
        apply(stream, target)
    os.waitpid(pid, 0)
    assert content(target) == wanted


def test_stream_cut_off_anywhere_is_told_and_finished_by_the_whole_one(tmp_path: Path) -> None:
    old, new = pair(tmp_path, 11, "copy")
    made, wanted = stream_of(old, new), content(new)
    for cut in sorted({*range(0, 130, 13), *(len(made) * n // 7 for n in range(1, 7)), len(made) - 1}):
        target = tmp_path / "target"
        qcowlib.convert(old, target)
        with pytest.raises(qcowlib.CorruptImage, match=r"cut off|no stream"):
            apply(io.BytesIO(made[:cut]), target)
        apply(io.BytesIO(made), target)
        assert content(target) == wanted
        apply(io.BytesIO(made), target)
        assert content(target) == wanted


def test_stream_that_was_begun_is_ended_before_another(tmp_path: Path) -> None:
    old, new = pair(tmp_path, 21, "copy")
    made, wanted = stream_of(old, new), content(new)
    other = stream_of(new, old)
    with pytest.raises(qcowlib.CorruptImage):
        apply(io.BytesIO(made[:-40]), old)
    with pytest.raises(qcowlib.UsageError, match="another stream"):
        apply(io.BytesIO(other), old)
    # Half of a range was written when it was cut: neither old nor new.
    first = read_first(made)
    with qcowlib.open(old, "r+") as image:
        image.pwrite(b"torn" * 100, first)
    apply(io.BytesIO(made), old)
    assert content(old) == wanted and not Path(f"{old}.apply").exists()
    apply(io.BytesIO(other), old)


def read_first(made: bytes) -> int:
    """Return the guest offset of the first record."""
    return int.from_bytes(made[56:64], "big")


@pytest.mark.crash
@pytest.mark.parametrize("cluster_size", [4096, 65536])
def test_no_cut_keeps_a_stream_from_being_applied(tmp_path: Path, cluster_size: int) -> None:
    rng = random.Random(cluster_size)
    old, new = tmp_path / "old", tmp_path / "new"
    qcowlib.create(old, 1 << 20, cluster_size=cluster_size)
    scribble(old, rng, 4)
    qcowlib.convert(old, new, cluster_size=cluster_size)
    scribble(new, rng, 6)
    made, wanted = stream_of(old, new), content(new)
    storage, log = MemoryStorage(bytearray(old.read_bytes()), name="disk"), OpLog()
    with qcowlib.open(log.record(storage), "r+", format="qcow2") as image:
        apply(io.BytesIO(made), image)

    def judge(state: CrashState) -> list[Finding]:
        with qcowlib.open(MemoryStorage(bytearray(state.images[0])), "r+", format="qcow2") as image:
            # As the journal of a file would tell.
            apply(io.BytesIO(made), image, check=False)
            report = image.check()
            if image.pread(image.size, 0) != wanted or report.corruptions:
                return [Finding("LOST", str(report.findings[:2]))]
            return [Finding("LEAK", "")] if report.leaks else []

    assert assert_crash_safe(log, judge, random_states=6).distinct > 10


SMALL: dict[str, bytes] = {}


def small_stream() -> bytes:
    if not SMALL:
        old, new = MemoryStorage(bytes(65536), name="old"), MemoryStorage(b"a" * 9000 + bytes(56536), name="new")
        out = io.BytesIO()
        write_diff(old, new, out, old_format="raw", new_format="raw")
        SMALL["it"] = out.getvalue()
    return SMALL["it"]


@given(st.data())
def test_damaged_stream_is_refused(data: st.DataObject) -> None:
    made = bytearray(small_stream())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(made) - 1))
        made[at] ^= data.draw(st.integers(1, 255))
    if bytes(made) == small_stream():
        return
    with pytest.raises(qcowlib.CorruptImage):
        read_diff(io.BytesIO(bytes(made)))


@given(st.binary(max_size=400), st.booleans())
def test_any_bytes_are_a_stream_or_a_clear_error(data: bytes, begun: bool) -> None:
    try:
        read_diff(io.BytesIO((small_stream()[:48] if begun else b"") + data))
    except qcowlib.Error as error:
        assert str(error).isprintable()
    else:
        raise AssertionError("bytes from nowhere were taken")


def test_target_that_is_something_else_is_not_changed(tmp_path: Path) -> None:
    old, new = pair(tmp_path, 13, "copy")
    made = stream_of(old, new)
    other = tmp_path / "other"
    qcowlib.create(other, SIZE)
    scribble(other, random.Random(99), 200)
    before = content(other)
    with pytest.raises(qcowlib.CorruptImage, match="not what the stream began from"):
        apply(io.BytesIO(made), other)
    assert content(other) == before
    qcowlib.create(tmp_path / "small", 1 << 20)
    with pytest.raises(qcowlib.CorruptImage, match="begins from an image of"):
        apply(io.BytesIO(made), tmp_path / "small")
    apply(io.BytesIO(made), other, check=False)
    assert content(other) != before


def test_failed_overlay_leaves_nothing(tmp_path: Path) -> None:
    old, new = pair(tmp_path, 15, "copy")
    made, before = stream_of(old, new), old.read_bytes()
    with pytest.raises(qcowlib.CorruptImage):
        apply(io.BytesIO(made[:-5]), old, format="qcow2", overlay=tmp_path / "over")
    assert not (tmp_path / "over").exists() and old.read_bytes() == before


def test_empty_difference_is_a_stream_too(tmp_path: Path) -> None:
    old, _ = pair(tmp_path, 1, "copy")
    made = stream_of(old, old)
    assert read_diff(io.BytesIO(made)) == Applied(0, 0, 0) and len(made) == 48 + 40 + 32


# -- overlays --------------------------------------------------------------------


@pytest.mark.real("qemu-img")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compress", [False, True])
def test_overlay_over_the_old_side_shows_the_new_one(tmp_path: Path, kind: str, compress: bool) -> None:
    old, new = pair(tmp_path, 17, kind)
    form = "raw" if kind == "raw" else "qcow2"
    over = tmp_path / "over"
    stored = diff_overlay(old, new, over, backing=old, backing_format=form, old_format=form, compress=compress)
    assert content(over) == content(new)
    assert stored >= len(brute(content(old), content(new), 4096)) * 4096 - 4096
    qemu_img("check", over)
    assert "identical" in qemu_img("compare", over, new)


@settings(max_examples=20)
@given(st.integers(0, 10**6))
def test_any_history_is_carried_over(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    folder = tmp_path_factory.mktemp("history")
    rng = random.Random(seed)
    old, new = pair(folder, seed, rng.choice(("chain", "copy", "shrunk")))
    wanted = content(new)
    made = stream_of(old, new, unit=rng.choice((512, 4096, 1 << 20)), exact=rng.choice((True, False)))
    over = folder / "over"
    apply(io.BytesIO(made), old, format="qcow2", overlay=over)
    assert content(over) == wanted


@pytest.mark.real("qemu-img")
def test_commands_work_as_a_pipe(tmp_path: Path) -> None:
    old, new = pair(tmp_path, 19, "copy")
    target = tmp_path / "target"
    qcowlib.convert(old, target)
    script = 'set -e; "$1" -m qcowlib diff old-copy new-copy --stream - | "$1" -m qcowlib apply target -'
    done = subprocess.run(
        ["sh", "-c", script, "sh", sys.executable],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(qcowlib.__file__).parents[1])},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert "identical" in qemu_img("compare", target, new)
