# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Backup and restore as commands: rounds of one bitmap, what they say, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import qcowlib


@pytest.fixture
def disk(qcow: Any, tmp_path: Path) -> Any:
    """Give the command in a folder with a disk, its full backup, and changes since."""
    for line in ("create -q -f qcow2 disk 4M", "bitmap --add disk nightly", "convert -O qcow2 disk full"):
        assert qcow(*line.split()).status == 0, line
    write(tmp_path, b"new" * 100_000, 1 << 20)
    return qcow


def write(folder: Path, data: bytes, offset: int) -> None:
    with qcowlib.open(folder / "disk", "r+") as image:
        image.pwrite(data, offset)


def test_changed_ranges_are_listed(disk: Any) -> None:
    assert disk("backup", "--bitmap", "nightly", "--list", "disk").out == (
        "Offset          Length\n0x100000        0x50000\n"
    )
    found = disk("backup", "--bitmap", "nightly", "--list", "--output=json", "disk")
    assert json.loads(found.out) == [{"start": 1 << 20, "length": 0x50000}]
    disk("bitmap", "--clear", "disk", "nightly")
    assert json.loads(disk("backup", "--bitmap=nightly", "--list", "--output=json", "disk").out) == []


def test_rounds_of_one_bitmap(disk: Any, tmp_path: Path) -> None:
    line = ["backup", "--bitmap", "nightly", "--advance", "-F", "qcow2", "-b"]
    bound = json.loads(disk("backup", "--bitmap", "nightly", "--measure", "--output=json", "disk").out)
    first = disk(*line, "full", "disk", "monday")
    assert (first.status, first.out, first.err) == (0, "327680 bytes changed, now in monday.\n", "")
    assert (tmp_path / "monday").stat().st_size <= bound["required"] <= bound["fully-allocated"]
    write(tmp_path, b"more", 3 << 20)
    second = disk(*line, "monday", "--output=json", "-c", "-o", "cluster_size=4k", "disk", "tuesday")
    assert json.loads(second.out) == {
        "filename": "tuesday", "backing-filename": "monday", "changed": 65536, "advanced": True,
    }  # fmt: skip
    assert disk("compare", "disk", "tuesday").status == 0
    assert disk("convert", "-O", "qcow2", "full", "standby").status == 0
    assert disk("restore", "monday", "standby").out == "Increment restored.\n"
    assert json.loads(disk("restore", "--output=json", "tuesday", "standby").out) == {
        "filename": "standby", "virtual-size": 4 << 20,
    }  # fmt: skip
    assert disk("compare", "disk", "standby").status == 0


def test_progress_is_shown(disk: Any) -> None:
    line = ["backup", "-p", "--bitmap", "nightly", "-F", "qcow2", "-b", "full", "disk", "monday"]
    assert disk(*line).out == (
        "    (0.00/100%)\n    (100.00/100%)\n    (100.00/100%)\n327680 bytes changed, now in monday.\n"
    )
    assert disk("restore", "-p", "-q", "monday", "full").out == ""
    lines = disk("restore", "--progress=json", "monday", "full").err.splitlines()
    assert json.loads(lines[-1])["percent"] == 100


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("backup disk new", "Need at least one --bitmap"),
        ("backup --bitmap nightly disk new", "The backup before is needed: -b BACKING -F FMT"),
        ("backup --bitmap nightly -b full disk new", "The backup before is needed: -b BACKING -F FMT"),
        ("backup --bitmap nightly disk", "Expecting an image and the name of a new file"),
        ("backup --bitmap nightly --list disk new", "Expecting one image file name"),
        ("backup --bitmap nightly --list --measure disk", "--list and --measure cannot be used together"),
        ("backup --bitmap nightly --list --advance disk", "--advance and -b are for copying"),
        ("backup --bitmap x --list disk", "disk: Dirty bitmap 'x' not found"),
        ("backup --bitmap nightly -b gone -F qcow2 disk new", "Could not open 'gone': No such file"),
        ("backup --bitmap nightly -b full -F qcow2 -o size=1M disk new", "does not take the option 'size'"),
        ("backup --bitmap nightly -b full -F qcow2 -o foo=1 disk new", "Invalid parameter 'foo'"),
        ("backup --bitmap nightly -b full -F qcow2 --advance -t unsafe disk new", "is not durable"),
        ("backup --bitmap nightly -b full -F qcow2 disk disk", "Is another process using the image"),
        ("backup --bitmap nightly -b full -F qcow2 full new", "not found"),
        ("restore full", "Expecting an increment and the image to write to"),
        ("restore full disk", "full: not an increment: it has no backing file"),
        ("restore gone disk", "Could not open 'gone'"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(disk: Any, tmp_path: Path, line: str, text: str) -> None:
    before = (tmp_path / "disk").read_bytes()
    outcome = disk(*line.split())
    assert outcome.status == 1
    assert outcome.out == ""
    assert outcome.err.startswith("qcow: ")
    assert text in outcome.err
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "disk").read_bytes() == before


def test_option_help_is_that_of_the_format(qcow: Any) -> None:
    assert "cluster_size=<size>" in qcow("backup", "-o", "help").out
