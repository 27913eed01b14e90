# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The crash explorer has teeth: a right writer is clean, each wrong one is caught."""

from __future__ import annotations

import random

import pytest

from qcowlib.storage.memory import MemoryStorage
from qcowlib.testing.crash import assert_crash_safe, crash_states, explore
from qcowlib.testing.model import GuestModel, tagged
from qcowlib.testing.recorder import OpLog
from qcowlib.testing.reference import reference_check, reference_read
from tests.qcowlib.testing import toy


def _run(bug: str, seed: int, steps: int = 40) -> tuple[OpLog, GuestModel, MemoryStorage]:
    below = MemoryStorage()
    toy.make(below)
    log = OpLog()
    writer = toy.ToyWriter(log.record(below), bug)
    model = GuestModel(toy.SIZE, log)
    chance = random.Random(seed)
    places = [cluster * toy.CLUSTER for cluster in (0, 1, 2, 3, 64, 65, 129, 130)]
    for _ in range(steps):
        offset, kind = chance.choice(places), chance.random()
        if kind < 0.5:
            inside, length = chance.choice([(0, 1024), (0, 512), (512, 512)])
            with model.write(offset + inside, length) as data:
                writer.write(offset + inside, data)
        elif kind < 0.75:
            with model.zero(offset, toy.CLUSTER):
                writer.discard(offset)
        else:
            with model.flush():
                writer.flush()
    with model.flush():
        writer.flush()
    return log, model, below


@pytest.mark.parametrize("seed", range(4))
def test_the_right_order_has_no_violation(seed: int) -> None:
    log, model, below = _run("", seed)
    report = assert_crash_safe(log, model.oracle, seed=seed)
    assert report.distinct > 100
    assert reference_read(below.getvalue()) == model.content()
    assert reference_check(below.getvalue()).corruptions == 0


EXPECTED = {
    "l2 before refcounts": "CORRUPT",
    "no first barrier": "CORRUPT",
    "flush without sync": "LOST",
    "l2 before data": "ALIEN",
    "unfilled cluster": "ALIEN",
    "early reuse": "ALIEN",
    "decrement before publish": "CORRUPT",
    "copied on shared": "CORRUPT",
}


@pytest.mark.parametrize("bug", toy.BUGS)
def test_each_wrong_order_is_caught(bug: str) -> None:
    found: set[str] = set()
    for seed in range(8):
        log, model, _ = _run(bug, seed)
        found |= explore(log, model.oracle, seed=seed, stop_after=40).verdicts.keys()
        if EXPECTED[bug] in found:
            break
    assert EXPECTED[bug] in found


def test_a_failure_names_the_seed_and_the_operations() -> None:
    log, model, _ = _run("no first barrier", 1)
    with pytest.raises(AssertionError, match=r"(?s)seed 7.*before operation \d+: \d+:write@0"):
        assert_crash_safe(log, model.oracle, seed=7)


def test_states_are_the_same_for_the_same_seed() -> None:
    log, _, _ = _run("", 3, steps=15)
    first = [(state.images, state.first, state.last) for state in crash_states(log, seed=5)]
    assert first == [(state.images, state.first, state.last) for state in crash_states(log, seed=5)]


def test_small_windows_are_enumerated_completely_and_barriers_hold() -> None:
    log = OpLog()
    storage = log.record(MemoryStorage(bytes(4 * 512)))
    for sector in range(3):
        storage.write(sector * 512, [tagged(sector, 1)])
    storage.flush()
    storage.write(0, [tagged(0, 2)])
    states = {bytes(state.images[0]) for state in crash_states(log)}
    written = [(bytes(512), tagged(sector, 1)) for sector in range(3)]
    subsets = {a + b + c + bytes(512) for a in written[0] for b in written[1] for c in written[2]}
    assert states == subsets | {tagged(0, 2) + tagged(1, 1) + tagged(2, 1) + bytes(512)}


