# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The shadow of a storage: a storage as any other, that leaves what is below alone."""

from __future__ import annotations

import random

from qcowlib.storage.memory import MemoryStorage
from qcowlib.storage.shadow import BLANK, ShadowStorage
from qcowlib.testing.conformance import StorageContract


class TestShadowContract(StorageContract):
    def make(self, size: int) -> ShadowStorage:
        return ShadowStorage(MemoryStorage(size), name="shadow")


def test_random_changes_show_and_the_storage_below_stays() -> None:
    rng = random.Random(1)
    below = MemoryStorage(rng.randbytes(50000))
    before = below.getvalue()
    shadow, model = ShadowStorage(below, name="shadow"), MemoryStorage(before)
    for _ in range(2000):
        offset, length = rng.randrange(60000), rng.choice([1, 512, 4096, 20000])
        kind = rng.randrange(4)
        for storage in (shadow, model):
            if kind == 0:
                storage.zero(offset, length)
            elif kind == 1:
                storage.resize(max(offset, 512))
            else:
                storage.write(offset, [bytes([kind + offset % 7]) * length])
        found = bytearray(90000)
        shadow.read_into(0, [found])
        assert (shadow.size, bytes(found)) == (model.size, model.getvalue().ljust(90000, b"\0"))
    assert below.getvalue() == before


def test_blank_data_moves_the_end_only() -> None:
    shadow = ShadowStorage(None, name="shadow")
    shadow.write(1000, [memoryview(BLANK)[:500], b"x"])
    assert (shadow.size, shadow.reached) == (1501, 1501)
    found = bytearray(1)
    shadow.read_into(1500, [found])
    assert found == b"x"
