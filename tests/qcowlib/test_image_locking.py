# SPDX-FileCopyrightText: 2026 The qcowlib authors
# SPDX-License-Identifier: Apache-2.0
"""Images that are in use: we and the real programs refuse each other, and the error names the holder's pid."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import qcowlib
from tests.qcowlib.qemu import QemuIo, qemu_img, run

pytestmark = pytest.mark.real("qemu-img", "qemu-io", "qemu-nbd")

MIB = 1 << 20


@pytest.fixture
def chain(tmp_path: Path) -> tuple[Path, Path]:
    """An overlay on a qcow2 base; both hold bytes."""
    base, top = tmp_path / "base", tmp_path / "top"
    qemu_img("create", "-q", "-f", "qcow2", base, "4M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 4M", base)
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", top)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 2 1M 1M", top)
    return base, top


@pytest.fixture
def writing_qemu(chain: tuple[Path, Path]) -> Iterator[QemuIo]:
    """A qemu-io that has the overlay open for writing."""
    io = QemuIo(chain[1])
    yield io
    io.close()


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_an_image_that_qemu_writes_is_refused_and_its_pid_told(
    chain: tuple[Path, Path], writing_qemu: QemuIo, mode: str
) -> None:
    with pytest.raises(qcowlib.Busy, match="Failed to get") as caught:
        qcowlib.open(chain[1], mode)  # type: ignore[call-overload]
    assert caught.value.pid == writing_qemu.pid


def test_force_share_reads_what_qemu_wrote_and_leaves_it_working(
    chain: tuple[Path, Path], writing_qemu: QemuIo
) -> None:
    writing_qemu.do("write -P 9 2M 64k")
    writing_qemu.do("flush")
    with qcowlib.open(chain[1], force_share=True) as image:
        assert image.pread(65536, 2 * MIB) == b"\x09" * 65536
        writing_qemu.do("write -P 8 2M 64k")


def test_a_base_in_use_below_may_be_read_by_both_and_written_by_none(
    chain: tuple[Path, Path], writing_qemu: QemuIo
) -> None:
    with qcowlib.open(chain[0]) as base:
        assert base.pread(10, MIB) == b"\x01" * 10
    with pytest.raises(qcowlib.Busy):
        qcowlib.open(chain[0], "r+")


def test_what_we_write_qemu_refuses(chain: tuple[Path, Path]) -> None:
    base, top = chain
    with qcowlib.open(top, "r+") as image:
        image.pwrite(b"x", 0)
        for words in (
            ["qemu-io", "-f", "qcow2", "-c", "read 0 512", str(top)],
            ["qemu-io", "-r", "-f", "qcow2", "-c", "read 0 512", str(top)],
            ["qemu-img", "info", str(top)],
            ["qemu-img", "check", str(top)],
            ["qemu-img", "convert", "-O", "raw", str(top), str(top.with_suffix(".raw"))],
            ["qemu-img", "resize", str(top), "8M"],
            ["qemu-io", "-f", "qcow2", "-c", "write 0 512", str(base)],
        ):
            assert "Failed to get" in run(*words, ok=False), words
        assert "virtual size" in qemu_img("info", "-U", top)
        assert image.pwrite(b"y", 1) == 1


def test_what_we_read_qemu_reads_but_does_not_write(chain: tuple[Path, Path]) -> None:
    with qcowlib.open(chain[1]) as image:
        run("qemu-io", "-r", "-f", "qcow2", "-c", "read 0 512", chain[1])
        assert "Failed to get" in run("qemu-io", "-f", "qcow2", "-c", "write 0 512", chain[1], ok=False)
        assert image.pread(4, 0) == b"\x01" * 4
    run("qemu-io", "-f", "qcow2", "-c", "write 0 512", chain[1])


def test_qemu_nbd_and_we_refuse_each_other(chain: tuple[Path, Path], tmp_path: Path) -> None:
    socket, pid_file = tmp_path / "socket", tmp_path / "pid"
    words = ["qemu-nbd", "-f", "qcow2", "-k", str(socket), f"--pid-file={pid_file}", "--fork", "-t", str(chain[1])]
    run(*words)
    pid = int(pid_file.read_text())
    try:
        with pytest.raises(qcowlib.Busy) as caught:
            qcowlib.open(chain[1], "r+")
        assert caught.value.pid == pid
    finally:
        subprocess.run(["kill", str(pid)], check=True)
        with OursWhenFree(chain[1]) as image:
            image.pwrite(b"z", 0)
            assert "Failed to get" in run(*words, ok=False)


class OursWhenFree:
    """Our image, opened as soon as the program that held it has ended."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> qcowlib.Image:
        while True:
            try:
                self.image = qcowlib.open(self.path, "r+")
            except qcowlib.Busy:
                continue
            return self.image

    def __exit__(self, *_: object) -> None:
        self.image.close()


def test_two_of_ours_refuse_each_other(chain: tuple[Path, Path]) -> None:
    with qcowlib.open(chain[1], "r+"):
        for mode in ("r", "r+"):
            with pytest.raises(qcowlib.Busy):
                qcowlib.open(chain[1], mode)  # type: ignore[call-overload]
        qcowlib.open(chain[1], lock=False).close()
    with qcowlib.open(chain[1]), qcowlib.open(chain[1]), pytest.raises(qcowlib.Busy):
        qcowlib.open(chain[1], "r+")