def test_big_writes_are_torn_at_sectors() -> None:
    log = OpLog()
    storage = log.record(MemoryStorage(bytes(16 * 512)))
    storage.write(0, [b"".join(tagged(sector, 1) for sector in range(16))])
    shapes = set()
    for state in crash_states(log):
        image = bytes(state.images[0])
        shape = tuple(bool(any(image[sector * 512 : (sector + 1) * 512])) for sector in range(16))
        for sector in range(16):
            assert image[sector * 512 : (sector + 1) * 512] in (bytes(512), tagged(sector, 1))
        shapes.add(shape)
    assert len(shapes) > 10


def test_two_storages_have_barriers_of_their_own() -> None:
    log = OpLog()
    first, second = log.record(MemoryStorage(bytes(512))), log.record(MemoryStorage(bytes(512)))
    first.write(0, [b"a" * 512])
    second.write(0, [b"b" * 512])
    second.flush()
    first.flush()
    seen = {(bytes(state.images[0][:1]), bytes(state.images[1][:1])) for state in crash_states(log) if state.last == 3}
    assert seen == {(b"\0", b"b"), (b"a", b"b")}
    seen = {(bytes(state.images[0][:1]), bytes(state.images[1][:1])) for state in crash_states(log) if state.last == 2}
    assert len(seen) == 4


def test_growth_zeros_discards_and_shrinking_are_replayed() -> None:
    log = OpLog()
    below = MemoryStorage(b"x" * 2048)
    storage = log.record(below)
    storage.zero(512, 512)
    storage.discard(0, 512)
    storage.write(4096, [b"y" * 100])
    storage.resize(5000)
    storage.resize(1500)
    storage.flush()
    assert bytes(list(crash_states(log))[-1].images[0]) == below.getvalue()


class TestModel:
    def test_an_unflushed_sector_may_be_old_or_new_and_a_flushed_one_only_new(self) -> None:
        model = GuestModel(1024)
        with model.write(0, 512):
            pass
        before = model.log.position
        assert model.allowed(0, before) == {-1, 1}
        with model.flush():
            pass
        with model.write(0, 512):
            pass
        assert model.allowed(0, before) == {-1, 1}
        assert model.allowed(0, model.log.position) == {1, 2}
        assert model.allowed(1, model.log.position) == {-1}

    def test_a_failed_flush_and_a_failed_write_promise_nothing(self) -> None:
        model = GuestModel(512)
        with pytest.raises(OSError), model.write(0, 512):
            raise OSError
        with pytest.raises(OSError), model.flush():
            raise OSError
        with model.flush():
            pass
        assert model.allowed(0, model.log.position) == {-1, 1}

    def test_a_discarded_sector_may_show_old_bytes_or_zeros(self) -> None:
        model = GuestModel(512)
        with model.write(0, 512):
            pass
        with model.discard(0, 512), model.flush():
            pass
        with model.flush():
            pass
        assert model.allowed(0, model.log.position) == {0, 1}

    def test_bytes_are_classed_by_what_they_are(self) -> None:
        model = GuestModel(1024, base=b"\7" * 1024)
        for _ in range(2):
            with model.write(0, 512):
                pass
            with model.flush():
                pass
        now, rest = model.log.position, b"\7" * 512

        def verdict(data: bytes) -> list[str]:
            return [finding.verdict for finding in model.judge(data + rest, now)]

        assert verdict(tagged(0, 2)) == []
        assert verdict(tagged(0, 1)) == verdict(b"\7" * 512) == verdict(bytes(512)) == ["LOST"]
        assert verdict(tagged(1, 1)) == ["ALIEN"]
        assert verdict(tagged(0, 3)) == verdict(b"\xa5G" + bytes(510)) == ["THIRD"]

    def test_a_cut_revert_shows_one_world(self) -> None:
        model = GuestModel(1024)
        with model.write(0, 1024):
            pass
        with model.snapshot("s"):
            pass
        with model.write(0, 1024):
            pass
        with model.flush():
            pass
        with model.revert("s"):
            during = model.log.mark("inside")
        old, new = [tagged(0, 2), tagged(1, 2)], [tagged(0, 1), tagged(1, 1)]
        assert model.judge(b"".join(old), during) == model.judge(b"".join(new), during) == []
        assert [finding.verdict for finding in model.judge(old[0] + new[1], during)] == ["THIRD"]
        assert [finding.verdict for finding in model.judge(b"".join(old), model.log.position)] == ["LOST"]
        assert model.content() == b"".join(new)
