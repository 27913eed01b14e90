# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""What the README says is so: its examples run, its tasks exist, its table names real proofs."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests.docs import examples

pytestmark = pytest.mark.bare

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()
TABLE = TEXT[TEXT.index("## What is read and written") :]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TABLE.splitlines()
    if line.startswith("|") and "`tests/" in line
]


def test_examples_run_and_print_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    assert examples.run_blocks(ROOT / "README.md", tmp_path / "bin", leave_out=r"^\./run ") == 5


def test_first_minute_is_two_commands_that_exist() -> None:
    first = next(block for block in examples.blocks(TEXT) if "./run" in block.code)
    assert first.code == "./run demo\n./run test\n"
    usage = subprocess.run(["sh", ROOT / "run", "help"], capture_output=True, text=True, check=True, timeout=60).stdout
    for task in ("demo", "test"):
        assert re.search(rf"^  {task}\b", usage, re.MULTILINE)


def source_of(test: str) -> tuple[str, ast.Module, ast.FunctionDef]:
    path, name = test.split("::")
    text = (ROOT / path).read_text()
    tree = ast.parse(text)
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name]
    assert found, f"{test} does not exist"
    return text, tree, found[0]


def compares_with_qemu(test: str) -> bool:
    """Return whether the test, or its whole file, is marked as one that needs the real program."""
    _, tree, function = source_of(test)
    marks = [ast.unparse(decorator) for decorator in function.decorator_list]
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            marks.append(ast.unparse(node.value))
    return any("mark.real(" in mark and "qemu" in mark for mark in marks)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_row_of_the_table_names_tests_that_prove_it(row: list[str]) -> None:
    assert len(row) == 5 and any(row[1:4])
    proofs = re.findall(r"`(tests/[^`]+)`", row[4])
    assert proofs
    for proof in proofs:
        source_of(proof)
    if row[3]:
        assert any(compares_with_qemu(proof) for proof in proofs), f"{row[0]}: no proof asks the real program"


def test_table_has_the_rows_of_the_format() -> None:
    assert len(ROWS) >= 20
