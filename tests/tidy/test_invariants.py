# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Invariants are numbered in docs/invariants.md; code and tests cite only numbers that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.bare

ROOT = Path(__file__).resolve().parents[2]
CITATION = re.compile(r"Invariants?:?\s+((?:[IS]\d+)(?:(?:,\s*|\s+and\s+)[IS]\d+)*)")


def defined() -> set[str]:
    """Return the numbers that docs/invariants.md defines."""
    return set(re.findall(r"^\| ([IS]\d+) \|", (ROOT / "docs/invariants.md").read_text(), re.MULTILINE))


def cited(folder: str, pattern: str) -> dict[str, list[str]]:
    """Return the files under *folder* that cite each number."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / folder).rglob(pattern)):
        for citation in CITATION.findall(path.read_text()):
            for number in re.findall(r"[IS]\d+", citation):
                found.setdefault(number, []).append(path.relative_to(ROOT).as_posix())
    return found


def test_document_numbers_each_invariant_of_the_engine_once() -> None:
    numbers = re.findall(r"^\| (I\d+) \|", (ROOT / "docs/invariants.md").read_text(), re.MULTILINE)
    assert numbers[:11] == [f"I{number}" for number in range(1, 12)]


@pytest.mark.parametrize("pattern", ["*.py", "*.pyx"])
@pytest.mark.parametrize("folder", ["qcowlib", "storage_pool", "spm", "tests"])
def test_cited_number_is_in_the_document(folder: str, pattern: str) -> None:
    unknown = {number: paths for number, paths in cited(folder, pattern).items() if number not in defined()}
    assert not unknown
