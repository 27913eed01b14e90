# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The command with JSON answers, and domains made by it."""

import json

import pytest

from storage_pool.cli.main import main


@pytest.fixture
def answer(capfd, tmp_path):
    """Run ``qpool`` with ``--output=json``; returns its document, or standard error where it fails."""

    def run(*arguments, status=0):
        assert main([*map(str, arguments), "--lock", str(tmp_path / "lock"), "--output=json"]) == status
        got = capfd.readouterr()
        assert "Traceback" not in got.err
        run.err = got.err
        return json.loads(got.out) if got.out else got.err

    return run


@pytest.fixture
def place(answer, tmp_path):
    """Make a domain and return its directory."""
    made = []

    def make(*options):
        path = tmp_path / f"place{len(made)}"
        path.mkdir()
        answer("domain", "create", path, *options)
        made.append(path)
        return path

    return make
