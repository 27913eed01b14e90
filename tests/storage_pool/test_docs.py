# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The examples of the documentation run."""

import argparse
import re

import pytest

from spm.cli.main import SUBJECTS
from storage_pool import connect
from storage_pool.check import check_domain
from storage_pool.cli.main import make_parser
from storage_pool.file_domain import FileDomain


def examples(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


def test_the_example_runs_and_leaves_a_sound_domain(project_root, tmp_path):
    (code,) = examples(project_root / "docs/storage_domains.md")
    exec(compile(code, "example", "exec"), {"place": str(tmp_path)})
    with FileDomain.open(str(tmp_path)) as domain:
        report = check_domain(domain)
    assert report.clean and (report.images, report.volumes) == (3, 3)


def test_the_example_of_the_readme_is_short_and_runs(project_root, tmp_path, capsys, monkeypatch):
    (code,) = [text for text in examples(project_root / "README.md") if "storage_pool" in text]
    lines = [line for line in code.splitlines() if not line.startswith("# ->")]
    assert len(lines) <= 20
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {})
    assert capsys.readouterr().out.splitlines() == ["b'hello'", "3 True"]
    with connect(tmp_path) as engine:
        (pool,), (data,) = engine.pools(), engine.domains()
        assert pool.members == {data.uuid: "Active"}


def verbs(parser):
    subjects = next((one for one in parser._actions if isinstance(one, argparse._SubParsersAction)), None)
    return {} if subjects is None else subjects.choices


def test_the_table_of_commands_is_that_of_the_parser(project_root):
    text = (project_root / "docs/storage_domains.md").read_text()
    told = {
        subject: set(words.split()) for subject, words in re.findall(r"^\| `(\w+)` \| `([a-z -]+)`", text, re.MULTILINE)
    }
    subjects = verbs(make_parser(SUBJECTS))
    assert told == {name: set(verbs(parser)) for name, parser in subjects.items() if verbs(parser)}
    assert {name for name, parser in subjects.items() if not verbs(parser)} == {"check", "demo"}


def test_commands_of_the_guide_parse(project_root):
    text = (project_root / "docs/guide/26-storage-pools.md").read_text()
    commands = re.findall(r"^qpool (.+)$", text, re.MULTILINE)
    assert len(commands) >= 12
    for command in commands:
        words = [
            word.replace("$DOMAIN", "x").replace("$IMAGE", "y").replace("$VOLUME", "z") for word in command.split()
        ]
        assert make_parser(SUBJECTS).parse_args(words).run


@pytest.mark.parametrize("name", ["Engine", "Disk", "connect"])
def test_public_names_come_from_the_package(name):
    import storage_pool

    assert getattr(storage_pool, name).__doc__ and name in storage_pool.__all__
    with pytest.raises(AttributeError):
        storage_pool.nothing  # noqa: B018
