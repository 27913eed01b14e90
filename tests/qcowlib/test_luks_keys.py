# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Key slots of LUKS files: whatever a power cut leaves, the old or the new passphrase opens; and encrypted copies."""

from __future__ import annotations

from pathlib import Path

import pytest

import qcowlib
from qcowlib.errors import SecretError, UsageError
from qcowlib.luks import KeyChange, LuksHeader
from qcowlib.qcow2.create import Encryption
from qcowlib.storage.encrypted import change_keys, create_luks, open_luks
from qcowlib.storage.memory import MemoryStorage
from qcowlib.testing.crash import CrashState, Finding, assert_crash_safe
from qcowlib.testing.recorder import OpLog

SIZE = 4096
#: What is done with the file whose only key is "old", and which passphrases must open whatever is left.
CHANGES = (
    (KeyChange("active", new_secret="new", secret="old", iter_time=0), ("old",)),
    (KeyChange("active", keyslot=0, new_secret="new", secret="old", iter_time=0, force=True), ("old", "new")),
)


def luks_file() -> MemoryStorage:
    storage = MemoryStorage()
    create_luks(storage, SIZE, "old", iter_time=0)
    return storage


def opens(storage: MemoryStorage, phrase: str) -> bool:
    try:
        open_luks(storage, phrase)
    except SecretError:
        return False
    return True


def findings(state: CrashState, *phrases: str) -> list[Finding]:
    """Judge a state: one of *phrases* must open it."""
    storage = MemoryStorage(bytes(state.images[0]))
    return [] if any(opens(storage, phrase) for phrase in phrases) else [Finding("LOCKED", "no key opens")]


@pytest.mark.crash
@pytest.mark.parametrize(("change", "keys"), CHANGES, ids=["add", "overwrite"])
def test_some_key_opens_after_a_cut_anywhere(change: KeyChange, keys: tuple[str, ...]) -> None:
    log = OpLog()
    change_keys(log.record(luks_file()), change)

    assert_crash_safe(log, lambda state: findings(state, *keys))


@pytest.mark.crash
def test_erasing_one_of_two_keys_leaves_the_other(tmp_path: Path) -> None:
    storage = luks_file()
    change_keys(storage, KeyChange("active", new_secret="new", secret="old", iter_time=0))
    log = OpLog()
    change_keys(log.record(storage), KeyChange("inactive", old_secret="old"))
    assert_crash_safe(log, lambda state: findings(state, "new"))
    assert not opens(storage, "old")
    with pytest.raises(UsageError, match="refusing operation"):
        change_keys(storage, KeyChange("inactive", old_secret="new"))


def test_a_copy_is_encrypted_as_it_is_made(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(b"in the clear" * 4096)
    area, _ = LuksHeader.create("key", iter_time=0)
    qcowlib.convert(plain, tmp_path / "copy", source_format="raw", encrypt=Encryption(2, area), target_secret="key")
    assert b"clear" not in (tmp_path / "copy").read_bytes()
    with qcowlib.open(tmp_path / "copy", secret="key") as image:
        assert image.pread(12, 0) == b"in the clear"
