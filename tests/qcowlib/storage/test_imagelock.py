# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Our locks and those of qemu keep each other off, whoever came first."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qcowlib.errors import Busy, ReadOnly
from qcowlib.storage.file import FileStorage
from qcowlib.storage.imagelock import ImageLock, lock_image

if TYPE_CHECKING:
    from qcowlib.storage.imagelock import Access

pytestmark = pytest.mark.real("qemu-img", "qemu-io", "qemu-nbd")

# Our access, and the options by which qemu-io asks for the same.
KINDS: dict[str, tuple[Access, str, list[str]]] = {
    "qcow2-read": ("read", "qcow2", ["-r"]),
    "qcow2-write": ("write", "qcow2", []),
    "qcow2-share": ("force_share", "qcow2", ["-r", "-U"]),
    "raw-read": ("read", "raw", ["-r"]),
    "raw-write": ("write", "raw", []),
    "raw-share": ("force_share", "raw", ["-r", "-U"]),
}
PAIRS = [(a, b) for a in KINDS for b in KINDS]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A qcow2 image; the tests open it as raw too, which takes other locks on the same file."""
    path = tmp_path / "image"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "1M"], check=True)
    return path


def _ours(image: Path, kind: str) -> tuple[FileStorage, ImageLock]:
    access, image_format, _ = KINDS[kind]
    storage = FileStorage.open(image, writable=access == "write")
    try:
        return storage, lock_image(storage.fileno(), str(image), access, reserve=image_format == "qcow2")
    except BaseException:
        storage.close()
        raise


def _qemu_io(image: Path, kind: str, *commands: str) -> list[str]:
    _, image_format, options = KINDS[kind]
    return ["qemu-io", *options, "-f", image_format, *(word for c in commands for word in ("-c", c)), str(image)]


@pytest.fixture
def holder() -> Iterator[Callable[[list[str]], subprocess.Popen[str]]]:
    """Start a qemu-io that holds the image until the test ends; returns when it has opened it."""
    started: list[subprocess.Popen[str]] = []

    def start(command: list[str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        process.stdin.write("length\n")
        process.stdin.flush()
        process.stdout.readline()
        return process

    yield start
    for process in started:
        process.communicate("quit\n")


def _allowed(first: str, second: str) -> str | None:
    """Return the message the second opener gets, by the table of permissions."""
    masks = {"qcow2-read": (1, 10), "qcow2-write": (11, 10), "raw-read": (1, 0), "raw-write": (3, 0)}
    used_first, unshared_first = masks.get(first, (1, 0))
    used, unshared = masks.get(second, (1, 0))
    for bit, name in enumerate(("consistent read", "write", "write unchanged", "resize")):
        if used & unshared_first & 1 << bit:
            return f'Failed to get "{name}" lock'
        if unshared & used_first & 1 << bit:
            return f'Failed to get shared "{name}" lock'
    return None


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_we_respect_what_qemu_holds(
    image: Path, holder: Callable[[list[str]], subprocess.Popen[str]], first: str, second: str
) -> None:
    process = holder(_qemu_io(image, first))
    expected = _allowed(first, second)
    if expected is None:
        storage, _ = _ours(image, second)
        storage.close()
        return
    with pytest.raises(Busy) as caught:
        _ours(image, second)
    assert caught.value.message == expected
    assert caught.value.hint == f"Is another process using the image [{image}]?"
    assert caught.value.pid == process.pid


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_qemu_respects_what_we_hold(image: Path, first: str, second: str) -> None:
    storage, _ = _ours(image, first)
    result = subprocess.run(_qemu_io(image, second, "length"), capture_output=True, text=True)
    storage.close()
    expected = _allowed(first, second)
    assert (result.returncode == 0) == (expected is None), result
    assert expected is None or expected in result.stderr + result.stdout


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_two_of_ours_agree_with_the_table(image: Path, first: str, second: str) -> None:
    storage, _ = _ours(image, first)
    expected = _allowed(first, second)
    try:
        if expected is None:
            _ours(image, second)[0].close()
        else:
            with pytest.raises(Busy) as caught:
                _ours(image, second)
            assert (caught.value.message, caught.value.pid) == (expected, os.getpid())
    finally:
        storage.close()


def _locks(image: Path) -> list[tuple[int, int]]:
    inode = f":{image.stat().st_ino}"
    rows = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return sorted((int(row[-2]), int(row[-1])) for row in rows if row[-3].endswith(inode))


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_shows_the_same_locks_for_us_and_for_qemu(
    image: Path, holder: Callable[[list[str]], subprocess.Popen[str]], kind: str
) -> None:
    storage, lock = _ours(image, kind)
    ours = _locks(image)
    lock.release()
    lock.release()
    assert _locks(image) == []
    storage.close()
    holder(_qemu_io(image, kind))
    assert _locks(image) == ours


def test_qemu_nbd_and_qemu_img_are_kept_off_too(image: Path, tmp_path: Path) -> None:
    storage, _ = _ours(image, "qcow2-read")
    nbd = ["qemu-nbd", "-f", "qcow2", "-k", str(tmp_path / "s"), str(image)]
    result = subprocess.run(nbd, capture_output=True, text=True)
    assert 'Failed to get "write" lock' in result.stderr
    assert subprocess.run(["qemu-img", "info", str(image)], capture_output=True).returncode == 0
    storage.close()
    storage, _ = _ours(image, "qcow2-write")
    result = subprocess.run(["qemu-img", "check", str(image)], capture_output=True, text=True)
    assert 'Failed to get shared "write" lock' in result.stderr
    storage.close()


def test_creating_over_an_image_in_use_is_refused(
    image: Path, holder: Callable[[list[str]], subprocess.Popen[str]]
) -> None:
    holder(_qemu_io(image, "qcow2-read"))
    storage = FileStorage.create(image)
    with pytest.raises(Busy, match='Failed to get "write" lock'):
        lock_image(storage.fileno(), str(image), "create")
    storage.close()


def test_a_failed_change_keeps_what_was_held(image: Path) -> None:
    storage = FileStorage.open(image, writable=True)
    lock = lock_image(storage.fileno(), str(image), "read")
    other, _ = _ours(image, "raw-read")
    third, _ = _ours(image, "qcow2-read")
    before = _locks(image)
    with pytest.raises(Busy):
        lock.change("write")
    assert _locks(image) == before
    third.close()
    lock.change("write")
    lock.change("force_share")
    assert _locks(image) == [(100, 100), (100, 100)]
    other.close()
    storage.close()


def test_locks_end_with_the_process(image: Path) -> None:
    code = (
        "import os, sys; from qcowlib.storage.imagelock import lock_image;"
        "lock_image(os.open(sys.argv[1], os.O_RDWR), sys.argv[1], 'write'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(image)]).returncode == 9
    storage, _ = _ours(image, "qcow2-write")
    storage.close()


def test_writing_needs_a_writable_descriptor(image: Path) -> None:
    storage = FileStorage.open(image)
    with pytest.raises(ReadOnly):
        lock_image(storage.fileno(), str(image), "write")
    storage.close()
