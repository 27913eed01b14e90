# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The demo finds nothing wrong with a small disk, and reports what a step finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qcowlib.cli import demo_steps
from qcowlib.cli.demo import Demo, Judge, Problem, Step, run_demo
from qcowlib.cli.main import main

pytestmark = pytest.mark.real("qemu-img", "mke2fs")

MiB = 1 << 20
SMALL = {"size": 32 * MiB, "data": 4 * MiB, "overlays": 20}


def test_all_steps_pass_and_the_directory_is_gone(tmp_path: Path) -> None:
    said: list[str] = []
    assert run_demo(said.append, directory=str(tmp_path), **SMALL) == 0
    assert said[-1].endswith("0 problems\n")
    assert len(said) == len(demo_steps.STEPS) + 2
    assert list(tmp_path.iterdir()) == []


def test_json_holds_each_step_with_its_time_and_the_verdicts(tmp_path: Path) -> None:
    said: list[str] = []
    assert run_demo(said.append, as_json=True, directory=str(tmp_path), **SMALL) == 0
    result = json.loads("".join(said))
    assert [step["step"] for step in result["steps"]] == [step.title for step in demo_steps.STEPS]
    assert all(step["problem"] is None and step["seconds"] >= 0 for step in result["steps"])
    assert result["verdicts-of-qemu-img"] > 10
    assert result["problems"] == 0


def test_without_qemu_img_the_steps_still_compare_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcowlib.cli.demo.shutil.which", lambda *program, **path: None)
    said: list[str] = []
    assert run_demo(said.append, as_json=True, directory=str(tmp_path), **SMALL) == 0
    result = json.loads("".join(said))
    assert result["verdicts-of-qemu-img"] is None
    assert result["guest-bytes"] > 4 * SMALL["size"]


def test_problem_of_a_step_is_reported_and_the_next_step_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(demo: Demo) -> tuple[str, dict[str, int]]:
        raise Problem("two bytes differ")

    steps = (Step("first", wrong), Step("second", lambda demo: ("fine", {})))
    monkeypatch.setattr(demo_steps, "STEPS", steps)
    said: list[str] = []
    assert run_demo(said.append) == 1
    assert "PROBLEM  first: two bytes differ" in said[1]
    assert "ok  second: fine" in said[2]
    assert said[-1].endswith("1 problems\n")


def test_progress_that_stops_early_is_a_problem(tmp_path: Path) -> None:
    demo = Demo(tmp_path, size=1, data=1, overlays=1, on_progress=lambda text: None)
    with pytest.raises(Problem, match="ended at 5 of 10"), demo.progress("copy") as report:
        report(5, 10)


def test_judge_refuses_what_qemu_img_refuses(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"QFI\xfb" + bytes(1000))
    with pytest.raises(Problem, match="qemu-img check a"):
        Judge().check(tmp_path / "a")


def test_command_refuses_an_argument(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "extra"]) == 1
    assert "Unexpected argument: extra" in capfd.readouterr().err
