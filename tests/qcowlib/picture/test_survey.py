# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""A survey counts the same bytes as qemu-img's map and check, in bounded memory whatever the image claims."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import qcowlib
from qcowlib.picture.panels import Panel
from qcowlib.picture.survey import survey
from qcowlib.testing.hostile import HostileCase, hostile_cases, materialize
from tests.qcowlib.qemu import qemu_img, qemu_map

SIZE = 16 << 20


def fill(path: Path, rng: random.Random) -> None:
    with qcowlib.open(path, "r+") as image:
        for number in range(40):
            offset = rng.randrange(SIZE >> 12) << 12
            length = min(rng.randrange(1, 64) << 12, SIZE - offset)
            rng.choice((image.discard, image.zero, lambda n, o: image.pwrite(rng.randbytes(n), o)))(length, offset)
            if number % 15 == 7:
                image.create_snapshot(f"s{number}")


def by_label(panel: Panel) -> dict[str, int]:
    return {category.label: total for category, total in zip(panel.categories, panel.totals, strict=True)}


@pytest.mark.real("qemu-img")
@pytest.mark.parametrize("options", [(), ("cluster_size=4k",), ("extended_l2=on",), ("compat=0.10",)], ids=str)
def test_cells_hold_what_the_map_of_qemu_img_says(tmp_path: Path, options: tuple[str, ...]) -> None:
    base, path = tmp_path / "base", tmp_path / "image"
    rng = random.Random(str(options))
    extra = [word for option in options for word in ("-o", option)]
    qemu_img("create", "-q", "-f", "qcow2", *extra, base, str(SIZE - (1 << 20)))
    with qcowlib.open(base, "r+") as image:
        image.pwrite(rng.randbytes(1 << 20), 3 << 20)
    qemu_img("create", "-q", "-f", "qcow2", *extra, "-b", base, "-F", "qcow2", path, str(SIZE))
    fill(path, rng)
    picture = survey(path, cells=256)
    kinds, layers = picture.panels[0], picture.panels[1]
    data = [0] * len(kinds.cells)
    top = [0] * len(kinds.cells)
    for entry in qemu_map(path):
        start, length, depth = entry.start, entry.length, entry.depth
        while length:
            cell = start // kinds.cell_bytes
            step = min(length, (cell + 1) * kinds.cell_bytes - start)
            data[cell] += step * entry.data
            top[cell] += step * (entry.present and depth == 0)
            start, length = start + step, length - step
    assert [cell[2] + cell[3] + cell[5] for cell in kinds.cells] == data
    assert [cell[1] for cell in layers.cells] == top
    for panel in picture.panels:
        assert sum(panel.totals) == panel.total


def test_the_file_is_told_by_what_refers_to_it(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qcowlib.create(path, SIZE)
    with qcowlib.open(path, "r+") as image:
        image.pwrite(b"a" * (1 << 20), 0)
        image.create_snapshot("s")
        image.pwrite(b"b" * (256 << 10), 0)
        image.pwrite(b"c" * (128 << 10), 8 << 20)
    panel = survey(path).panels[-1]
    found = by_label(panel)
    assert found["data of snapshots alone"] == 256 << 10
    assert found["data shared with snapshots"] == (1 << 20) - (256 << 10)
    assert found["data"] == (256 << 10) + (128 << 10)
    assert found["L2 tables"] == 2 << 16
    assert found["leaked"] == 0
    assert sum(panel.totals) == path.stat().st_size


def test_leaked_clusters_are_those_that_check_counts(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qcowlib.create(path, SIZE)
    with qcowlib.open(path, "r+") as image:
        image.pwrite(b"a" * (1 << 20), 0)
    with path.open("r+b") as file:  # the guest loses its table: everything behind it is leaked
        file.seek(int.from_bytes(file.read(48)[40:48], "big"))
        file.write(bytes(8))
    with qcowlib.open(path) as image:
        leaks = image.check().leaks
    assert leaks and by_label(survey(path).panels[-1])["leaked"] == leaks << 16


def test_raw_image_has_no_picture_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(1000))
    picture = survey(path, format="raw")
    assert [panel.title for panel in picture.panels] == ["The guest's disk"] * 2
    assert all(sum(panel.totals) == panel.total == picture.size for panel in picture.panels)


def test_image_without_a_byte_has_no_cells(tmp_path: Path) -> None:
    qcowlib.create(tmp_path / "image", 0)
    picture = survey(tmp_path / "image")
    assert picture.panels[0].cells == () and set(picture.panels[0].totals) == {0}


def test_file_that_claims_to_be_huge_costs_no_more(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qcowlib.create(path, 1 << 30, cluster_size=512)
    with path.open("r+b") as file:
        file.truncate(1 << 43)
    panel = survey(path).panels[-1]
    assert len(panel.cells) <= 8192 and panel.total == 1 << 43


@pytest.mark.parametrize("case", [case for case in hostile_cases() if case.whole], ids=lambda case: case.name)
def test_hostile_image_gives_a_picture_or_one_clear_error(
    tmp_path: Path, case: HostileCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = materialize(case, str(tmp_path))
    try:
        picture = survey(path, references=qcowlib.deny_all)
    except qcowlib.Error as error:
        assert str(error).isprintable()
    else:
        assert sum(len(panel.cells) for panel in picture.panels) <= 4 * 8192
