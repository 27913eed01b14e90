# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The demo of a pool finds nothing wrong, kills what it says, and leaves nothing."""

import json

import pytest

from storage_pool.cli import demo
from storage_pool.cli.main import main


@pytest.mark.real("lvm", "losetup", "mke2fs")
def test_the_demo_runs_on_files_and_on_a_volume_group(tmp_path, capsys):
    assert main(["demo", "--output=json", f"--directory={tmp_path}"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["problems"] == 0
    assert {step["kind"] for step in told["steps"]} == {"files", "volume group"}
    merges = [step["text"] for step in told["steps"] if step["step"].startswith("merge")]
    assert len(merges) == 2 and all(text.startswith("killed ") for text in merges)
    assert list(tmp_path.iterdir()) == []


def test_a_problem_is_told_and_the_status_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "_has_groups", lambda: False)
    monkeypatch.setattr(demo._Demo, "compare", lambda self, *volumes: problem())

    def problem():
        raise demo.Problem("other data")

    assert main(["demo", f"--directory={tmp_path}"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any("PROBLEM" in line and line.endswith("other data") for line in lines)
