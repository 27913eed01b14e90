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


def test_the_example_of_the_readme_is_short_and_runs(project_root, tmp_path, capsys):
    (code,) = [text for text in examples(project_root / "README.md") if "storage_pool" in text]
    assert len(code.splitlines()) <= 20 and code.count('"/srv/pool"') == 1
    exec(compile(code.replace("/srv/pool", str(tmp_path)), "example", "exec"), {})
    first, last = capsys.readouterr().out.splitlines()
    assert first == "b'hello'" and last.endswith("True")
    with connect(tmp_path) as engine:
        (pool,), (data,) = engine.pools(), engine.domains()
        assert pool.members == {data.uuid: "Active"} and len(data.disks()) == 3


@pytest.mark.parametrize("name", ["Engine", "Disk", "connect"])
def test_public_names_come_from_the_package(name):
    import storage_pool

    assert getattr(storage_pool, name).__doc__ and name in storage_pool.__all__
    with pytest.raises(AttributeError):
        storage_pool.nothing  # noqa: B018
