# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Changing creation options: what qemu-img makes of the same image, its refusals, and cuts."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest

import qcowlib
from qcowlib import aio
from qcowlib.errors import SecretError
from qcowlib.luks import KeyChange, LuksHeader
from qcowlib.qcow2.amend import AmendOptions
from qcowlib.qcow2.create import CreateOptions, Encryption, create
from qcowlib.storage.memory import MemoryStorage
from qcowlib.testing.crash import CrashState, Finding, assert_crash_safe
from qcowlib.testing.recorder import OpLog
from qcowlib.testing.reference import ReferenceError, RefImage, reference_check, reference_read

SIZE = 1 << 20


def qemu_img(*words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["qemu-img", *map(str, words)], check=check, capture_output=True, text=True)


def make(path: Path, rng: random.Random, options: str, *, backing: bool, snapshots: bool) -> None:
    """An image with data, zero clusters of both kinds, and snapshots that share tables."""
    words: list[str | Path] = ["create", "-q", "-f", "qcow2"]
    words += ["-o", options] if options else []
    if backing:
        (path.parent / "base").write_bytes(rng.randbytes(SIZE))
        words += ["-b", "base", "-F", "raw"]
    qemu_img(*words, path, str(SIZE))
    with qcowlib.open(path, "r+") as image:
        for number in range(30):
            offset = rng.randrange(SIZE // 512) * 512
            length = min(rng.choice([512, 5000, 70000]), SIZE - offset)
            kind = rng.choice(["write", "write", "zero", "keep", "discard"])
            if kind == "write":
                image.pwrite(rng.randbytes(length), offset)
            elif kind == "discard":
                image.discard(length, offset)
            else:
                image.zero(length, offset, unmap=kind == "zero")
            if snapshots and number in (10, 15, 22):
                image.create_snapshot(f"s{number}")


def contents(path: Path) -> dict[str, bytes]:
    """What the guest sees, and what each snapshot shows."""
    with qcowlib.open(path) as image:
        found = {"": image.pread(SIZE * 4, 0)}
        names = [entry.name for entry in image.snapshots()]
    for name in names:
        with qcowlib.open(path, snapshot=name) as image:
            found[name] = image.pread(SIZE * 4, 0)
    return found


def facts(path: Path) -> object:
    tree = json.loads(qemu_img("info", "--output=json", path).stdout)
    return tree["format-specific"]["data"], tree["virtual-size"], tree.get("snapshots")


CHANGES = [
    ("refcount_bits=64", AmendOptions(refcount_bits=64)),
    ("refcount_bits=8", AmendOptions(refcount_bits=8)),
    ("refcount_bits=4", AmendOptions(refcount_bits=4)),
    ("lazy_refcounts=on", AmendOptions(lazy_refcounts=True)),
    ("lazy_refcounts=off", AmendOptions(lazy_refcounts=False)),
    ("compat=0.10,refcount_bits=16", AmendOptions(compat="0.10", refcount_bits=16)),
    ("compat=1.1", AmendOptions(compat="1.1")),
    ("compat=1.1,refcount_bits=32,lazy_refcounts=on", AmendOptions("1.1", refcount_bits=32, lazy_refcounts=True)),
]


@pytest.mark.real("qemu-img")
@pytest.mark.parametrize("shape", ["plain", "backing", "snapshots", "both"])
@pytest.mark.parametrize("options", ["", "cluster_size=512", "cluster_size=4k,lazy_refcounts=on"])
def test_a_row_of_changes_gives_what_qemu_gives(tmp_path: Path, options: str, shape: str) -> None:
    rng = random.Random(options + shape)
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    make(mine, rng, options, backing=shape in ("backing", "both"), snapshots=shape in ("snapshots", "both"))
    shutil.copy(mine, theirs)
    before = contents(mine)
    for words, changed in [*CHANGES, *rng.sample(CHANGES, len(CHANGES))]:
        theirs_done = qemu_img("amend", "-o", words, theirs, check=False)
        with qcowlib.open(mine, "r+") as image:
            if theirs_done.returncode:
                with pytest.raises(qcowlib.UsageError) as caught:
                    image.amend(changed)
                text = f"qemu-img: {caught.value.message}"
                # Which cluster is found first depends on where each tool put its tables.
                assert text.split("Cluster at")[0] == theirs_done.stderr.split("Cluster at")[0].rstrip("\n"), words
            else:
                image.amend(changed)
                assert image.pread(SIZE, 0) == before[""]
                image.pwrite(before[""][5000:9000], 5000)
        assert facts(mine) == facts(theirs), words
        assert contents(mine) == before, words
        assert "No errors" in qemu_img("check", mine).stdout, words
    if shape in ("plain", "snapshots"):
        assert qemu_img("compare", mine, theirs).returncode == 0


@pytest.mark.real("qemu-img")
def test_refusals_have_the_words_of_qemu(tmp_path: Path) -> None:
    images = {
        "v3": ["-o", "compat=1.1"],
        "v2": ["-o", "compat=0.10"],
        "data": ["-o", f"data_file={tmp_path / 'd'}"],
        "extended": ["-o", "extended_l2=on"],
        "zstd": ["-o", "compression_type=zstd"],
        "over": ["-b", "v3", "-F", "qcow2"],
    }
    for name, words in images.items():
        qemu_img("create", "-q", "-f", "qcow2", *words, tmp_path / name, *(["1M"] if name != "over" else []))
    with qcowlib.open(tmp_path / "zstd", "r+") as image:
        image.write_compressed(b"a" * 65536, 0)
    with qcowlib.open(tmp_path / "over", "r+") as image:
        image.create_snapshot("s")
        image.resize(2 << 20)
    cases = [
        ("v3", "compat=2.0", AmendOptions(compat="2.0")),
        ("v3", "refcount_bits=3", AmendOptions(refcount_bits=3)),
        ("v3", "refcount_bits=128", AmendOptions(refcount_bits=128)),
        ("v2", "refcount_bits=8", AmendOptions(refcount_bits=8)),
        ("v2", "lazy_refcounts=on", AmendOptions(lazy_refcounts=True)),
        ("v3", "data_file=x", AmendOptions(data_file="x")),
        ("v3", "data_file_raw=on", AmendOptions(data_file_raw=True)),
        ("data", "data_file_raw=on", AmendOptions(data_file_raw=True)),
        ("data", "compat=0.10", AmendOptions(compat="0.10")),
        ("extended", "compat=0.10", AmendOptions(compat="0.10")),
        ("zstd", "compat=0.10", AmendOptions(compat="0.10")),
        ("v3", "compat=0.10,refcount_bits=8", AmendOptions(compat="0.10", refcount_bits=8)),
        ("v3", "backing_file=foo", AmendOptions(backing_file="foo")),
        ("v3", "backing_file=", AmendOptions(backing_file="")),
        ("over", "backing_file=v3", AmendOptions(backing_file="v3")),
        ("over", "backing_fmt=qcow2", AmendOptions(backing_format="qcow2")),
        ("over", "compat=0.10", AmendOptions(compat="0.10")),
        ("v3", "encrypt.iter-time=10", AmendOptions(encrypt=KeyChange(iter_time=10))),
        ("v3", "size=1000", AmendOptions(size=1000)),
    ]
    for name, words, options in cases:
        path = tmp_path / name
        before = path.read_bytes()
        done = qemu_img("amend", "-o", words, path, check=False)
        path.write_bytes(before)
        with qcowlib.open(path, "r+") as image, pytest.raises(qcowlib.UsageError) as caught:
            image.amend(options)
        shown = f"qemu-img: {caught.value.message}\n" + (f"{caught.value.hint}\n" if caught.value.hint else "")
        assert shown == done.stderr, (name, words)
        assert path.read_bytes() == before
    with qcowlib.open(tmp_path / "over", "r+") as image:
        image.amend(AmendOptions(backing_file="v3", backing_format="qcow2"))


@pytest.mark.real("qemu-img")
def test_progress_has_the_numbers_of_qemu(tmp_path: Path) -> None:
    for options, changes in (
        ("compat=0.10", ["compat=1.1,refcount_bits=64", "refcount_bits=8", "compat=0.10,refcount_bits=16"]),
        ("cluster_size=512", ["refcount_bits=64", "refcount_bits=1", "refcount_bits=16,compat=0.10", "compat=1.1"]),
    ):
        mine, theirs = tmp_path / "mine", tmp_path / "theirs"
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, mine, "1M")
        shutil.copy(mine, theirs)
        for words in changes:
            shown = qemu_img("amend", "-p", "-o", words, theirs).stdout
            expected = [float(part.split("/")[0]) for part in shown.replace("\r", "").split("(")[1:]]
            given = dict(word.split("=") for word in words.split(","))
            bits = given.get("refcount_bits")
            seen: list[float] = [0.0]

            def progress(done: int, total: int, seen: list[float] = seen) -> None:
                # The printer leaves out steps below one per cent.
                now = 100 * done / total
                if now - seen[-1] >= 1 or now < seen[-1] or now in (0, 100):
                    seen.append(now)

            with qcowlib.open(mine, "r+") as image:
                image.amend(AmendOptions(given.get("compat"), refcount_bits=bits and int(bits)), progress)  # type: ignore[arg-type]
            assert sorted({round(value) for value in seen}) == sorted({round(value) for value in expected}), words


