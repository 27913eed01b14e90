# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Command lines, valid and not: what we print and return is what the real qemu-img prints and returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.real("qemu-img", "qemu-io")

HERE = Path(__file__).parent
TABLES = sorted(HERE.glob("lines/*.txt"))


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.stem)
def test_lines_do_the_same(table: Path, pair: Any) -> None:
    """Each line of a table runs on what the lines before it left; ``!`` lines only prepare.

    What the file occupies on the host is left out of lines with ``~``.
    """
    compared = 0
    for line in table.read_text().splitlines():
        if line.startswith("!"):
            pair.setup(line[1:])
        elif not line.startswith("#"):
            pair.compare(line)
            compared += 1
    assert compared > 5


def test_names_in_another_folder_mean_the_same(pair: Any) -> None:
    """A path is seen from the folder of the overlay, one behind ``file:`` or in ``json:`` from here."""
    for folder in (pair.real, pair.ours):
        (folder / "sub").mkdir()
    pair.setup(
        "create -q -f qcow2 sub/base 1M",
        "create -q -f qcow2 -b base -F qcow2 sub/mid",
        "create -q -f qcow2 -b mid -F qcow2 sub/top",
        "create -q -f qcow2 base 2M",
        'io sub/top "write -P 3 0 64k"',
    )
    json_name = 'json:{"driver":"qcow2","file":{"driver":"file","filename":"base"}}'
    for line in (
        "commit -b nope sub/top",
        "commit -b sub/mid sub/top",
        "commit -b top sub/top",
        "commit -b file:mid sub/top",
        "commit -b mid sub/top",
        "commit -b ../sub/base sub/top",
        "commit -d -b base sub/top",
        "info --output=json -U sub/top",
        "create -f qcow2 -b file:base -F qcow2 sub/o",
        "create -f qcow2 -b file:sub/base -F qcow2 sub/p",
        f"create -f qcow2 -b '{json_name}' -F qcow2 sub/q",
        "info --output=json --backing-chain sub/o",
        "info --backing-chain sub/p",
        "info --backing-chain sub/q",
        "map sub/o",
        "map --output=json sub/q",
        "rebase -b file:sub/base -F qcow2 sub/o",
        "map --output=json sub/o",
        "commit sub/o",
        "commit -b file:base sub/p",
        "commit -b sub/base sub/p",
        "commit -b file:sub/base sub/p",
    ):
        pair.compare(line)
