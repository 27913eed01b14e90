# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Every command that works with whole images: its plan changes nothing, its JSON is JSON, its progress ends at 100."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qcowlib

MiB = 1 << 20
#: What each command is called with to do its work; {} is where options go.
LINES = {
    "merge": "merge {} --from mid top",
    "merge --new": "merge {} --from base --to mid --new whole top",
    "compact": "compact {} mid",
    "diff": "diff {} base mid",
    "diff --stream": "diff {} --stream out base mid",
    "diff --overlay": "diff {} --overlay over -F qcow2 base mid",
    "apply": "apply {} copy changes",
    "apply --overlay": "apply {} -f qcow2 --overlay over copy changes",
    "seal": "seal {} mid",
    "seal --bitmap": "seal {} --bitmap b top",
    "verify": "verify {} top",
    "verify --from": "verify {} --from replica --seal sealed bad",
    "salvage": "salvage {} mid rescued",
    "backup": "backup {} --bitmap b --advance -b base -F qcow2 top new",
    "backup-set": "backup-set {} journal set",
    "backup-set --restore": "backup-set {} --restore journal pairs",
    "restore": "restore {} increment copy",
    "overlay": "overlay {} -b base -F qcow2 --count 20 vm-%03d",
}
NO_TARGET = {"salvage": "salvage {} mid", "diff --stream": "diff {} base mid", "diff --overlay": "diff {} base mid"}


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the lines name."""
    here = tmp_path_factory.mktemp("pattern")
    qcowlib.create(here / "base", 4 * MiB)
    with qcowlib.open(here / "base", "r+") as image:
        image.pwrite(b"base" * 100_000, 0)
    for name, below in (("mid", "base"), ("top", "mid")):
        qcowlib.create(here / name, 4 * MiB, backing=below, backing_format="qcow2", check_backing=False)
    with qcowlib.open(here / "mid", "r+") as image:
        image.pwrite(b"mid" * 100_000, MiB)
        # Space in front of other space is given back: something to compact.
        image.discard(MiB // 4, MiB)
    with qcowlib.open(here / "top", "r+") as image:
        image.add_bitmap("b")
    qcowlib.seal(here / "top", here / "top.seal")
    with qcowlib.open(here / "top", "r+") as image:
        image.pwrite(b"top" * 100_000, 2 * MiB)
    qcowlib.backup(here / "top", here / "increment", "b", backing="mid", backing_format="qcow2", check_backing=False)
    qcowlib.convert(here / "base", here / "copy")
    qcowlib.convert(here / "base", here / "replica")
    qcowlib.convert(here / "base", here / "bad")
    qcowlib.seal(here / "replica", here / "sealed")
    with qcowlib.open(here / "bad", "r+") as image:
        image.pwrite(b"bad", 100_000)
    with (here / "changes").open("wb") as stream:
        qcowlib.write_diff(here / "base", here / "mid", stream)
    entry = {"source": "top", "target": "new", "bitmap": "b", "backing": "base", "backing-format": "qcow2"}
    (here / "set").write_text(json.dumps([entry]))
    (here / "pairs").write_text(json.dumps([{"increment": "increment", "target": "copy"}]))
    return here


@pytest.fixture
def folder(pattern: Path, tmp_path: Path) -> Path:
    shutil.copytree(pattern, tmp_path, dirs_exist_ok=True)
    return tmp_path


def state(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", LINES)
def test_plan_says_something_and_changes_nothing(qcow: Callable[..., Any], folder: Path, name: str) -> None:
    before = state(folder)
    line = NO_TARGET.get(name, LINES[name])
    for options, judge in (("--plan", str), ("--plan --output=json", json.loads)):
        done = qcow(*line.format(options).split())
        assert (done.status, done.err) == (0, "") and judge(done.out), (line, done)
        assert state(folder) == before


@pytest.mark.parametrize("name", LINES)
def test_work_is_shown_from_0_to_100_and_answered_in_json(qcow: Callable[..., Any], folder: Path, name: str) -> None:
    before = state(folder)
    done = qcow(*LINES[name].format("--progress=json --output=json").split())
    # verify finds what was written since.
    assert done.status == (2 if name == "verify" else 0), done
    percents = [json.loads(text)["percent"] for text in done.err.splitlines()]
    assert (percents[0], percents[-1]) == (0, 100) and percents == sorted(percents)
    assert done.out == "" or json.loads(done.out) is not None
    assert (state(folder) != before) == (name not in ("diff", "verify"))


@pytest.mark.parametrize("name", LINES)
def test_progress_is_lines_that_end_at_100(qcow: Callable[..., Any], folder: Path, name: str) -> None:
    done = qcow(*LINES[name].format("-p").split())
    found = re.findall(r"^ +\((\d+\.\d\d)/100%\)", done.out + done.err, re.MULTILINE)
    assert (found[0], found[-1]) == ("0.00", "100.00")


def test_plan_of_mending_is_what_mending_does(qcow: Callable[..., Any], folder: Path) -> None:
    line = "verify {} --output=json --from replica --seal sealed bad"
    planned = json.loads(qcow(*line.format("--plan").split()).out)
    done = json.loads(qcow(*line.format("").split()).out)
    assert planned == done and done["mended"] == 65536
    assert qcow(*line.format("--plan").split()).out.count('"mended": 0') == 1


def test_plan_of_a_restore_is_what_a_restore_writes(qcow: Callable[..., Any], folder: Path) -> None:
    found = json.loads(qcow("restore", "--plan", "--output=json", "increment", "copy").out)
    assert found == {
        "filename": "copy",
        "data": 5 * 65536,
        "zeros": 0,
        "virtual-size": 4 * MiB,
        "virtual-size-before": 4 * MiB,
    }
    with qcowlib.open(folder / "copy", "r+") as image:
        image.resize(MiB, shrink=True)
    assert "resized from 1048576 to 4194304 bytes" in qcow("restore", "--plan", "increment", "copy").out
