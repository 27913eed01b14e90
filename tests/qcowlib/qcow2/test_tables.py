# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Tables read ahead for a map, beside those that reads keep."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import qcowlib
from qcowlib.driver import Extent
from qcowlib.errors import CorruptImage

CLUSTER = 512
TABLES = 300
SPAN = CLUSTER // 8 * CLUSTER


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """An overlay and its base whose tables lie in an order of their own."""
    chance = random.Random(3)
    below = None
    for name in ("base", "top"):
        path = tmp_path / name
        qcowlib.create(
            path, TABLES * SPAN, cluster_size=CLUSTER, backing=below, backing_format="qcow2" if below else None
        )
        places = sorted(chance.sample(range(TABLES * SPAN // CLUSTER), 400))
        places = places[:200] + chance.sample(places[200:], 200)
        with qcowlib.open(path, "r+") as image:
            for place in places:
                image.pwrite(bytes([place % 255 + 1]) * CLUSTER, place * CLUSTER)
        below = path
    return tmp_path / "top"


def found(image: qcowlib.Image) -> list[Extent]:
    return list(image.extents())


def test_the_map_is_that_of_an_image_open_for_writing(chain: Path) -> None:
    with qcowlib.open(chain) as reading:
        extents = found(reading)
        again = found(reading)
    with qcowlib.open(chain, "r+") as writing:
        assert found(writing) == extents == again
    assert len(extents) > 500


def test_reads_and_maps_of_several_threads_do_not_disturb_each_other(chain: Path) -> None:
    with qcowlib.open(chain) as image, ThreadPoolExecutor(4) as pool:
        extents = found(image)
        data = image.pread(image.size, 0)

        def task(number: int) -> bool:
            if number % 2:
                return list(image.extents(number * SPAN)) == list(image.extents(number * SPAN))
            chance = random.Random(number)
            places = [chance.randrange(image.size - 999) for _ in range(200)]
            return all(image.pread(999, place) == data[place : place + 999] for place in places)

        assert all(pool.map(task, range(16)))
        assert found(image) == extents


def test_a_table_that_the_file_does_not_have_is_an_error(chain: Path) -> None:
    with qcowlib.open(chain, backing=False) as image:
        used = [extent.start for extent in image.extents() if extent.kind == "data"]
    with chain.open("r+b") as file:
        file.seek(40)
        index = used[-1] // SPAN
        file.seek(int.from_bytes(file.read(8), "big") + 8 * index)
        file.write((1 << 40).to_bytes(8, "big"))
    with qcowlib.open(chain) as image, pytest.raises(CorruptImage, match="past the end of the file"):
        found(image)
