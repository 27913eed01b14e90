# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Trees of chains: every image once, in its place, with what is wrong beside it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qcowlib
from qcowlib.picture.tree import ChainNode, ChainTree, _Look, chain_tree


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(name: str, base: str | None = None, base_format: str | None = "qcow2") -> None:
    if base is None:
        qcowlib.create(name, 1 << 20)
    else:
        qcowlib.create(name, 1 << 20, backing=base, backing_format=base_format, check_backing=False)


def test_folder_is_drawn_with_every_image_once() -> None:
    Path("base.raw").write_bytes(bytes(1 << 20))
    Path("note.txt").write_text("no image")
    make("a.qcow2", "base.raw", "raw")
    make("b.qcow2", "a.qcow2")
    make("c.qcow2", "a.qcow2")
    make("alone.qcow2")
    drawn = [line.partition("  qcow2")[0].partition("  raw")[0] for line in chain_tree(["."]).lines()]
    assert drawn == ["alone.qcow2", "base.raw", "└── a.qcow2", "    ├── b.qcow2", "    └── c.qcow2"]
    assert any("shared by 2" in line for line in chain_tree(["."]).lines())


def test_one_image_shows_what_it_stands_on() -> None:
    make("base.qcow2")
    make("disk.qcow2", "base.qcow2")
    tree = chain_tree(["disk.qcow2"])
    assert [(item["filename"], item["depth"], item["backing"]) for item in tree.to_dict()] == [
        ("base.qcow2", 0, None),
        ("disk.qcow2", 1, "base.qcow2"),
    ]


def test_the_same_file_under_two_names_is_one() -> None:
    make("base.qcow2")
    make("a.qcow2", "base.qcow2")
    make("b.qcow2", os.path.abspath("base.qcow2"))  # noqa: PTH100
    Path("link.qcow2").symlink_to("base.qcow2")
    assert len(chain_tree(["."]).nodes) == 3


def test_missing_and_refused_bases_are_told() -> None:
    make("lost.qcow2", "gone.qcow2")
    (problem,) = [node.problem for node in chain_tree(["."]).nodes.values() if node.problem]
    assert "No such file" in problem
    make("gone.qcow2")
    tree = chain_tree(["lost.qcow2"], references=qcowlib.deny_all)
    (problem,) = [node.problem for node in tree.nodes.values() if node.problem]
    assert "forbids" in problem


def test_loop_is_told_and_ends() -> None:
    make("a.qcow2", "b.qcow2")
    make("b.qcow2", "c.qcow2")
    make("c.qcow2", "a.qcow2")
    make("d.qcow2", "b.qcow2")
    tree = chain_tree(["."])
    assert sorted(key.rpartition("/")[2] for key, *_ in tree.walk()) == ["a.qcow2", "b.qcow2", "c.qcow2", "d.qcow2"]
    assert sum("a loop" in line for line in tree.lines()) == 1


def test_damaged_image_is_told() -> None:
    make("a.qcow2")
    with open("a.qcow2", "r+b") as file:
        file.seek(20)
        file.write(bytes([0, 0, 0, 99]))
    (node,) = chain_tree(["."]).nodes.values()
    assert node.virtual_size is None and "luster size" in (node.problem or "")


@given(st.lists(st.one_of(st.none(), st.integers(0, 11)), min_size=1, max_size=12))
def test_whatever_stands_on_what_each_image_is_drawn_once(bases: list[int | None]) -> None:
    look = _Look(qcowlib.deny_all)
    for number, base in enumerate(bases):
        key = None if base is None else f"n{base % len(bases)}"
        look._nodes[f"n{number}"] = ChainNode(f"n{number}", "qcow2", 1, 1, key)
    tree: ChainTree = look.tree()
    assert sorted(key for key, *_ in tree.walk()) == sorted(tree.nodes)
    assert len(list(tree.lines())) == len(bases)
