# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""The expectations of the hostile corpus are those of qemu-img, except where we promise more."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from qcowlib.testing.hostile import HostileCase, hostile_cases, materialize
from qcowlib.testing.reference import ReferenceError, RefImage, reference_check, reference_read

# Programs under a limit of address space, which a sanitizer's shadow exceeds.
pytestmark = [pytest.mark.bare, pytest.mark.real("qemu-img")]

CASES = hostile_cases()
LIMITS = ["prlimit", "--as=4000000000", "--cpu=10"]

# qemu-img reads zeros where a pointer leads past the end of the file; we promise an error (L10).
ZEROS_PAST_THE_END = {"trunc-before-l2"} | {
    f"{kind}-past-{target}" for kind in ("l1", "l2") for target in ("40000000", "10000000000", "fffffffffff000")
}
# qemu-img looks at an image without its data file, and dies of a signal on info of a LUKS image without a header.
INFO_WORKS = {"df-bit-without-name"}


def test_the_corpus_is_large_and_its_names_are_unique() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names)) >= 350
    assert all(name.isascii() and name.isprintable() for name in names)


def _run(case: HostileCase, folder: Path, *command: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*LIMITS, "qemu-img", *command], capture_output=True, cwd=folder, stdin=subprocess.DEVNULL)


@pytest.mark.real("qemu-img")
@pytest.mark.parametrize("case", [c for c in CASES if c.expect == "refuse"], ids=lambda case: case.name)
def test_qemu_img_refuses_what_must_be_refused(tmp_path: Path, case: HostileCase) -> None:
    path = materialize(case, str(tmp_path))
    verb = "check" if case.name in INFO_WORKS else "info"
    assert _run(case, tmp_path, verb, "-f", "qcow2", path).returncode != 0


@pytest.mark.real("qemu-img")
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.expect in ("open", "unreadable") and c.whole], ids=lambda case: case.name
)
def test_qemu_img_reads_what_must_be_read(tmp_path: Path, case: HostileCase) -> None:
    path = materialize(case, str(tmp_path))
    result = _run(case, tmp_path, "convert", "-f", "qcow2", "-O", "raw", path, "out")
    expected = "open" if case.name in ZEROS_PAST_THE_END else case.expect
    assert (result.returncode == 0) == (expected == "open"), result.stderr
    if case.guest is not None:
        assert (tmp_path / "out").read_bytes() == case.guest


@pytest.mark.real("qemu-img")
@pytest.mark.parametrize("case", [c for c in CASES if c.corrupt is not None and c.whole], ids=lambda case: case.name)
def test_checks_agree_on_what_is_corrupt(tmp_path: Path, case: HostileCase) -> None:
    path = materialize(case, str(tmp_path))
    result = _run(case, tmp_path, "check", "--output=json", "-f", "qcow2", path)
    assert (json.loads(result.stdout).get("corruptions", 0) > 0) == case.corrupt
    data = dict(case.files).get("data")
    assert not isinstance(data, str)
    assert (reference_check(case.image, data=data).corruptions > 0) == case.corrupt


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.expect in ("open", "unreadable") and c.whole], ids=lambda case: case.name
)
def test_the_reference_reader_reads_what_must_be_read(case: HostileCase) -> None:
    files = dict(case.files)
    data, base = files.get("data"), files.get("base", b"")
    assert not isinstance(data, str)
    assert isinstance(base, bytes)
    image = RefImage(case.image, data)
    if case.expect == "open":
        content = reference_read(image, backing=base)
        assert case.guest is None or content == case.guest
    elif case.name != "df-moved":  # the plain reader follows any offset in a data file
        with pytest.raises(ReferenceError):
            reference_read(image, backing=base)


def test_the_reference_reader_is_bounded_on_everything() -> None:
    for case in CASES:
        try:
            image = RefImage(case.image)
            reference_check(image)
            if case.whole:
                reference_read(image)
        except ReferenceError:
            pass


def test_files_beside_the_image_are_made(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "bk-fifo")
    materialize(case, str(tmp_path))
    assert (tmp_path / "fifo").is_fifo()
    assert (tmp_path / "socket").is_socket()
    assert (tmp_path / "folder").is_dir()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "image.qcow2").read_bytes() == case.image
