# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The check against qemu-img check: same lines, same counts, same verdict."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcowlib.errors import FormatError
from qcowlib.qcow2.check import Report, check
from qcowlib.storage.file import FileStorage

_spec = importlib.util.spec_from_file_location("corpus", Path(__file__).with_name("corpus.py"))
assert _spec is not None and _spec.loader is not None
corpus = importlib.util.module_from_spec(_spec)
sys.modules["corpus"] = corpus
_spec.loader.exec_module(corpus)

ALL = 1 << 20


def check_file(path: Path, limit: int = ALL) -> Report:
    storage = FileStorage.open(str(path))
    try:
        return check(storage, limit=limit)
    finally:
        storage.close()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, corpus.Image]:
    folder = tmp_path_factory.mktemp("images")
    return {name: corpus.Image(name, corpus.make(folder, name).read_bytes()) for name in corpus.OPTIONS}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "image.qcow2"


def assert_same(path: Path, *, luks: bool = False) -> Report | None:
    """Compare both checks of *path*; None if neither opens it."""
    real = corpus.qemu_check(path, luks=luks)
    if b"Could not open" in real.stderr:
        with pytest.raises(FormatError):
            check_file(path)
        return None
    report = check_file(path)
    assert corpus.lines(report) == corpus.qemu_lines(real)
    assert report.exit_status == real.returncode
    if real.stdout:
        assert corpus.counts(report) == corpus.qemu_counts(real)
    else:
        assert report.failure
    return report


@pytest.mark.real("qemu-img", "qemu-io")
@pytest.mark.parametrize("name", corpus.OPTIONS)
def test_sound_image_of_each_feature_is_clean(name: str, images: dict[str, corpus.Image], scratch: Path) -> None:
    scratch.write_bytes(images[name].data)
    report = assert_same(scratch, luks=name == "luks")
    assert report is not None
    assert report.clean
    assert report.allocated_clusters > 0


@pytest.mark.real("qemu-img", "qemu-io")
@settings(max_examples=100)
@given(data=st.data())
def test_damaged_image_gives_the_lines_of_qemu_img(
    data: st.DataObject, images: dict[str, corpus.Image], scratch: Path
) -> None:
    name = data.draw(st.sampled_from(sorted(images)))
    edits = data.draw(corpus.damages(images[name]))
    scratch.write_bytes(corpus.damaged(images[name], edits))
    assert_same(scratch, luks=name == "luks")
