# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The completion files and the manual page of qpool are those of its parser, and shells take them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = ("completions/qpool", "completions/_qpool", "docs/qpool.1")

pytestmark = pytest.mark.bare


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qpool")
    subprocess.run([sys.executable, ROOT / "docs/make_qpool.py", folder], check=True)
    return folder


@pytest.mark.parametrize("name", FILES)
def test_file_is_up_to_date(made, name):
    """``python docs/make_qpool.py`` makes them anew."""
    assert (made / name).read_text() == (ROOT / name).read_text()


def test_bash_takes_the_completion_and_completes_subjects():
    script = (
        f"source {ROOT}/completions/qpool; COMP_WORDS=(qpool ho); COMP_CWORD=1; _shtab_qpool; echo ${{COMPREPLY[*]}}"
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["host"]


def test_manual_names_every_verb_of_a_host():
    text = (ROOT / "docs/qpool.1").read_text().replace("\\-", "-")
    for word in ("qpool host run", "--sanlock-run-dir", "--io-timeout", "start-spm"):
        assert word in text
