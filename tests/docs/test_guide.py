# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Every example of the guide runs and prints what the guide says; links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs import examples

pytestmark = pytest.mark.bare

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs/guide"
CHAPTERS = sorted(path for path in GUIDE.glob("*.md") if path.name != "README.md")


def chapter(path: Path) -> object:
    # Chapters whose commands call the real program are left out where it is not installed.
    wanted = [
        name
        for name in ("qemu-img", "qemu-io", "nbdinfo", "nbdkit")
        if re.search(rf"^\s*{name} ", path.read_text(), re.MULTILINE)
    ]
    return pytest.param(path, marks=[pytest.mark.real(*wanted)] if wanted else [], id=path.stem)


@pytest.mark.parametrize("path", [chapter(path) for path in CHAPTERS])
def test_examples_of_the_chapter_run_and_print_what_it_says(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    assert examples.run_blocks(path, tmp_path / "bin") > 0


def test_index_names_every_chapter_once() -> None:
    text = (GUIDE / "README.md").read_text()
    assert sorted(re.findall(r"\]\((\d\d-[\w-]+\.md)\)", text)) == [path.name for path in CHAPTERS]


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))], ids=lambda path: path.stem)
def test_links_lead_to_files_of_the_project(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
        # That table is made on demand, by ./run bench.
        if "://" not in target and not target.endswith("benchmarks.md"):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_an_example_that_prints_something_else_is_noticed() -> None:
    with pytest.raises(AssertionError, match="promised"):
        examples.compare_output("one\n", ["two"], "here")
    with pytest.raises(AssertionError, match="promised"):
        examples.compare_output("one\ntwo\n", ["one"], "here")
    examples.compare_output("size 12 of 13\n", ["size ... of 13"], "here")


def test_an_example_of_another_kind_is_noticed(tmp_path: Path) -> None:
    text = tmp_path / "text.md"
    text.write_text("```perl\nprint 1;\n```\n")
    with pytest.raises(AssertionError, match="not executed"):
        examples.run_blocks(text, tmp_path / "bin")
