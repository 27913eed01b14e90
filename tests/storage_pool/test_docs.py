# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The example of the documentation runs."""

import re

from storage_pool.check import check_domain
from storage_pool.file_domain import FileDomain


def test_the_example_runs_and_leaves_a_sound_domain(project_root, tmp_path):
    text = (project_root / "docs/storage_domains.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code, "example", "exec"), {"place": str(tmp_path)})
    with FileDomain.open(str(tmp_path)) as domain:
        report = check_domain(domain)
    assert report.clean and (report.images, report.volumes) == (3, 3)
