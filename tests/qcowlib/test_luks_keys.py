# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Key slots of LUKS files and qcow2 images: whatever a power cut leaves, a passphrase opens; and encrypted copies."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

import pytest

import qcowlib
from qcowlib.errors import SecretError, UsageError
from qcowlib.luks import KeyChange, LuksHeader
from qcowlib.qcow2.amend import AmendOptions
from qcowlib.qcow2.create import CreateOptions, Encryption, create
from qcowlib.storage.base import Storage
from qcowlib.storage.encrypted import change_keys, open_luks
from qcowlib.storage.memory import MemoryStorage
from qcowlib.testing.crash import CrashState, Finding, assert_crash_safe
from qcowlib.testing.recorder import OpLog

SIZE = 4096
GUEST = b"guest" * 100
FORMATS = ("luks", "qcow2")
ADD = KeyChange("active", new_secret="new", secret="old", iter_time=0)
OVERWRITE = ADD._replace(force=True, keyslot=0)
EIGHT = ["old", *"1234567"]
#: Passphrases of the slots, what is done with them, one of which opens whatever a cut leaves, and all that open after.
CHANGES: dict[str, tuple[list[str], KeyChange, list[str], set[str]]] = {
    "add": (["old"], ADD, ["old"], {"old", "new"}),
    "add-seventh": (["old"], ADD._replace(keyslot=6), ["old"], {"old", "new"}),
    "overwrite": (["old"], OVERWRITE, ["old", "new"], {"new"}),
    "overwrite-of-two": (["old", "two"], OVERWRITE._replace(keyslot=1), ["old"], {"old", "new"}),
    "overwrite-of-eight": (EIGHT, OVERWRITE, ["old", "new"], {"new", *"1234567"}),
    "overwrite-another-of-eight": (EIGHT, OVERWRITE._replace(keyslot=3), ["old"], {"old", "new", *"124567"}),
    "overwrite-one-of-alike": ([*EIGHT[:7], "old"], OVERWRITE, ["old"], {"old", "new", *"123456"}),
    "overwrite-seventh": (
        [*"012345", "old", "7"],
        OVERWRITE._replace(keyslot=6),
        ["old", "new"],
        {"new", *"0123457"},
    ),
    "erase": (["old", "two"], KeyChange("inactive", old_secret="old"), ["two"], {"two"}),
    "erase-seventh": ([*"012345", "old"], KeyChange("inactive", keyslot=6), ["5"], set("012345")),
}


@functools.cache
def area(*phrases: str) -> bytes:
    """A header, with its key material, whose first slots take *phrases*."""
    ticks = iter(range(1000))
    made, _ = LuksHeader.create(phrases[0], cipher_alg="aes-128", iter_time=0, host_sectors=False)
    whole = bytearray(made)
    for phrase in phrases[1:]:
        header = LuksHeader.parse(whole)
        for offset, data in header.add_key(whole, phrases[0], phrase, iter_time=0, clock=lambda: float(next(ticks))):
            whole[offset : offset + len(data)] = data
    return bytes(whole)


def encrypted(format: str, *phrases: str) -> MemoryStorage:
    """A LUKS file or an image with guest data."""
    whole = area(*phrases)
    if format == "luks":
        file = MemoryStorage(whole + bytes(SIZE))
        open_luks(file, phrases[0]).write(0, [GUEST])
        return file
    file = MemoryStorage()
    create(file, CreateOptions(size=SIZE, cluster_size=4096, encrypt=Encryption(2, whole)))
    with qcowlib.open(file, "r+", format="qcow2", secret=phrases[0]) as image:
        image.pwrite(GUEST, 0)
    return file


def changed(format: str, storage: Storage, change: KeyChange, phrase: str) -> None:
    if format == "luks":
        change_keys(storage, change)
        return
    with qcowlib.open(storage, "r+", format="qcow2", secret=phrase) as image:
        image.amend(AmendOptions(encrypt=change))


