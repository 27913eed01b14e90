# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Changing the header area: every cut leaves the old header or the new one."""

from __future__ import annotations

import pytest

import qcowlib
from qcowlib.ondisk import Header
from qcowlib.ondisk.extensions import Extension
from qcowlib.qcow2.create import CreateOptions, create
from qcowlib.qcow2.directories import read_header
from qcowlib.qcow2.header_update import set_backing, write_header
from qcowlib.storage.memory import MemoryStorage
from qcowlib.testing.crash import CrashState, Finding, assert_crash_safe
from qcowlib.testing.recorder import OpLog

NAMES = [None, b"a", b"base.img", b"b" * 300, b"c" * 1023]


def image(name: bytes | None, *, cluster_size: int = 65536, version: int = 3, unknown: int = 0) -> MemoryStorage:
    storage = MemoryStorage()
    format = None if name is None else b"raw"
    header = create(
        storage,
        CreateOptions(
            size=1 << 20, cluster_size=cluster_size, version=version, backing_file=name, backing_format=format
        ),
    )
    if unknown:
        header.unknown_extensions = (Extension(0x12345678, b"kept" * (unknown // 4)),)
        storage.write(0, [header.pack()])
    return storage


def names_of(storage: MemoryStorage) -> tuple[bytes | None, bytes | None]:
    header = read_header(storage)
    return header.backing_file, header.backing_format


@pytest.mark.crash
@pytest.mark.parametrize("unknown", [0, 40, 600])
@pytest.mark.parametrize("new", NAMES)
@pytest.mark.parametrize("old", NAMES)
def test_i5_a_cut_leaves_the_old_header_or_the_new_one(old: bytes | None, new: bytes | None, unknown: int) -> None:
    storage = image(old, unknown=unknown)
    log = OpLog()
    recorded = log.record(storage)
    before = names_of(storage)
    set_backing(recorded, new, None if new is None else b"qcow2")
    after = names_of(storage)
    assert after == (new, None if new is None else b"qcow2")
    kept = [one.data for one in read_header(storage).unknown_extensions]
    assert kept == ([b"kept" * (unknown // 4)] if unknown else [])

    def judge(state: CrashState) -> list[Finding]:
        data = bytes(state.images[0])
        try:
            header = Header.parse(data[:65536], len(data))
        except qcowlib.FormatError as error:
            return [Finding("UNREADABLE", str(error))]
        names = header.backing_file, header.backing_format
        if names not in (before, after):
            return [Finding("THIRD", repr(names))]
        mine = [one.data for one in header.unknown_extensions if one.type == 0x12345678]
        return [] if mine == kept else [Finding("LOST", "an unknown extension")]

    assert_crash_safe(log, judge)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("cluster_size", [512, 1024, 65536])
def test_result_is_the_header_a_new_image_has(cluster_size: int, version: int) -> None:
    changed = image(b"old", cluster_size=cluster_size, version=version)
    set_backing(changed, b"the new name", b"raw")
    assert (
        changed.getvalue()[:cluster_size]
        == image(b"the new name", cluster_size=cluster_size, version=version).getvalue()[:cluster_size]
    )


def test_name_that_does_not_fit_changes_nothing() -> None:
    storage = image(b"old", cluster_size=512)
    with pytest.raises(qcowlib.UsageError, match="No space left in the file header"):
        set_backing(storage, b"n" * 500, b"raw")
    assert names_of(storage) == (b"old", b"raw")


def test_i10_unknown_autoclear_bits_go_with_the_change() -> None:
    storage = image(b"old")
    storage.write(88, [(1 << 63).to_bytes(8, "big")])
    header = read_header(storage).copy()
    assert header.autoclear_features == 1 << 63
    write_header(storage, header)
    assert read_header(storage).autoclear_features == 0
