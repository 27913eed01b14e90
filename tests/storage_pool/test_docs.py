# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The examples of the documentation run."""

import re

import pytest

from storage_pool import connect
from storage_pool.check import check_domain
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


@pytest.mark.parametrize("name", ["Engine", "Disk", "connect"])
def test_public_names_come_from_the_package(name):
    import storage_pool

    assert getattr(storage_pool, name).__doc__ and name in storage_pool.__all__
    with pytest.raises(AttributeError):
        storage_pool.nothing  # noqa: B018
