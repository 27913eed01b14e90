# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Many images at once: answers in order, failures beside them, overlays all or none."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qcowlib
from qcowlib.jobs.many import create_overlays, images_in, many, plan_overlays
from tests.qcowlib.qemu import qemu_img


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@given(st.lists(st.integers(0, 30), max_size=60), st.integers(1, 16))
def test_answers_come_in_order_and_errors_beside_them(numbers: list[int], workers: int) -> None:
    def action(path: str) -> int:
        if int(path) % 7 == 3:
            raise qcowlib.UsageError("no")
        return int(path) * 2

    found = list(many(action, map(str, numbers), workers=workers))
    assert [outcome.path for outcome in found] == [str(number) for number in numbers]
    for number, outcome in zip(numbers, found, strict=True):
        assert (outcome.value, outcome.error is None) == ((None, False) if number % 7 == 3 else (number * 2, True))


def test_first_answer_comes_before_the_last_path_is_asked_for() -> None:
    asked: list[int] = []

    def endless() -> object:
        number = 0
        while True:
            asked.append(number)
            yield str(number)
            number += 1

    answers = many(int, endless(), workers=2)  # type: ignore[arg-type]
    assert next(answers).value == 0
    assert len(asked) <= 2 * 8
    answers.close()  # type: ignore[attr-defined]


def test_cancel_ends_it_and_no_thread_is_left() -> None:
    before = threading.active_count()
    with pytest.raises(qcowlib.Cancelled):
        list(many(int, ["1"] * 100, cancel=lambda: True))
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [0, 17])
def test_number_of_workers_is_bounded(workers: int) -> None:
    with pytest.raises(qcowlib.UsageError):
        list(many(int, ["1"], workers=workers))


def test_folders_give_their_images_and_no_other_files() -> None:
    Path("a/b").mkdir(parents=True)
    for name in ("a/2", "a/1", "a/b/3"):
        qcowlib.create(name, 1 << 20)
    Path("a/raw").write_bytes(bytes(4096))
    os.mkfifo("a/pipe")
    Path("a/b/up").symlink_to("..")
    assert list(images_in(["a", "x"])) == ["a/1", "a/2", "x"]
    assert sorted(images_in(["a"], recursive=True)) == ["a/1", "a/2", "a/b/3"]


@pytest.mark.real("qemu-img")
def test_overlays_are_the_images_that_create_makes() -> None:
    qcowlib.create("base", 3 << 20)
    names = [f"o{number}" for number in range(50)]
    assert plan_overlays("base", names, backing_format="qcow2") == ("base", 3 << 20, names)
    assert not Path("o0").exists()
    told: list[tuple[int, int]] = []
    made = create_overlays("base", names, backing_format="qcow2", workers=4, progress=lambda *n: told.append(n))
    assert made == names and told == [(number, len(names)) for number in range(1, len(names) + 1)]
    qcowlib.create("one", None, backing="base", backing_format="qcow2")
    assert all(Path(name).read_bytes() == Path("one").read_bytes() for name in names)
    assert "backing file: base" in qemu_img("info", "o7")
    create_overlays("base", ["big"], backing_format="qcow2", size=1 << 30, cluster_size=4096)
    with qcowlib.open("big") as image:
        assert (image.size, image.cluster_size) == (1 << 30, 4096)


def test_overlays_are_refused_before_anything_is_made() -> None:
    qcowlib.create("base", 1 << 20)
    Path("there").write_text("kept")
    for names in (["a", "a"], ["a", "there"]):
        for job in (create_overlays, plan_overlays):
            with pytest.raises(qcowlib.UsageError):
                job("base", names, backing_format="qcow2")
    with pytest.raises(qcowlib.StorageError):
        create_overlays("gone", ["a"], backing_format="qcow2")
    with pytest.raises(qcowlib.UsageError):
        create_overlays("base", ["a", "b"], backing_format="qcow2", cluster_size=3)
    assert sorted(os.listdir(".")) == ["base", "there"]  # noqa: PTH208
    assert Path("there").read_text() == "kept"


def test_overlays_made_before_a_failure_are_removed() -> None:
    qcowlib.create("base", 1 << 20)
    with pytest.raises(qcowlib.StorageError):
        create_overlays("base", ["a", "b", "no/such/folder", "c"], backing_format="qcow2", workers=1)
    assert os.listdir(".") == ["base"]  # noqa: PTH208
