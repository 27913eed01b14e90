# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Completion files and manual page are current, and complete what they should; each example in the help runs."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qcowlib.cli.main import COMMANDS, command_module
from qcowlib.cli.shell import FILES

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("name", FILES)
def test_files_are_what_the_tables_say(name: str) -> None:
    """``python -m qcowlib.cli.shell`` makes them anew."""
    assert (ROOT / name).read_text(encoding="utf-8") == FILES[name]()


def complete(*words: str, where: Path) -> list[str]:
    """Return what bash offers for the last of *words*, which are split as bash splits them."""
    script = (
        f"source {shlex.quote(str(ROOT / 'completions/qcow'))}\n"
        f"COMP_WORDS=({' '.join(map(shlex.quote, words))}); COMP_CWORD={len(words) - 1}\n"
        "_qcow; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(["bash", "-c", script], cwd=where, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return [line for line in done.stdout.splitlines() if line]


def test_bash_completes_commands_options_values_and_files(tmp_path: Path) -> None:
    (tmp_path / "disk one.qcow2").touch()
    assert complete("qcow", "", where=tmp_path) == list(COMMANDS)
    assert complete("qcow", "--v", where=tmp_path) == ["--version"]
    assert complete("qcow", "check", "--o", where=tmp_path) == ["--output", "--object"]
    assert complete("qcow", "check", "-r", "", where=tmp_path) == ["leaks", "all"]
    assert complete("qcow", "info", "--output", "=", "j", where=tmp_path) == ["json"]
    assert complete("qcow", "info", "--output", "=", where=tmp_path) == ["human", "json"]
    assert complete("qcow", "info", "di", where=tmp_path) == ["disk one.qcow2"]
    assert complete("qcow", "create", "-b", "di", where=tmp_path) == ["disk one.qcow2"]
    assert complete("qcow", "resize", "--preallocation", "fa", where=tmp_path) == ["falloc"]
    assert complete("qcow", "convert", "-m", "di", where=tmp_path) == []
    commands = ["chain", "check", "commit", "compact", "compare", "convert", "create"]
    assert complete("qcow", "-h", "c", where=tmp_path) == commands


@pytest.mark.parametrize("name", COMMANDS)
def test_every_shell_and_the_page_know_every_option(name: str) -> None:
    texts = {file: make() for file, make in FILES.items()}
    for option in command_module(name).COMMAND.options:
        if option.long:
            assert f"--{option.long}" in texts["completions/qcow"]
            assert f"--{option.long}" in texts["completions/_qcow"]
            assert f"-l {option.long} " in texts["completions/qcow.fish"]
            assert f"\\-\\-{option.long.replace('-', chr(92) + '-')}" in texts["docs/qcow.1"]
        else:
            assert f"-{option.short}[" in texts["completions/_qcow"]
            assert f"-s {option.short} " in texts["completions/qcow.fish"]


def test_no_text_of_the_page_is_taken_for_a_request() -> None:
    known = {".TH", ".SH", ".SS", ".TP", ".PP", ".B", ".BI", ".BR", ".I", ".RI", ".EX", ".EE"}
    for line in FILES["docs/qcow.1"]().splitlines():
        assert not line.startswith("'")
        if line.startswith(".") and not line.startswith('.\\"'):
            assert line.split()[0] in known, line


@pytest.fixture
def stage(qcow: Any) -> Any:
    """Give the command in a directory where the images of the examples exist."""
    for line in (
        "create -q -f qcow2 base.qcow2 4M",
        "create -q -f qcow2 new-base.qcow2 4M",
        "create -q disk.raw 4M",
        "create -q -f qcow2 disk.qcow2 4M",
        "create -q -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2",
        "create -q -f qcow2 -b base.qcow2 -F qcow2 third.qcow2",
        "create -q -f qcow2 -b third.qcow2 -F qcow2 top.qcow2",
        "create -q -f qcow2 copy.qcow2 4M",
        "bitmap --add disk.qcow2 nightly",
        "create -q -f qcow2 full.qcow2 4M",
        "create -q -f qcow2 -b full.qcow2 -F qcow2 monday.qcow2",
    ):
        assert qcow(*line.split()).status == 0, line
    assert qcow("create", "-q", "-f", "qcow2", "old.qcow2", "4M").status == 0
    assert qcow("diff", "-q", "--stream", "changes.diff", "old.qcow2", "disk.qcow2").status == 0
    assert qcow("seal", "-q", "disk.qcow2").status == 0
    return qcow


# The demo is a long run with a test of its own.
@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "demo"])
def test_the_example_of_the_help_runs(stage: Any, name: str) -> None:
    outcome = stage(*shlex.split(command_module(name).COMMAND.example))
    assert (outcome.status, outcome.err) == (0, "")