def opens(format: str, storage: Storage, phrase: str) -> bool:
    """Whether *phrase* shows what the guest wrote."""
    found = bytearray(len(GUEST))
    try:
        if format == "luks":
            open_luks(storage, phrase).read_into(0, [found])
        else:
            with qcowlib.open(storage, format="qcow2", secret=phrase) as image:
                found[:] = image.pread(len(GUEST), 0)
    except SecretError:
        return False
    return found == GUEST


def findings(format: str, state: CrashState, keys: list[str]) -> list[Finding]:
    """Judge a state: one of *keys* must open it."""
    storage = MemoryStorage(bytes(state.images[0]))
    return [] if any(opens(format, storage, key) for key in keys) else [Finding("LOCKED", "no key opens")]


@pytest.mark.crash
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("slots", "change", "keys", "after"), CHANGES.values(), ids=CHANGES)
def test_some_key_opens_after_a_cut_anywhere(
    format: str, slots: list[str], change: KeyChange, keys: list[str], after: set[str]
) -> None:
    """Invariant: I6."""
    file = encrypted(format, *slots)
    log = OpLog()
    changed(format, log.record(file), change, keys[0] if format == "luks" else slots[0])

    report = assert_crash_safe(log, lambda state: findings(format, state, keys), subset_limit=4, random_states=2)
    assert report.distinct > 1
    assert {phrase for phrase in {*slots, "new"} if opens(format, file, phrase)} == after


@pytest.mark.crash
def test_without_the_spare_slot_a_cut_locks_the_file() -> None:
    """Were nothing found here, the test above would prove nothing."""
    file, log, whole = encrypted("luks", "old"), OpLog(), area("old")
    storage, header = log.record(file), LuksHeader.parse(whole)
    for offset, data in header._fill_slot(0, header.unlock(whole, "old")[1], b"new", 0, None):
        storage.write(offset, [data])
        storage.flush()
    with pytest.raises(AssertionError, match="LOCKED"):
        assert_crash_safe(log, lambda state: findings("luks", state, ["old", "new"]), random_states=2)


def test_the_last_key_is_not_erased_unless_forced() -> None:
    file = encrypted("luks", "old")
    with pytest.raises(UsageError, match="refusing operation"):
        change_keys(file, KeyChange("inactive", old_secret="old"))


def test_a_slot_handed_on_keeps_nothing_of_the_old_key() -> None:
    """Only the last sector of its material differs, and the old passphrase does not open what is left."""
    whole = bytearray(area("old", *"1234567"))
    header = LuksHeader.parse(whole)
    ((offset, data),) = header.change(whole, OVERWRITE)
    assert (offset, len(data)) == (header.slots[0].offset + 32 * 4000 - 512, 512)
    whole[offset : offset + 512] = data
    assert header.unlock(whole, "new")[0] == 0
    with pytest.raises(SecretError):
        header.unlock(whole, "old")


@pytest.mark.real("qemu-img")
@pytest.mark.parametrize("format", FORMATS)
def test_qemu_opens_a_slot_that_was_handed_on(format: str, tmp_path: Path) -> None:
    file = encrypted(format, "old", *"1234567")
    changed(format, file, OVERWRITE, "old")
    path = tmp_path / "image"
    whole = bytearray(file.size)
    file.read_into(0, [whole])
    path.write_bytes(whole)
    prefix = "" if format == "luks" else "encrypt."
    for phrase, status in (("new", 0), ("7", 0), ("old", 1)):
        done = subprocess.run(
            ["qemu-img", "convert", "--object", f"secret,id=s,data={phrase}", "--image-opts",
             f"driver={format},file.filename={path},{prefix}key-secret=s", "-O", "raw", tmp_path / "out"],
            check=False, capture_output=True,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        if not status:
            assert (tmp_path / "out").read_bytes()[: len(GUEST)] == GUEST


def test_a_copy_is_encrypted_as_it_is_made(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(b"in the clear" * 4096)
    area, _ = LuksHeader.create("key", iter_time=0)
    qcowlib.convert(plain, tmp_path / "copy", source_format="raw", encrypt=Encryption(2, area), target_secret="key")
    assert b"clear" not in (tmp_path / "copy").read_bytes()
    with qcowlib.open(tmp_path / "copy", secret="key") as image:
        assert image.pread(12, 0) == b"in the clear"