def test_size_flags_and_the_data_file_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    qcowlib.create("disk", SIZE, data_file="data", data_file_raw=True)
    with qcowlib.open("disk", "r+") as image:
        image.pwrite(b"x" * 100, 0)
        image.amend(AmendOptions(size=2 * SIZE, data_file_raw=False, data_file="other"))
        assert image.size == 2 * SIZE
    Path("data").rename("other")
    with qcowlib.open("disk") as image:
        assert image.pread(100, 0) == b"x" * 100
        header = image.layers[0].header  # type: ignore[union-attr]
        assert (header.data_file_name, header.data_file_raw) == (b"other", False)
    qcowlib.create("plain", SIZE)
    with qcowlib.open("plain", "r+") as image:
        image.amend(AmendOptions(size=SIZE // 2))
        assert image.size == SIZE // 2
    qcowlib.create("raw", SIZE, format="raw")
    with (
        qcowlib.open("raw", "r+", format="raw") as image,
        pytest.raises(qcowlib.UnsupportedFeature, match="does not support option amendment"),
    ):
        image.amend(AmendOptions(size=SIZE))


def test_a_version_2_image_loses_its_bitmaps_cleanly() -> None:
    file = MemoryStorage()
    create(file, CreateOptions(size=SIZE))
    with qcowlib.open(file, "r+", format="qcow2") as image:
        image.add_bitmap("b")
        image.pwrite(b"x", 0)
        image.amend(AmendOptions(compat="0.10"))
        assert image.bitmaps() == []
        image.pwrite(b"y", 1)
    result = reference_check(RefImage(file))
    assert (result.corruptions, result.leaks, RefImage(file).version) == (0, 0, 2)


def test_an_image_that_was_upgraded_makes_zero_clusters() -> None:
    """The mapping in memory follows the version."""
    file, base = MemoryStorage(), MemoryStorage(b"b" * SIZE)

    class Base:
        def open(self, *_: object, **__: object) -> MemoryStorage:
            return base

    create(file, CreateOptions(size=SIZE, version=2, backing_file=b"base", backing_format=b"raw"))
    with qcowlib.open(file, "r+", format="qcow2", references=Base()) as image:  # type: ignore[arg-type]
        image.amend(AmendOptions(compat="1.1"))
        image.discard(65536, 65536)
        assert image.pread(131072, 0) == b"b" * 65536 + bytes(65536)
    assert not reference_check(RefImage(file)).corruptions


# -- keys ------------------------------------------------------------------------


def encrypted() -> MemoryStorage:
    blob, _ = LuksHeader.create("first", iter_time=1)
    file = MemoryStorage()
    create(file, CreateOptions(size=SIZE, encrypt=Encryption(2, blob)))
    with qcowlib.open(file, "r+", format="qcow2", secret="first") as image:
        image.pwrite(b"secret" * 1000, 4096)
    return file


def opens(file: MemoryStorage, secret: str) -> bool:
    try:
        with qcowlib.open(file, format="qcow2", secret=secret) as image:
            return image.pread(6000, 4096) == b"secret" * 1000
    except SecretError:
        return False


def test_keys_are_added_and_erased() -> None:
    file = encrypted()
    add = KeyChange("active", new_secret="second", secret="first", iter_time=1)
    with qcowlib.open(file, "r+", format="qcow2", secret="first") as image:
        image.amend(AmendOptions(encrypt=add))
        assert opens(file, "first") and opens(file, "second")
        with pytest.raises(qcowlib.UsageError, match="active keyslot 0"):
            image.amend(AmendOptions(encrypt=add._replace(keyslot=0)))
        image.amend(AmendOptions(encrypt=KeyChange("inactive", old_secret="first")))
        assert not opens(file, "first") and opens(file, "second")
        with pytest.raises(qcowlib.UsageError, match="All the active keyslots"):
            image.amend(AmendOptions(encrypt=KeyChange("inactive", old_secret="second")))
        image.amend(AmendOptions(encrypt=KeyChange("inactive", old_secret="second", force=True)))
    assert not opens(file, "second")


def test_key_changes_that_make_no_sense_are_refused_in_the_words_of_qemu() -> None:
    file = encrypted()
    for change, text in (
        (KeyChange(keyslot=1), "Parameter 'state' is missing"),
        (KeyChange("bogus"), "Parameter 'state' does not accept value 'bogus'"),
        (KeyChange("active"), "'new-secret' is required to activate a keyslot"),
        (
            KeyChange("active", new_secret="n", old_secret="o"),
            "'old-secret' must not be given when activating keyslots",
        ),
        (KeyChange("inactive", new_secret="n"), "'new-secret' must not be given when erasing keyslots"),
        (KeyChange("inactive", iter_time=9), "'iter-time' must not be given when erasing keyslots"),
        (KeyChange("inactive"), "either explicit keyslot index or the password"),
        (KeyChange("inactive", keyslot=3), "Given keyslot 3 is already erased"),
        (KeyChange("inactive", keyslot=9), "Invalid keyslot 9 specified"),
        (KeyChange("inactive", keyslot=0, old_secret="x"), "doesn't contain the given old password"),
    ):
        with (
            qcowlib.open(file, "r+", format="qcow2", secret="first") as image,
            pytest.raises(qcowlib.UsageError, match=text),
        ):
            image.amend(AmendOptions(encrypt=change))


# -- cuts ------------------------------------------------------------------------


@pytest.mark.crash
@pytest.mark.parametrize("backing", [b"", b"b" * 32 * 1024], ids=["alone", "over-base"])
@pytest.mark.parametrize(
    ("version", "options"),
    [
        (3, AmendOptions(refcount_bits=8)),
        (3, AmendOptions(refcount_bits=64)),
        (3, AmendOptions(lazy_refcounts=True)),
        (3, AmendOptions(compat="0.10")),
        (2, AmendOptions(compat="1.1")),
        (2, AmendOptions(compat="1.1", refcount_bits=32, lazy_refcounts=True)),
    ],
)
def test_a_cut_leaves_a_whole_image_with_the_same_content(version: int, options: AmendOptions, backing: bytes) -> None:
    """Invariant: I1, I5, I7."""
    rng = random.Random(7)
    file, base = MemoryStorage(), MemoryStorage(backing)

    class Base:
        def open(self, *_: object, **__: object) -> MemoryStorage:
            return base

    over = {"backing_file": b"n" * 300, "backing_format": b"raw"} if backing else {}
    create(file, CreateOptions(size=32 * 1024, cluster_size=1024, version=version, **over))  # type: ignore[arg-type]
    log = OpLog()
    with qcowlib.open(file, "r+", format="qcow2", references=Base()) as image:  # type: ignore[arg-type]
        for number in range(12):
            image.pwrite(rng.randbytes(1500), rng.randrange(30000))
            image.zero(3000, rng.randrange(29000), unmap=number % 2 == 0)
            if number in (4, 8):
                image.create_snapshot(f"s{number}")
        if version == 3:
            image.add_bitmap("b")
    expected = {"": reference_read(RefImage(file), backing=backing)}
    for name in ("s4", "s8"):
        expected[name] = reference_read(RefImage(file), backing=backing, snapshot=name)
    with qcowlib.open(log.record(file), "r+", format="qcow2", references=Base()) as image:  # type: ignore[arg-type]
        image.amend(options)

    def judge(state: CrashState) -> list[Finding]:
        try:
            image = RefImage(bytes(state.images[0]))
            for name, data in expected.items():
                if reference_read(image, backing=backing, **({"snapshot": name} if name else {})) != data:
                    return [Finding("THIRD", f"other content: {name}")]
        except ReferenceError as error:
            return [Finding("UNREADABLE", str(error))]
        result = reference_check(image)
        return [Finding("CORRUPT", result.messages[0])] if result.corruptions else []

    report = assert_crash_safe(log, judge, random_states=6)
    assert report.distinct > 1
    final = reference_check(RefImage(file))
    assert (final.corruptions, final.leaks) == (0, 0)
    wanted = {"0.10": 2, "1.1": 3}.get(options.compat or "", version)
    assert RefImage(file).version == wanted
    assert RefImage(file).order == (options.refcount_bits or 16).bit_length() - 1


def test_amend_on_a_loop() -> None:
    async def run() -> None:
        file = MemoryStorage()
        create(file, CreateOptions(size=SIZE))
        async with await aio.open(file, "r+", format="qcow2") as image:
            await image.pwrite(b"x" * 100, 0)
            await image.amend(AmendOptions(refcount_bits=8, size=2 * SIZE))
            await image.pwrite(b"y" * 100, SIZE + 100)
            assert await image.pread(100, 0) == b"x" * 100
        result = reference_check(RefImage(file))
        assert (result.corruptions, result.leaks, RefImage(file).order) == (0, 0, 3)

    asyncio.run(run())
