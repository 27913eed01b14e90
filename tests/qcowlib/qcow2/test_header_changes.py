# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Replacing the header area: at every cut the old one or the new one, whole."""

from __future__ import annotations

import random

import pytest

from qcowlib.errors import FormatError, UsageError
from qcowlib.ondisk import BitmapsExtension, Extension, Header
from qcowlib.qcow2.create import CreateOptions, create
from qcowlib.qcow2.directories import read_header
from qcowlib.qcow2.header_update import write_header
from qcowlib.storage.memory import MemoryStorage
from qcowlib.testing.crash import CrashState, Finding, assert_crash_safe
from qcowlib.testing.recorder import OpLog

FIELDS = [name for name in Header.__slots__ if name not in ("header_length", "backing_file_offset", "unknown_fields")]


def meaning(header: Header) -> dict[str, object]:
    """All of a header but the place of its parts; its list of extensions is their sum."""
    return {name: getattr(header, name) for name in FIELDS if name != "extensions"}


def changed(header: Header, rng: random.Random) -> Header:
    """A header with some parts added, changed or removed."""
    new = header.copy()
    for part in rng.sample(["bitmaps", "backing", "format", "unknown", "lazy"], rng.randint(1, 3)):
        if part == "bitmaps" and new.version >= 3:
            keep = new.bitmaps is not None and rng.random() < 0.5
            new.bitmaps = None if keep else BitmapsExtension(rng.randint(1, 9), 64, rng.randint(1, 9) << 21)
            new.autoclear_features = 0 if new.bitmaps is None else 1
        elif part == "backing":
            new.backing_file = rng.choice([None, b"a" * rng.choice([1, 100, 300, 700, 1023])])
        elif part == "format":
            new.backing_format = rng.choice([None, b"raw", b"qcow2"])
        elif part == "unknown":
            new.unknown_extensions = tuple(Extension(77 + i, rng.randbytes(rng.choice([3, 60]))) for i in range(2))
        elif new.version >= 3:
            new.compatible_features ^= 1
    if new.backing_file is None:
        new.backing_format = None
    return new


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
def test_a_cut_leaves_the_old_header_or_the_new_one(cluster_size: int, version: int) -> None:
    """Invariant: I5."""
    rng = random.Random(cluster_size + version)
    file = MemoryStorage()
    create(file, CreateOptions(size=1 << 20, cluster_size=cluster_size, version=version))
    switched = 0
    for _ in range(25):
        old = read_header(file)
        new = changed(old, rng)
        log = OpLog()
        recorded = log.record(file)
        try:
            write_header(recorded, new)
        except UsageError:
            assert not [op for op in log.ops if op.kind != "flush"]
            continue
        allowed = [meaning(old), meaning(new)]

        def judge(state: CrashState, allowed: list[dict[str, object]] = allowed) -> list[Finding]:
            try:
                seen = meaning(read_header(MemoryStorage(bytes(state.images[0]))))
            except FormatError as error:
                return [Finding("UNREADABLE", str(error))]
            for side in allowed:
                if all(seen[name] == side[name] for name in seen if name != "feature_names"):
                    return []
            return [Finding("THIRD", str(seen))]

        switched += assert_crash_safe(log, judge, random_states=8).distinct > 1
        assert meaning(read_header(file)).items() >= {**meaning(new), "feature_names": ANY}.items()
        content = bytearray(cluster_size)
        file.read_into(0, [content])
        assert bytes(content) == new.pack()
    assert switched > 10


class _Any:
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


ANY = _Any()
